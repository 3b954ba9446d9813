"""The vectors of a table as one memory-mapped matrix: a derived file that can be made again at any time.

It is named by the table's revision, so it never answers for another one. It stands in the gallery's folder, or where
that cannot be written or is at an object store, under ``$VITRAIL_CACHE/galleries``.

The vectors of a gallery in one file that is mapped into memory: opening two gigabytes takes no time.

The file is a cache of what stands in the gallery's table. One that is missing, truncated, damaged, of another format or
not ours reads as absent, and is made again.

Layout, little endian, every part at a multiple of 64 bytes: a header (magic, format, numbers of rows and dimensions,
the coarse copy's three bounds, CRC-32 of the checksums, CRC-32 of the header before this), float32 vectors ``(N, D)``,
uint64 row ids ``(N,)``, of the coarse copy int8 codes ``(N, D)``, float32 centre ``(D,)`` and float32 scale ``(D,)``,
and uint32 checksums: the CRC-32 of each 64 KiB between the header and the checksums.

What every search reads (all but the vectors) is checked when the file is opened, which takes about as long as one
search; of the vectors themselves each 64 KiB when they are first looked at, which are few of them for a search.

The approximate index of a gallery that has outgrown exact search, and what it misses of the exact answer.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from retrieval.search.exact import Coarse, Coder, ExactIndex, Spread, blocks, integer_products
from retrieval.store import ROW_ID, Neighbours, Store, matrix_of
from vitrail.errors import DISK_FULL, UserError
from vitrail.files import local_folder, write_atomically

_HEADER = struct.Struct("<8sIIQQ3dI")
_HEADER_CHECK = struct.Struct("<I")
UNIT_TOLERANCE = 1e-3
"""How far a vector's length may be from 1; half precision rounds by less."""

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
        with write_atomically(path) as partial, partial.open("w+b") as file:
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


