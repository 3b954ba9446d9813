"""How a split's pictures are read: from the cache of decoded pictures, or each time from where they come from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_info

from datamodules.options import AugmentOptions, complete_augment
from datamodules.pixel_cache import PixelCache
from datamodules.transforms import useful_short_side
from datamodules.verification import cache_directory
from vitrail.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from datamodules.base import ImageDataModule

_MOST_WORKERS = 16
_GB = 10**9


class SplitReaders:
    """Reads pictures of several splits, those of each by a reader of its own.

    So pictures that a split's evaluation has decoded before are found again.

    Args:
        split_codes: int8 ``(N,)``, of the whole table.
        make_reader: gives the reader of int64 ``(n,)`` rows of one split.
        rows: int64, ascending, those that are to be read.
    """

    def __init__(
        self,
        split_codes: NDArray[np.int8],
        make_reader: Callable[[NDArray[np.int64]], Callable[[int], torch.Tensor]],
        rows: NDArray[np.int64],
    ) -> None:
        self._split_codes = split_codes
        codes = split_codes[rows]
        self._readers = {int(code): make_reader(rows[codes == code]) for code in sorted(set(codes.tolist()))}

    def __call__(self, row: int) -> torch.Tensor:
        """One picture, uint8 ``(3, H, W)``."""
        return self._readers[int(self._split_codes[row])](row)


def picture_reader(
    datamodule: ImageDataModule,
    rows: NDArray[np.int64],
    content: NDArray[np.uint8],
    augment: AugmentOptions | None,
) -> Callable[[int], torch.Tensor]:
    """Reads pictures of some rows, out of the cache where the options say so; makes it where it is missing.

    Args:
        datamodule: gives the options and reads pictures.
        rows: int64 ``(n,)``, ascending.
        content: uint8 ``(N, 32)``, hash of each row's picture.
        augment: of training pictures, None for evaluation, which gets bit by bit what it gets without a cache.

    Returns:
        Gives uint8 ``(3, H, W)`` for a row of the table.

    Raises:
        UserError: if the disk is full, or ``cache: always`` does not fit into its limit.
    """
    options, mode = datamodule.loader_options, datamodule.loader_options["cache"]
    if mode == "never" or not len(rows):
        return datamodule.read_image
    image = datamodule.image_options
    cache = PixelCache(
        read_image=datamodule.read_image,
        rows=rows,
        content=content,
        short_side=useful_short_side(image, augment),
        interpolation=image["interpolation"],
        # Random crops come out of images of the original's shape.
        resize="crop" if complete_augment(augment, hue_safe=False)["random_resized_crop"] else image["resize"],
        folder=cache_directory() / "pixels",
    )
    limit = int(options["cache_limit_gb"] * _GB)
    if refusal := _refusal(cache, limit):
        if mode == "always":
            raise UserError(f"data loader.cache: always, but {refusal}; or set loader.cache: auto")
        rank_zero_info(f"{datamodule.table.origin}: pictures are decoded anew each time, because {refusal}.")
        return datamodule.read_image
    cache.build(limit, min(os.cpu_count() or 1, _MOST_WORKERS))
    return cache.read


def _refusal(cache: PixelCache, limit: int) -> str:
    """Why the cache cannot be made, and the way out; empty if it can."""
    needed = cache.estimated_bytes()
    if not needed:
        return ""
    if needed > limit:
        return f"decoded they need about {needed / _GB:.1f} GB; raise data loader.cache_limit_gb ({limit / _GB:g})"
    existing = next(folder for folder in (cache.folder, *cache.folder.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        return f"decoded they need about {needed / _GB:.1f} GB and {existing} has {free / _GB:.1f} GB left; free some"
    return ""
