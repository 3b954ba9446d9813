"""The vectors of a table as one memory-mapped matrix, a cache that can be made again at any time; and index recall.

The file is named by the table's revision, so it never serves another one. It is in the gallery's folder, or where that
cannot be written or is at an object store, under ``$VITRAIL_CACHE/galleries``. One that is missing, truncated, damaged,
of another format or not ours is made again from the table.

Rows that were appended go into a file of their own, which names the files of earlier revisions that hold the rows
before; those are never changed, so a kill does no harm and readers keep what they have opened. A new file takes in the
rows of the earlier ones that are not several times as large, so there are few (at most the logarithm of the rows), and
a row is written again a few times at most: appending costs about what is appended.

Layout, little endian, every part at a multiple of 64 bytes: a header (magic, format, bytes of the names, numbers of
dimensions, of own rows and of all rows, the coarse copy's three bounds, CRC-32 of the checksums, CRC-32 of the header
before this), float32 vectors of the own rows ``(n, D)``, uint64 ids of all rows ``(N,)``, of the coarse copy int8 codes
``(n, D)``, float32 centre ``(D,)`` and float32 scale ``(D,)``, the earlier files as JSON (name, own rows, CRC-32 of
checksums of each), and uint32 checksums: the CRC-32 of each 64 KiB between the header and the checksums. What every
search reads (all but the vectors) is checked when the file is opened; the vectors block by block when a search first
reads them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from retrieval.schema import not_unit
from retrieval.search.exact import Coarse, Coder, ExactIndex, integer_products
from retrieval.store import ROW_ID, Neighbours, Store, matrix_of
from vitrail.errors import DISK_FULL, UserError
from vitrail.files import cache_directory, local_folder, write_atomically

_HEADER = struct.Struct("<8sHHIQQ3dI")
_HEADER_CHECK = struct.Struct("<I")
_MAGIC, _FORMAT = b"VITRVEC\n", 3
_FORMER = (1, 2)  # had no checksums; no earlier files
_ALIGN = 64
_CHECKED = 1 << 16
"""Bytes that have a checksum together."""

_ABANDONED = 60.0
"""Seconds without a change after which a partly written file counts as left by a killed process."""

_FEWEST, _LARGER = 8192, 4
"""Earlier files with fewer rows, or fewer than this many times the new ones, are taken into a new file."""

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class DamagedError(Exception):
    """Bytes of a file are not those that were written; the message is one line."""


class Earlier(NamedTuple):
    """A file that holds rows before those of another one.

    Attributes:
        name: of the file, in the same folder.
        rows: its own ones.
        check: CRC-32 of its checksums.
    """

    name: str
    rows: int
    check: int


class VectorFile:
    """A mapped file of vectors; nothing is read before it is needed.

    Attributes:
        matrix: float32 ``(n, D)``, the last n of the N rows.
        row_ids: uint64 ``(N,)``, of the table.
        coarse: a copy in a quarter of the bytes, for ``ExactIndex``.
        check: CRC-32 of its checksums.

    Raises:
        DamagedError: where the file is cut, or its checksums are damaged; the rest is still to be checked.
    """

    def __init__(
        self, path: Path, rows: int, total: int, dim: int, names: int, bounds: tuple[float, float, float], check: int
    ) -> None:
        places = _places(rows, total, dim, names)
        if (size := path.stat().st_size) != places[-1]:
            raise DamagedError(f"{path}: is truncated or was added to: {size} bytes instead of {places[-1]}")
        mapped = np.memmap(path, np.uint8, "r")

        def part(place: int, dtype: DTypeLike, *shape: int) -> NDArray[Any]:
            count = int(np.prod(shape)) * np.dtype(dtype).itemsize
            return mapped[place : place + count].view(dtype).reshape(shape)

        vectors, ids, codes, centre, scale, earlier, checks, end = places
        self.path, self.check = path, check
        self.matrix: NDArray[np.float32] = part(vectors, np.float32, rows, dim)
        self.row_ids: NDArray[np.uint64] = part(ids, np.uint64, total)
        centre_scale = part(centre, np.float32, dim), part(scale, np.float32, dim)
        self.coarse = Coarse(part(codes, np.int8, rows, dim), *centre_scale, *bounds)
        self._data, self._expected = mapped[vectors:checks], part(checks, np.uint32, (end - checks) // 4)
        self._intact = np.zeros(len(self._expected), bool)
        if zlib.crc32(self._expected.data) != check:
            raise DamagedError(f"{path}: is damaged, its checksums do not match theirs")
        self._rest = np.arange((ids - vectors) // _CHECKED, len(self._expected))
        self._named = np.arange((earlier - vectors) // _CHECKED, len(self._expected))
        self._names = mapped[earlier : earlier + names]

    @property
    def earlier(self) -> list[Earlier]:
        """Files with the rows before, in order; they are to be checked first."""
        return [Earlier(*one) for one in json.loads(self._names.tobytes() or b"[]")]

    def check_names(self) -> None:
        """Raise ``DamagedError`` unless the names of the earlier files are as they were written."""
        self._check(self._named)

    def check_scanned(self) -> None:
        """Raise ``DamagedError`` unless all but the vectors is as it was written."""
        self._check(self._rest)

    def check_rows(self, rows: NDArray[np.int64]) -> None:
        """Raise ``DamagedError`` unless these rows of ``matrix`` are as they were written."""
        size = self.matrix.shape[1] * self.matrix.itemsize
        if len(rows) and size:
            first, last = rows * size // _CHECKED, (rows * size + size - 1) // _CHECKED
            # A long row may span many blocks, two neighbours usually share one.
            for offset in range(int((last - first).max()) + 1):
                self._check(np.minimum(first + offset, last))

    def check_all(self) -> None:
        """Raise ``DamagedError`` unless the whole matrix is as it was written, before it is copied to a GPU, say."""
        self._check(np.arange(-(-self.matrix.nbytes // _CHECKED)))

    def _check(self, blocks: NDArray[np.int64]) -> None:
        for block in np.unique(blocks[~self._intact[blocks]]).tolist():
            if zlib.crc32(self._data[block * _CHECKED : (block + 1) * _CHECKED].data) != self._expected[block]:
                raise DamagedError(f"{self.path}: is damaged, a checksum does not match")
            self._intact[block] = True


def write_vectors(
    path: Path,
    batches: Iterable[tuple[NDArray[np.float32], NDArray[np.uint64]]],
    dim: int,
    earlier: Sequence[Earlier] = (),
    earlier_ids: NDArray[np.uint64] | None = None,
) -> None:
    """Write a file of vectors atomically, with only one batch in memory.

    Args:
        path: of the file, which is replaced.
        batches: vectors float32 ``(B, D)`` and their rows' ids uint64 ``(B,)``.
        dim: D, length of the vectors.
        earlier: files with the rows before, in the same folder.
        earlier_ids: uint64, ids of those rows.

    Raises:
        UserError: if the disk is full; an older file is still there.
        ValueError: for vectors of another length or that are not finite.
    """
    try:
        with write_atomically(path) as partial, partial.open("w+b") as file:
            _write(file, batches, dim, earlier, np.empty(0, np.uint64) if earlier_ids is None else earlier_ids)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(f"{path}: there is no room on the disk; make room, then run the same command again") from error


def open_vectors(path: Path) -> VectorFile | None:
    """Map a file of vectors into memory.

    Returns:
        None if there is none, or what is there is not an intact file of this format. Damage is reported on standard
        error.
    """
    try:
        file = _mapped(path)
        if file is not None:
            file.check_scanned()
        return file
    except DamagedError as error:
        _report_damage(error)
        return None


def open_revision(path: Path) -> list[VectorFile] | None:
    """Map the files with all vectors of a revision: the earlier ones, last the one at ``path``; else as above."""
    last = open_vectors(path)
    if last is None:
        return None
    files = []
    for name, rows, check in last.earlier:
        file = open_vectors(path.parent / name)
        # Another one where a process that still reads its revision has made it again.
        if file is None or (len(file.matrix), file.check) != (rows, check):
            return None
        files.append(file)
    return [*files, last]


def _mapped(path: Path) -> VectorFile | None:
    """Open a file after checking its header and checksums only; return None if it has another format or is missing."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER.size + _HEADER_CHECK.size)
    except FileNotFoundError:
        return None
    if header.startswith(tuple(_MAGIC + struct.pack("<I", former) for former in _FORMER)):
        return None
    if len(header) < _HEADER.size + _HEADER_CHECK.size or not header.startswith(_MAGIC):
        raise DamagedError(f"{path}: is truncated or no file of vectors")
    if zlib.crc32(header[: _HEADER.size]) != _HEADER_CHECK.unpack_from(header, _HEADER.size)[0]:
        raise DamagedError(f"{path}: is damaged, its header does not match its checksum")
    _, number, names, dim, rows, total, residual, reach, norm, check = _HEADER.unpack_from(header)
    return VectorFile(path, rows, total, dim, names, (residual, reach, norm), check) if number == _FORMAT else None