_ABANDONED = 60.0
"""Seconds without a change after which nobody is at work on a half-written file any more."""

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class VectorRows:
    """Exact search in the vectors of a table.

    Args:
        store: the table.
        uri: place of the gallery.
        name: of the table, for the file's name.
        device: where the products are computed, ``cpu`` or a GPU's name.
    """

    def __init__(self, store: Store, uri: str, name: str, device: str = "cpu") -> None:
        self._store = store
        self._folders = _folders(uri)
        self._name = name
        self._device = device
        self._loaded: _Loaded | None = None

    def nearest(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.uint64] | None = None
    ) -> list[Neighbours]:
        """The nearest rows of each query, best first; equal scores in the order of the table.

        Args:
            queries: float32 ``(Q, D)``, of unit length.
            k: number of rows; fewer are given where there are fewer.
            allowed: ids of the rows that may be found; None for all.

        Raises:
            UserError: where the vectors cannot be read, or their file not be written.
        """
        try:
            return self._nearest(queries, k, allowed)
        except DamagedError as error:
            # Found where a search came to look at it; what is made anew answers.
            self._make_again(error)
        try:
            return self._nearest(queries, k, allowed)
        except DamagedError as error:
            raise UserError(f"{error} again although it was just written; is the disk in order?") from error

    def _nearest(self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.uint64] | None) -> list[Neighbours]:
        loaded = self._load()
        rows = None if allowed is None else loaded.positions(allowed)
        if len(loaded.row_ids) == 0 or (rows is not None and len(rows) == 0):
            return [Neighbours(np.zeros(0, np.uint64), np.zeros(0, np.float32)) for _ in queries]
        found = loaded.index.search(queries, k, rows)
        return [Neighbours(loaded.row_ids[rows], scores) for rows, scores in zip(found.rows, found.scores, strict=True)]

    def refresh(self) -> None:
        """Makes the file of the table's revision and removes those of former ones.

        Raises:
            UserError: where the vectors cannot be read, or the disk is full.
        """
        self._load()
        for folder in self._folders:
            for former in folder.glob(f"{self._name}.*.vectors"):
                if former.name != self._file_name():
                    _remove(former)
            for partial in folder.glob(f".{self._name}.*.part.vectors"):
                # Left by a kill: whoever still writes one does so all the time, be it on another machine.
                if time.time() - partial.stat().st_mtime > _ABANDONED:
                    _remove(partial)

    def rename_to_revision(self, former: str) -> None:
        """Keeps the file of a former revision in which the same rows stood.

        Args:
            former: the revision's name.
        """
        for folder in self._folders:
            file = folder / f"{self._name}.{former}.vectors"
            if file.is_file() and os.access(folder, os.W_OK):
                file.replace(folder / self._file_name())
                self._loaded = None

    def _load(self) -> _Loaded:
        if self._loaded is None or self._loaded.revision != self._store.revision:
            file = self._open() or self._make()
            try:
                self._loaded = _Loaded(self._store.revision, file, self._device)
            except DamagedError as error:
                return self._make_again(error)
        return self._loaded

    def _make_again(self, error: DamagedError) -> _Loaded:
        tell_damage(error)
        self._loaded = _Loaded(self._store.revision, self._make(), self._device)
        return self._loaded

    def _open(self) -> VectorFile | None:
        for folder in self._folders:
            file = open_vectors(folder / self._file_name())
            if file is not None and len(file.row_ids) == len(self._store):
                return file
        return None

    def _make(self) -> VectorFile:
        refused: OSError | None = None
        dim = self._store.schema.field("vector").type.list_size
        for folder in self._folders:
            path = folder / self._file_name()
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_vectors(path, self._checked_vectors(), dim)
            except OSError as error:
                if error.errno not in _NOT_WRITABLE:
                    raise
                refused = error
                continue
            file = open_vectors(path)
            if file is None:
                raise UserError(f"{path}: cannot be read although it was just written; is the disk in order?")
            return file
        raise UserError(
            f"{refused}: the vectors can be kept nowhere; set $VITRAIL_CACHE to a folder that can be written"
        )

    def _checked_vectors(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint64]]]:
        """The table's vectors, each of which was of unit length when it was written."""
        for vectors, row_ids in self._store.vectors():
            check_lengths(vectors, self._store.origin)
            yield vectors, row_ids

    def _file_name(self) -> str:
        return f"{self._name}.{self._store.revision}.vectors"


