"""Images to be predicted, from whatever a user names: files, folders, patterns, tables and shards, all mixed."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.image_folder import images_below
from datamodules.loading.decode import image_suffixes
from datamodules.options import CheckOptions
from datamodules.streaming.index import read_streams
from datamodules.streaming.shards import SUFFIXES as SHARD_SUFFIXES
from datamodules.table_file import SUFFIXES as TABLE_SUFFIXES
from datamodules.table_file import Table, TableColumns
from vitrail.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ImageSource:
    """N images that are read one after another.

    Attributes:
        names: of the images, as results show them.
        read: for ascending rows, int64 ``(n,)``, what each image is read from: its file, the content of one, or the
            error that stands in its place.
        origin: what the user named.
        files: local ones that they are read from.
    """

    names: Sequence[str]
    read: Callable[[NDArray[np.int64]], Iterator[Path | bytes | UserError]]
    origin: str
    files: Sequence[str | Path]

    def __len__(self) -> int:
        return len(self.names)


def find_images(sources: Sequence[str | Path], columns: TableColumns | None = None) -> list[ImageSource]:
    """Return the images of some sources, in their order.

    Args:
        sources: each a file, a folder (all images below it, or its shards), a pattern such as ``photos/*.jpg``, a table
            (see ``datamodules.Table``), or a shard: Parquet with images inside, or tar.
        columns: of the tables.

    Raises:
        UserError: where there is nothing of a name, or no image in it.
    """
    kinds = [(kind, path) for source in sources for kind, path in _expanded(str(source))]
    found = []
    for kind, group in groupby(kinds, key=lambda one: one[0]):
        paths = [path for _, path in group]
        match kind:
            case "image":
                found.append(_of_files(paths))
            case "table":
                found += [_of_table(path, columns or IMAGES_ONLY) for path in paths]
            case _:
                found.append(_of_shards(paths, kind))
    return found


def _expanded(source: str) -> list[tuple[str, Path]]:
    """Return what a source stands for: pairs of a kind and a file."""
    path = Path(source).expanduser()
    if path.is_dir():
        if images := [path / name for name in images_below(path)]:
            return [("image", image) for image in images]
        paths = sorted(
            file for file in path.rglob("[!.]*") if file.name.endswith(_SHARDS) and file.name != "index.parquet"
        )
    elif path.is_file():
        paths = [path]
    else:
        paths = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]  # noqa: PTH207
        if not paths:
            raise UserError(f"{source}: no such file or folder, and no pattern that matches one")
    if not paths:
        raise UserError(f"{source}: has neither images ({', '.join(image_suffixes())}) nor shards")
    return [(_kind_of(file), file) for file in paths]


IMAGES_ONLY = TableColumns(label="", group="", split="", caption="")
_SHARDS = tuple(suffix for suffixes in SHARD_SUFFIXES.values() for suffix in suffixes)


def _kind_of(path: Path) -> str:
    name = path.name.lower()
    if name.endswith(SHARD_SUFFIXES["webdataset"]):
        return "webdataset"
    if name.endswith(".parquet"):
        return "parquet" if _image_column(path) else "table"
    # Files of other endings may be images all the same; what they are is found out when they are read.
    return "table" if name.endswith(TABLE_SUFFIXES) else "image"


def _image_column(path: Path) -> str:
    """Return the column with images inside a Parquet file; empty where there is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as Parquet ({' '.join(str(error).split())[:120]})") from error
    return next((field.name for field in schema if _holds_images(field.type)), "")


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _of_files(paths: Sequence[Path]) -> ImageSource:
    return ImageSource(
        [str(path) for path in paths], lambda rows: (paths[row] for row in rows.tolist()), "files", paths
    )


def _of_table(path: Path, columns: TableColumns) -> ImageSource:
    data = Table(str(path), columns, checks=CheckOptions(on_bad_image="skip"))
    names, reasons = data.sample_names(), data.fetch()

    def read(rows: NDArray[np.int64]) -> Iterator[Path | bytes | UserError]:
        for row in rows.tolist():
            yield UserError(reasons[row]) if row in reasons else Path(data.table.source(row))

    files = [data.table.source(row) for row in range(len(names)) if row not in reasons]
    return ImageSource(names, read, str(path), files)


def _of_shards(paths: Sequence[Path], kind: str) -> ImageSource:
    urls = [str(path) for path in paths]
    image = _image_column(paths[0]) if kind == "parquet" else ""
    columns: Any = {"label": "", "caption": "", "group": "", "attributes": []} | ({"image": image} if image else {})
    table, shards = read_streams({"test": urls}, kind, columns, {}, urls[0])

    def read(rows: NDArray[np.int64]) -> Iterator[bytes]:
        which = shards.shard_of(rows)
        for shard in np.unique(which):
            yield from shards.read(rows[which == shard])

    return ImageSource([str(name) for name in table.names.to_pylist()], read, urls[0], urls)
