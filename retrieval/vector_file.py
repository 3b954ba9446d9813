"""The vectors of a gallery in one file that is mapped into memory: opening two gigabytes takes no time.

The file is a cache of what stands in the gallery's table. One that is missing, truncated, damaged, of another format or
not ours reads as absent, and is made again.

Layout, little endian, every part at a multiple of 64 bytes: a header (magic, format, numbers of rows and dimensions,
the coarse copy's three bounds, CRC-32 of the checksums, CRC-32 of the header before this), float32 vectors ``(N, D)``,
uint64 row ids ``(N,)``, of the coarse copy int8 codes ``(N, D)``, float32 centre ``(D,)`` and float32 scale ``(D,)``,
and uint32 checksums: the CRC-32 of each 64 KiB between the header and the checksums.

What every search reads (all but the vectors) is checked when the file is opened, which takes about as long as one
search; of the vectors themselves each 64 KiB when they are first looked at, which are few of them for a search.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from retrieval.coarse import Coarse, Coder, Spread, blocks
from vitrail.errors import DISK_FULL, UserError
from vitrail.files import written_whole

_HEADER = struct.Struct("<8sIIQQ3dI")
_HEADER_CHECK = struct.Struct("<I")
_MAGIC, _FORMAT = b"VITRVEC\n", 2
_FORMER = 1  # Had no checksums.
_ALIGN = 64
_CHECKED = 1 << 16
"""Bytes that have a checksum together."""


class DamagedError(Exception):
    """Bytes of a file are not those that were written; the message is one line."""


class Checksums:
    """What tells whether parts of a file are as they were written.

    Args:
        path: of the file, for messages.
        data: uint8, the file's bytes between header and checksums.
        expected: uint32, CRC-32 of each ``_CHECKED`` bytes of them.
    """

    def __init__(self, path: Path, data: NDArray[np.uint8], expected: NDArray[np.uint32]) -> None:
        self._path, self._data, self._expected = path, data, expected
        self._good = np.zeros(len(expected), bool)

    def check(self, start: int, stop: int) -> None:
        """Compares the bytes from ``start`` to before ``stop`` with their checksums; each is compared once.

        Raises:
            DamagedError: where they differ.
        """
        self._compare(np.arange(start // _CHECKED, -(-stop // _CHECKED)))

    def check_rows(self, rows: NDArray[np.int64], size: int) -> None:
        """Likewise for rows of ``size`` bytes each, which begin with the data.

        Raises:
            DamagedError: where they differ.
        """
        if len(rows) and size:
            first, last = rows * size // _CHECKED, (rows * size + size - 1) // _CHECKED
            # A long row may span many blocks, two neighbours usually share one.
            for away in range(int((last - first).max()) + 1):
                self._compare(np.minimum(first + away, last))

    def _compare(self, blocks: NDArray[np.int64]) -> None:
        for block in np.unique(blocks[~self._good[blocks]]).tolist():
            if zlib.crc32(self._data[block * _CHECKED : (block + 1) * _CHECKED].data) != self._expected[block]:
                raise DamagedError(f"{self._path}: is damaged, a checksum does not match")
            self._good[block] = True


@dataclass(frozen=True)
class VectorFile:
    """Vectors in a file; nothing is read before it is looked at.

    Attributes:
        matrix: float32 ``(N, D)``.
        row_ids: uint64 ``(N,)``, of the table.
        coarse: a copy in a quarter of the bytes, for ``ExactIndex``.
        checksums: of vectors, row ids and copy; those of the vectors are still to be compared.
    """

    matrix: NDArray[np.float32]
    row_ids: NDArray[np.uint64]
    coarse: Coarse
    checksums: Checksums

    def check_rows(self, rows: NDArray[np.int64]) -> None:
        """Makes sure that rows of ``matrix`` are as they were written, before they are believed.

        Raises:
            DamagedError: if one is not.
        """
        self.checksums.check_rows(rows, self.matrix.shape[1] * self.matrix.itemsize)

    def check_all(self) -> None:
        """The same for the whole matrix, where it is going to be copied to a GPU, say."""
        self.checksums.check(0, self.matrix.nbytes)


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
        None if there is none, or what is there is not a whole file of this format. What is damaged is told on standard
        error.
    """
    try:
        return _opened(path)
    except DamagedError as error:
        tell_damage(error)
    return None


def tell_damage(error: DamagedError) -> None:
    """Says what was damaged and what becomes of it."""
    sys.stderr.write(f"warning: {error}; it is made again from the gallery's table\n")


def _opened(path: Path) -> VectorFile | None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_HEADER.size + _HEADER_CHECK.size)
    except FileNotFoundError:
        return None
    if header.startswith(_MAGIC + struct.pack("<I", _FORMER)):
        return None
    if len(header) < _HEADER.size + _HEADER_CHECK.size or not header.startswith(_MAGIC):
        raise DamagedError(f"{path}: is cut short or no file of vectors")
    if zlib.crc32(header[: _HEADER.size]) != _HEADER_CHECK.unpack_from(header, _HEADER.size)[0]:
        raise DamagedError(f"{path}: is damaged, its header does not match its checksum")
    _, number, dim, rows, reserved, *bounds, check = _HEADER.unpack_from(header)
    if (number, reserved) != (_FORMAT, 0):
        return None
    places = _places(rows, dim)
    if size != places[-1]:
        raise DamagedError(f"{path}: has {size} bytes instead of {places[-1]}, it is cut short or was added to")
    data = np.memmap(path, np.uint8, "r")

    def part(place: int, dtype: DTypeLike, *shape: int) -> NDArray[Any]:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return data[place : place + count].view(dtype).reshape(shape)

    vectors, ids, codes, centre, scale, checks, end = places
    expected = part(checks, np.uint32, (end - checks) // 4)
    if zlib.crc32(expected.data) != check:
        raise DamagedError(f"{path}: is damaged, its checksums do not match theirs")
    checksums = Checksums(path, data[vectors:checks], expected)
    checksums.check(ids - vectors, checks - vectors)
    coarse = Coarse(
        part(codes, np.int8, rows, dim), part(centre, np.float32, dim), part(scale, np.float32, dim), *bounds
    )
    return VectorFile(part(vectors, np.float32, rows, dim), part(ids, np.uint64, rows), coarse, checksums)


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
    file.truncate(places[5])
    # As they are read back: what was handed to the system is what the checksums are of.
    file.seek(places[0])
    checks = np.array([zlib.crc32(block) for block in iter(lambda: file.read(_CHECKED), b"")], "<u4").tobytes()
    file.write(checks)
    file.seek(0)
    bounds = (coder.residual, coder.reach, coder.norm)
    header = _HEADER.pack(_MAGIC, _FORMAT, dim, rows, 0, *bounds, zlib.crc32(checks))
    file.write(header + _HEADER_CHECK.pack(zlib.crc32(header)))
    file.flush()


def _places(rows: int, dim: int) -> list[int]:
    """Where the parts begin, and where the file ends."""
    places = [_aligned(_HEADER.size + _HEADER_CHECK.size)]
    for size in (4 * rows * dim, 8 * rows, rows * dim, 4 * dim, 4 * dim):
        places.append(_aligned(places[-1] + size))
    return [*places, places[-1] + 4 * -(-(places[-1] - places[0]) // _CHECKED)]


def _aligned(place: int) -> int:
    """The next place at which a part may begin."""
    return -(-place // _ALIGN) * _ALIGN