class _Loaded:
    """The matrix of one revision, and which row of the table each of its rows is."""

    def __init__(self, revision: str, file: VectorFile, device: str) -> None:
        self.revision = revision
        self.row_ids = file.row_ids
        if device != "cpu" or not integer_products():
            file.check_all()  # all vectors are read, or copied to where nobody compares them any more
        self.index = ExactIndex(file.matrix, device, file.coarse, file.check_rows)
        self._order: NDArray[np.int64] | None = None

    def positions(self, row_ids: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Rows of the matrix with these row ids, int64, ascending."""
        if self._order is None:
            self._order = np.argsort(self.row_ids, kind="stable")
        found = np.searchsorted(self.row_ids, row_ids, sorter=self._order)
        return np.sort(self._order[found])


def check_lengths(vectors: NDArray[np.float32], origin: str) -> None:
    """Refuses vectors of a table that are not of unit length: LanceDB has no checksums, and damage is no answer.

    Args:
        vectors: float32 ``(N, D)``.
        origin: of the table, for the message.

    Raises:
        UserError: names the table.
    """
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(vectors, axis=1)
    # Written so that NaN is refused.
    if wrong := int((~(np.abs(lengths - 1) <= UNIT_TOLERANCE)).sum()):
        raise UserError(
            f"{origin}: {wrong} of {len(vectors)} vectors read are not of unit length, so its files are damaged; "
            "restore the gallery from a copy, or index again into a new one"
        )


def cache_of(uri: str) -> Path:
    """A gallery's folder under ``$VITRAIL_CACHE``, for what belongs to this machine."""
    local = local_folder(uri)
    name = str(local.resolve()) if local is not None else uri.rstrip("/")
    cache = Path(os.environ.get("VITRAIL_CACHE") or "~/.cache/vitrail").expanduser()
    return cache / "galleries" / hashlib.sha256(name.encode()).hexdigest()[:16]


def _folders(uri: str) -> list[Path]:
    """Where the file may stand, the best place first."""
    local = local_folder(uri)
    return [cache_of(uri)] if local is None else [local, cache_of(uri)]


def _remove(path: Path) -> None:
    # Who still searches in it keeps it: the system frees the file when the last one closes it.
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise


SMALLEST = 1000
"""Images below which an index cannot be trained, and would gain nothing."""


@dataclass(frozen=True)
class IndexReport:
    """What an index finds.

    Attributes:
        rows: images in the gallery.
        queries: stored vectors that were searched for.
        k: neighbours of each that were compared; the vector itself does not count.
        recall: share of the exact neighbours that the index finds, 0 to 1.
        worst: the same of the query with the lowest.
    """

    rows: int
    queries: int
    k: int
    recall: float
    worst: float


def build_index(store: Store, uri: str, *, sample: int, k: int, seed: int = 0) -> IndexReport:
    """Build the approximate index of a table and compare it with exact search.

    Args:
        store: the table.
        uri: of the gallery, for messages.
        sample: number of stored vectors that are searched for.
        k: neighbours of each that are compared.
        seed: of the choice of vectors.

    Raises:
        UserError: for a gallery that is too small, a second writer, or a full disk.
    """
    if len(store) < SMALLEST:
        raise UserError(
            f"{uri}: has {len(store)} images; an index needs {SMALLEST:,}, and exact search of so few is faster"
        )
    store.build_index()
    return measured(store, sample=sample, k=k, seed=seed)


def measured(store: Store, *, sample: int, k: int, seed: int = 0) -> IndexReport:
    """Compare the approximate index of a table with exact search.

    The exact neighbours are found by reading the table once, some thousands of rows at a time, so it may be larger than
    memory.

    Args:
        store: a table with an index.
        sample: number of stored vectors that are searched for.
        k: neighbours of each that are compared.
        seed: of the choice of vectors.
    """
    ids = store.scan(["id"]).column(ROW_ID).to_numpy()
    chosen = ids[np.sort(np.random.default_rng(seed).choice(len(ids), min(sample, len(ids)), replace=False))]
    queries = matrix_of(store.take(chosen, ["vector"]).column("vector"))
    exact = exact_neighbours(store, queries, k + 1)
    found = [store.nearest(query, k + 1).row_ids for query in queries]
    shares = np.array(
        [
            len(_others(near, own, k) & _others(true, own, k)) / k
            for near, true, own in zip(found, exact, chosen, strict=True)
        ]
    )
    return IndexReport(len(ids), len(chosen), k, float(shares.mean()), float(shares.min()))


def exact_neighbours(store: Store, queries: NDArray[np.float32], k: int) -> NDArray[np.uint64]:
    """The nearest rows of a table without having all vectors in memory.

    Args:
        store: the table.
        queries: float32 ``(Q, D)``.
        k: how many; at most the table's length.

    Returns:
        uint64 ``(Q, k)``, row ids, best first; of equal scores the earlier row first.
    """
    scores = np.zeros((len(queries), 0), np.float32)
    rows = np.zeros((len(queries), 0), np.uint64)
    for matrix, row_ids in store.vectors():
        near = ExactIndex(matrix).search(queries, k)
        scores = np.concatenate([scores, near.scores], axis=1)
        rows = np.concatenate([rows, row_ids[near.rows]], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
    return rows


def _others(rows: NDArray[np.uint64], own: int, k: int) -> set[int]:
    return set([row for row in rows.tolist() if row != own][:k])
