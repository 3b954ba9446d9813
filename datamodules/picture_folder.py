"""PictureFolder: pictures in a folder and nothing else known of them, to be put into a gallery or predicted."""

from __future__ import annotations

from pathlib import Path

from datamodules.base import ImageDataModule
from datamodules.columns import composed
from datamodules.image_folder import pictures_below
from datamodules.images import image_suffixes
from datamodules.location import count_files_left_out
from datamodules.options import CheckOptions, ImageOptions, LoaderOptions
from datamodules.table import SampleTable
from vitrail.errors import UserError
from vitrail.types import DEFAULT_SEED


class PictureFolder(ImageDataModule):
    """All pictures below a folder, at any depth, without labels and captions; all of them are in the split test.

    A picture's name is its path from the folder on, with the folder's own name in front (``holiday/day1/beach.jpg``),
    so that folders of different names can go into one gallery. Hidden files and folders are left alone, as are files
    that are no pictures.

    Args:
        root: the folder.
        image: size, crop and interpolation of the pictures.
        loader: batch size and workers.
        checks: what to do about unreadable pictures.
        seed: of nothing here; every data set takes it.
    """

    def __init__(
        self,
        root: str,
        image: ImageOptions | None = None,
        loader: LoaderOptions | None = None,
        checks: CheckOptions | None = None,
        seed: int = DEFAULT_SEED,
    ) -> None:
        super().__init__(image, None, loader, checks, seed)
        self.root = root

    def load_table(self) -> SampleTable:
        """Lists the pictures.

        Raises:
            UserError: where there is no such folder, or no picture in it.
        """
        import pandas as pd

        root = Path(self.root).expanduser().absolute()
        if not root.is_dir():
            raise UserError(f"data root: there is no folder {self.root}; give one with pictures")
        paths = pictures_below(root)
        if not paths:
            raise UserError(
                f"data root: {self.root} has no pictures ({', '.join(image_suffixes())}); give another folder"
            )
        names = [composed(f"{root.name}/{path}") for path in paths]
        frame = pd.DataFrame({"name": names, "source": paths, "split": "test"})
        return SampleTable.from_frame(frame, [], None, str(root), str(root))

    def count_left_out(self) -> dict[str, int]:
        """See ``ImageDataModule``; all images below the root belong to the data set."""
        return count_files_left_out(self.table.sources.to_pylist(), self.table.origin, self.table.origin)