def _report_damage(error: DamagedError) -> None:
    sys.stderr.write(f"warning: {error}; it is made again from the gallery's table\n")


def _write(
    file: BinaryIO,
    batches: Iterable[tuple[NDArray[np.float32], NDArray[np.uint64]]],
    dim: int,
    earlier: Sequence[Earlier],
    earlier_ids: NDArray[np.uint64],
) -> None:
    """Fill an empty file; its header comes last."""
    rows, ids = 0, [earlier_ids]
    file.seek(_places(0, 0, dim, 0)[0])
    for vectors, row_ids in batches:
        if vectors.shape != (len(row_ids), dim) or vectors.dtype != np.float32:
            raise ValueError(f"vectors: are {vectors.dtype} {vectors.shape}, must be float32 ({len(row_ids)}, {dim})")
        if not np.isfinite(vectors).all():
            row = rows + int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise ValueError(f"vectors: row {row} holds numbers that are not finite")
        file.write(np.ascontiguousarray(vectors, "<f4").data)
        rows += len(vectors)
        ids.append(row_ids.astype(np.uint64))
    file.flush()
    all_ids, names = np.concatenate(ids), json.dumps(earlier).encode() if earlier else b""
    places = _places(rows, len(all_ids), dim, len(names))
    mapped = np.memmap(file, np.float32, "r", places[0], (rows, dim)) if rows and dim else np.zeros((rows, dim), "<f4")
    coder = Coder(mapped)
    codes, named = coder.codes(), np.frombuffer(names, np.uint8)
    parts: tuple[Iterable[NDArray[Any]], ...] = ([all_ids], codes, [coder.centre], [coder.scale], [named])
    for place, part in zip(places[1:6], parts, strict=True):
        file.seek(place)  # mapping moves it too
        for block in part:
            file.write(block.data)
    file.truncate(places[6])
    # As they are read back: the checksums are of what the system returns.
    file.seek(places[0])
    checks = np.array([zlib.crc32(block) for block in iter(lambda: file.read(_CHECKED), b"")], "<u4").tobytes()
    file.write(checks)
    file.seek(0)
    sizes, bounds = (len(names), dim, rows, len(all_ids)), (coder.residual, coder.reach, coder.norm)
    header = _HEADER.pack(_MAGIC, _FORMAT, *sizes, *bounds, zlib.crc32(checks))
    file.write(header + _HEADER_CHECK.pack(zlib.crc32(header)))
    file.flush()


