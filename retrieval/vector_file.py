"""The vectors of a gallery in one file that is mapped into memory: opening two gigabytes takes no time.

The file is a cache of what stands in the gallery's table. One that is missing, truncated, of another format or not ours
reads as absent, and is made again.

Layout, little endian, every part at a multiple of 64 bytes: a header (magic, format, numbers of rows and dimensions,
the coarse copy's three bounds), float32 vectors ``(N, D)``, uint64 row ids ``(N,)``, and of the coarse copy int8 codes
``(N, D)``, float32 centre ``(D,)`` and float32 scale ``(D,)``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from datamodules.schema import DISK_FULL, UserError
from evaluation.artefacts import written_whole
from retrieval.coarse import Coarse, Coder, Spread, blocks

_HEADER = struct.Struct("<8sIIQQ3d")
_MAGIC, _FORMAT = b"VITRVEC\n", 1
_ALIGN = 64


@dataclass(frozen=True)
class VectorFile:
    """Vectors in a file; nothing is read before it is looked at.

    Attributes:
        matrix: float32 ``(N, D)``.
        row_ids: uint64 ``(N,)``, of the table.
        coarse: a copy in a quarter of the bytes, for ``ExactIndex``.
    """

    matrix: NDArray[np.float32]
    row_ids: NDArray[np.uint64]
    coarse: Coarse


def write_vectors(path: Path, batches: Iterable[tuple[NDArray[np.float32], NDArray[np.uint64]]], dim: int) -> None:
    """Writes a file of vectors whole, at the pace of the batches, of which only one is in memory.

    Args:
        path: of the file, which is replaced.
        batches: vectors float32 ``(B, D)`` and their rows' ids uint64 ``(B,)``.
        dim: D, length of the vectors.

    Raises:
        UserError: if the disk is full; an older file is still there.
        ValueError: for vectors of another length or that are not finite.
    """
    try:
        with written_whole(path) as partial, partial.open("w+b") as file:
            _write(file, batches, dim)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(f"{path}: there is no room on the disk; make room, then run the same command again") from error


def open_vectors(path: Path) -> VectorFile | None:
    """Maps a file of vectors into memory.

    Returns:
        None if there is none, or what is there is not a whole file of this format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic, number, dim, rows, reserved, *bounds = _HEADER.unpack(file.read(_HEADER.size))
    except (FileNotFoundError, struct.error):
        return None
    if (magic, number, reserved) != (_MAGIC, _FORMAT, 0) or size != _places(rows, dim)[-1]:
        return None
    data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)

    def part(place: int, dtype: DTypeLike, *shape: int) -> NDArray[Any]:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return data[place : place + count].view(dtype).reshape(shape)

    vectors, ids, codes, centre, scale, _ = _places(rows, dim)
    coarse = Coarse(
        part(codes, np.int8, rows, dim), part(centre, np.float32, dim), part(scale, np.float32, dim), *bounds
    )
    return VectorFile(part(vectors, np.float32, rows, dim), part(ids, np.uint64, rows), coarse)


def _write(file: BinaryIO, batches: Iterable[tuple[NDArray[np.float32], NDArray[np.uint64]]], dim: int) -> None:
    """Fills an empty file; its header comes last."""
    spread, ids = Spread(dim), [np.empty(0, np.uint64)]
    file.seek(_places(0, dim)[0])
    for vectors, row_ids in batches:
        if vectors.shape != (len(row_ids), dim) or vectors.dtype != np.float32:
            raise ValueError(f"vectors: are {vectors.dtype} {vectors.shape}, must be float32 ({len(row_ids)}, {dim})")
        if not np.isfinite(vectors).all():
            row = spread.count + int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise ValueError(f"vectors: row {row} holds numbers that are not finite")
        file.write(np.ascontiguousarray(vectors, "<f4").data)
        spread.add(vectors)
        ids.append(row_ids.astype(np.uint64))
    rows = spread.count
    places = _places(rows, dim)
    file.seek(places[1])
    file.write(np.concatenate(ids).data)
    file.flush()

    coder = Coder(*spread.centre_and_scale())
    if rows and dim:
        written = np.memmap(file, np.float32, "r", places[0], (rows, dim))
        file.seek(places[2])  # mapping has moved it
        for block in blocks(written):
            file.write(coder.code(block).data)
    for place, column in zip(places[3:5], (coder.centre, coder.scale), strict=True):
        file.seek(place)
        file.write(column.data)
    file.truncate(places[-1])
    file.seek(0)
    file.write(_HEADER.pack(_MAGIC, _FORMAT, dim, rows, 0, coder.residual, coder.reach, coder.norm))
    file.flush()


def _places(rows: int, dim: int) -> list[int]:
    """Where the parts begin, and where the file ends."""
    places = [_aligned(_HEADER.size)]
    for size in (4 * rows * dim, 8 * rows, rows * dim, 4 * dim, 4 * dim):
        places.append(_aligned(places[-1] + size))
    return places


def _aligned(place: int) -> int:
    """The next place at which a part may begin."""
    return -(-place // _ALIGN) * _ALIGN
