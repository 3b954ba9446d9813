"""The vectors of a table as one memory-mapped matrix: a derived file that can be made again at any time.

It is named by the table's revision, so it never answers for another one. It stands in the gallery's folder, or where
that cannot be written or is at an object store, under ``$VITRINE_CACHE/galleries``.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval.exact import ExactIndex
from retrieval.gallery_writer import UNIT_TOLERANCE
from retrieval.scan import integer_products
from retrieval.store import Neighbours, Store
from retrieval.vector_file import DamagedError, VectorFile, open_vectors, tell_damage, write_vectors
from vitrail.errors import UserError
from vitrail.files import local_folder

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
            f"{refused}: the vectors can be kept nowhere; set $VITRINE_CACHE to a folder that can be written"
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
    """A gallery's folder under ``$VITRINE_CACHE``, for what belongs to this machine."""
    local = local_folder(uri)
    name = str(local.resolve()) if local is not None else uri.rstrip("/")
    cache = Path(os.environ.get("VITRINE_CACHE") or "~/.cache/vitrine").expanduser()
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