def _places(rows: int, total: int, dim: int, names: int) -> list[int]:
    """Where the parts begin, and where the file ends."""
    places = [_aligned(_HEADER.size + _HEADER_CHECK.size)]
    for size in (4 * rows * dim, 8 * total, rows * dim, 4 * dim, 4 * dim, names):
        places.append(_aligned(places[-1] + size))
    return [*places, places[-1] + 4 * -(-(places[-1] - places[0]) // _CHECKED)]


def _aligned(place: int) -> int:
    return -(-place // _ALIGN) * _ALIGN


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
        """Find the nearest rows of each query, best first; equal scores in the order of the table.

        Args:
            queries: float32 ``(Q, D)``, of unit length.
            k: number of rows; fewer are returned where there are fewer.
            allowed: ids of the rows that may be found; None for all.

        Raises:
            UserError: where the vectors cannot be read, or their file not be written.
        """
        try:
            return self._nearest(queries, k, allowed)
        except DamagedError as error:
            self._make_again(error)
        try:
            return self._nearest(queries, k, allowed)
        except DamagedError as error:
            raise UserError(f"{error} again although it was just written; is the disk in order?") from error

    def _nearest(self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.uint64] | None) -> list[Neighbours]:
        loaded = self._load()
        found = loaded.index.search(queries, k, None if allowed is None else loaded.positions(allowed))
        return [Neighbours(loaded.row_ids[rows], scores) for rows, scores in zip(found.rows, found.scores, strict=True)]

    def refresh(self) -> None:
        """Make the file of the table's revision, and remove those of former ones.

        Raises:
            UserError: where the vectors cannot be read, or the disk is full.
        """
        if not any((folder / self._file_name()).is_file() for folder in self._folders) and not self._extend():
            self._make()
        for folder in self._folders:
            current = _undamaged(folder / self._file_name())
            kept = {self._file_name(), *(one.name for one in current.earlier)} if current else {self._file_name()}
            for former in folder.glob(f"{self._name}.*.vectors"):
                if former.name not in kept:
                    _remove(former)
            for partial in folder.glob(f".{self._name}.*.part.vectors"):
                # A process that still writes one, also on another machine, changes it all the time.
                if time.time() - partial.stat().st_mtime > _ABANDONED:
                    _remove(partial)

    def keep(self, former: str) -> None:
        """Go on with the vectors of a former revision that has the same rows in the same order, maybe with new ids."""
        if former == self._store.revision:
            return
        ids = self._store.row_ids()
        for folder in self._folders:
            file = _undamaged(folder / f"{self._name}.{former}.vectors")
            if file is None or len(file.row_ids) != len(ids) or not os.access(folder, os.W_OK):
                continue
            if np.array_equal(file.row_ids, ids):
                file.path.replace(folder / self._file_name())
                self._loaded = None
            elif len(ids) >= _FEWEST:
                self._write(folder, _files(file), ids)

    def _extend(self) -> bool:
        """Write the rows that were appended to a former revision; False where there is none that has the others."""
        ids = self._store.row_ids()
        for folder in self._folders:
            for path in sorted(folder.glob(f"{self._name}.*.vectors")):
                file = _undamaged(path)
                if file is None or not np.array_equal(file.row_ids, ids[: len(file.row_ids)]):
                    continue
                if (kept := _kept(file, len(ids) - len(file.row_ids))) and os.access(folder, os.W_OK):
                    self._write(folder, kept, ids)
                    return True
        return False

    def _write(self, folder: Path, earlier: Sequence[Earlier], ids: NDArray[np.uint64]) -> None:
        """Write all rows but those in earlier files."""
        start, dim = sum(one.rows for one in earlier), self._store.schema.field("vector").type.list_size
        new = self._checked_vectors(start) if start < len(ids) else iter(())
        write_vectors(folder / self._file_name(), new, dim, earlier, ids[:start])

    def _load(self) -> _Loaded:
        if self._loaded is None or self._loaded.revision != self._store.revision:
            files = self._open() or [self._make()]
            try:
                self._loaded = _Loaded(self._store.revision, files, self._device)
            except DamagedError as error:
                return self._make_again(error)
        return self._loaded

    def _make_again(self, error: DamagedError) -> _Loaded:
        _report_damage(error)
        self._loaded = _Loaded(self._store.revision, [self._make()], self._device)
        return self._loaded

    def _open(self) -> list[VectorFile] | None:
        for folder in self._folders:
            files = open_revision(folder / self._file_name())
            if files is not None and len(files[-1].row_ids) == len(self._store):
                return files
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
            f"{refused}: there is no place for the vectors; set $VITRAIL_CACHE to a folder that can be written"
        )

    def _checked_vectors(self, start: int = 0) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint64]]]:
        for vectors, row_ids in self._store.vectors(start):
            check_lengths(vectors, self._store.origin)
            yield vectors, row_ids

    def _file_name(self) -> str:
        return f"{self._name}.{self._store.revision}.vectors"


def _undamaged(path: Path) -> VectorFile | None:
    """A file whose rows may be gone on with: the names of earlier ones are checked, its vectors by those who search."""
    try:
        file = _mapped(path)
        if file is not None:
            file.check_names()
        return file
    except DamagedError:
        return None


def _files(file: VectorFile) -> list[Earlier]:
    """The files with a revision's rows, in order."""
    own = [Earlier(file.path.name, len(file.matrix), file.check)] if len(file.matrix) else []
    return [*file.earlier, *own]


def _kept(file: VectorFile, new: int) -> list[Earlier]:
    """The files with a revision's rows that a file with ``new`` more does not take in."""
    files = _files(file)
    while files and files[-1].rows < max(_FEWEST, _LARGER * new):
        new += files.pop().rows
    return files


class _Loaded:
    """The vectors of one revision, and which row of the table each of them is."""

    def __init__(self, revision: str, files: Sequence[VectorFile], device: str) -> None:
        self.revision = revision
        self.row_ids = files[-1].row_ids
        if device != "cpu" or not integer_products():
            for file in files:
                file.check_all()  # all vectors are read, or copied to where they are not compared any more
        self.index = ExactIndex.joined(
            [ExactIndex(file.matrix, device, file.coarse, file.check_rows) for file in files]
        )
        self._order: NDArray[np.int64] | None = None

    def positions(self, row_ids: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Rows of the matrix with these row ids, int64, ascending."""
        if self._order is None:
            self._order = np.argsort(self.row_ids, kind="stable")
        return np.sort(self._order[np.searchsorted(self.row_ids, row_ids, sorter=self._order)])


def check_lengths(vectors: NDArray[np.float32], origin: str) -> None:
    """Raise ``UserError`` for vectors ``(N, D)`` of a table that are not of unit length: LanceDB has no checksums."""
    if wrong := len(not_unit(vectors)):
        raise UserError(
            f"{origin}: {wrong} of {len(vectors)} vectors read are not of unit length, so its files are damaged; "
            "restore the gallery from a copy, or index again into a new one"
        )


def cache_of(uri: str) -> Path:
    """A gallery's folder under ``$VITRAIL_CACHE``, for what belongs to this machine."""
    local = local_folder(uri)
    name = str(local.resolve()) if local is not None else uri.rstrip("/")
    return cache_directory() / "galleries" / hashlib.sha256(name.encode()).hexdigest()[:16]


def _folders(uri: str) -> list[Path]:
    """Where the file may be, the best place first."""
    local = local_folder(uri)
    return [cache_of(uri)] if local is None else [local, cache_of(uri)]


def _remove(path: Path) -> None:
    # A process that still searches in it keeps it: the system frees the file when the last one closes it.
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise


class IndexReport(NamedTuple):
    """What an approximate index finds.

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


def index_recall(store: Store, *, sample: int, k: int, seed: int = 0) -> IndexReport:
    """Compare the approximate index of a table with exact search.

    Args:
        store: a table with an index.
        sample: number of stored vectors that are searched for.
        k: neighbours of each that are compared.
        seed: of the choice of vectors.
    """
    ids = store.scan(["id"]).column(ROW_ID).to_numpy()
    chosen = ids[np.sort(np.random.default_rng(seed).choice(len(ids), min(sample, len(ids)), replace=False))]
    queries = matrix_of(store.take(chosen, ["vector"]).column("vector"))

    def others(rows: NDArray[np.uint64], own: int) -> set[int]:
        return set([row for row in rows.tolist() if row != own][:k])

    pairs = zip(queries, exact_neighbours(store, queries, k + 1), chosen.tolist(), strict=True)
    shares = [
        len(others(store.nearest(query, k + 1).row_ids, own) & others(exact, own)) / k for query, exact, own in pairs
    ]
    return IndexReport(len(ids), len(chosen), k, float(np.mean(shares)), min(shares))


def exact_neighbours(store: Store, queries: NDArray[np.float32], k: int) -> NDArray[np.uint64]:
    """Find the nearest rows by reading the table once, in batches, so it may be larger than memory.

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
