"""What a gallery needs of a table that holds rows with an ``id`` and a vector of unit length.

``LanceStore`` is the one that there is. A server such as Milvus or Qdrant is one more file with a class of these
methods, and one more scheme of URIs in ``open_store`` and ``create_store``; galleries, rankers, filters and command
lines stay as they are.

A table of LanceDB: Arrow columns in versioned files, in a folder or at an object store's URI.

An object store's credentials come from the environment, as LanceDB reads them (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT``, ``GOOGLE_SERVICE_ACCOUNT``, ``AZURE_STORAGE_ACCOUNT_NAME`` …).

What LanceDB raises, as one line for people: which table, what is wrong, the fix.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from retrieval.filters import IN_ONE_CONDITION, one_of
from vitrail.errors import DISK_FULL, UserError
from vitrail.files import current_keys, local_folder

if TYPE_CHECKING:
    import pyarrow as pa


ROW_ID = "_rowid"
"""Column that names a row within one revision of a table; uint64."""


class Neighbours(NamedTuple):
    """Rows near to one query, best first.

    Attributes:
        row_ids: uint64 ``(k,)``.
        scores: float32 ``(k,)``, cosines.
    """

    row_ids: NDArray[np.uint64]
    scores: NDArray[np.float32]


class Store(Protocol):
    """One table. Whoever reads it goes on with the revision that was there when it was opened.

    Every change is one commit: after a kill it is there whole or not at all. Where a commit of somebody else came
    between, the change raises ``UserError``. Conditions are SQL as ``filters.checked_filter`` returns it.

    Attributes:
        origin: where the table is, for messages.
    """

    origin: str

    @property
    def schema(self) -> pa.Schema:
        """Columns, with the metadata that the table was made with."""

    @property
    def revision(self) -> str:
        """A name that changes with every change of the table; a file's name may contain it."""

    def __len__(self) -> int:
        """Number of rows."""

    def refresh(self) -> None:
        """Goes on with the newest revision."""

    def scan(self, columns: Sequence[str], where: str = "") -> pa.Table:
        """Rows in the order in which they were written; ``ROW_ID`` is the last column."""

    def vectors(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint64]]]:
        """All vectors in the order of the rows, some thousands at a time: float32 ``(n, D)``, and row ids ``(n,)``."""

    def take(self, row_ids: NDArray[np.uint64], columns: Sequence[str]) -> pa.Table:
        """Rows in the order of ``row_ids``."""

    def append(self, rows: pa.Table) -> None:
        """Adds rows at the end; the caller knows that their ids are new."""

    def replace(self, rows: pa.Table) -> None:
        """Puts rows in the place of those with the same ids, all of which are there; they then stand at the end."""

    def delete(self, column: str, values: Sequence[str]) -> None:
        """Removes the rows whose ``column`` has one of the values."""

    def rename_column(self, former: str, name: str) -> None:
        """Rename a column."""

    def tidy(self) -> None:
        """Joins small files, brings the index up to date, and lets old revisions go that nobody reads any more."""

    def has_index(self) -> bool:
        """Whether the table has an approximate index of its vectors."""

    def build_index(self) -> None:
        """Builds the approximate index of the vectors, or builds it anew."""

    def nearest(self, query: NDArray[np.float32], k: int, where: str = "") -> Neighbours:
        """Nearest rows by the approximate index; rows that it does not know yet are compared one by one.

        Args:
            query: float32 ``(D,)``, of unit length.
            k: number of rows.
            where: condition that the rows meet; it holds before the ``k`` are chosen.
        """


def open_store(uri: str, name: str) -> Store | None:
    """Opens the newest revision of a gallery's table; None where there is none.

    Args:
        uri: of the gallery.
        name: of the table.

    Raises:
        UserError: where it is damaged or cannot be reached.
    """
    return LanceStore.open(uri, name)


def create_store(uri: str, name: str, schema: pa.Schema, *, replace: bool = False) -> Store:
    """Makes an empty table of a gallery.

    Args:
        uri: of the gallery.
        name: of the table.
        schema: its columns.
        replace: whether a table that is there goes; else that is an error.

    Raises:
        UserError: where there is one already, or it cannot be written.
    """
    return LanceStore.create(uri, name, schema, replace=replace)


def matrix_of(column: Any) -> NDArray[np.float32]:
    """Vectors of an Arrow column as float32 ``(n, D)``; without a copy where the column is in one piece."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # combining no chunks at all
        return np.zeros((0, column.type.list_size), np.float32)
    size: int = column.type.list_size
    values: NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, size)


def second_writer(origin: str) -> str:
    """What to tell who writes at the same time as somebody else."""
    return (
        f"{origin} was written by somebody else meanwhile; wait until the other one is done, then run the same command "
        "again: what is there is whole, and only what is missing is done"
    )


@contextmanager
def reading(origin: str) -> Iterator[None]:
    """Turns what LanceDB raises when it reads into one line."""
    with _told(lambda reason: f"{origin} cannot be read ({reason}); restore it from a copy, or index into a new one"):
        yield


@contextmanager
def writing(origin: str) -> Iterator[None]:
    """Turns what LanceDB raises when it writes into one line."""

    def line(reason: str) -> str:
        number = re.search(r"os error (\d+)", reason)
        if number and int(number[1]) in DISK_FULL:
            return f"{origin} cannot be written ({reason}); free some space; what was there is untouched"
        if "conflict" in reason.lower() or "concurrent" in reason.lower():
            return second_writer(origin)
        if "already exists" in reason:
            return f"{origin} is there already; name a new gallery"
        return f"{origin} cannot be written ({reason}); what was there is untouched"

    with _told(line):
        yield


@contextmanager
def _told(line: Callable[[str], str]) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(line(_reason(error))) from error
    except BaseException as error:
        # A cut file can make the library panic; that class is of its own module and no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(line(_reason(error))) from error


def _reason(error: BaseException) -> str:
    """First line of an error, without the place in the library's source."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("lance error: ")
    return re.sub(r", /\S*\.rs:\d+:\d+.*$", "", first)


MADE_KEY = b"vitrail.made"
"""Key of the schema's metadata with a name of the table's own, so that two tables of one place cannot be confused."""

KEPT = timedelta(days=1)
"""How long a replaced revision stays on disk for those who still read it."""

SMALL_FILES = 16
"""Number of files from which on they are joined: each costs a read when the table is scanned."""

BATCH_ROWS = 8192
"""Rows that are read at a time where not all are needed at once."""

N_PROBES, REFINE_FACTOR = 40, 20
"""Cells of the index that a search looks into, and how many times ``k`` rows are compared by their whole vectors.

Of 100,000 vectors of 128 numbers in 500 heaps, recall@10 was 0.28 by the index's short codes alone, 0.75 with a factor
of 5 and 1.0 with these, at 8 to 11 ms a query."""


class LanceStore:
    """One table of a LanceDB database; see ``Store``."""

    def __init__(self, uri: str, name: str, table: Any) -> None:
        self.origin = f"{uri}: table {name!r}"
        self._uri = uri
        self._name = name
        self._table = table

    @classmethod
    def open(cls, uri: str, name: str) -> LanceStore | None:
        """Opens the newest revision of a table; None where there is none.

        Raises:
            UserError: where its files are damaged or cannot be reached.
        """
        folder = local_folder(uri)
        if folder is not None and not (folder / f"{name}.lance").is_dir():
            return None  # connecting would make the folder
        with reading(f"{uri}: table {name!r}"):
            table = _open_table(uri, name)
            if table is not None:
                return cls(uri, name, table)
            # A kill between making the folder and the first commit leaves no file of rows; rows without a list of
            # revisions are a damaged table, which nobody may write over.
            if folder is not None and any((folder / f"{name}.lance").glob("data/*")):
                raise UserError(
                    f"{uri}: table {name!r} has rows but its list of revisions is gone; restore the gallery from a "
                    "copy, or index again into a new one"
                )
        return None

    @classmethod
    def create(cls, uri: str, name: str, schema: pa.Schema, *, replace: bool = False) -> LanceStore:
        """Makes an empty table.

        Args:
            uri: of the gallery.
            name: of the table.
            schema: its columns.
            replace: whether a table that is there goes; else that is an error.

        Raises:
            UserError: where there is one already, or it cannot be written.
        """
        mode = "overwrite" if replace else "create"
        schema = schema.with_metadata({**(schema.metadata or {}), MADE_KEY: uuid.uuid4().hex[:12].encode()})
        with writing(f"{uri}: table {name!r}"):
            return cls(uri, name, _connected(uri).create_table(name, schema=schema, mode=mode))

    @property
    def schema(self) -> pa.Schema:
        """Columns, with the metadata that the table was made with."""
        return self._table.schema

    @property
    def revision(self) -> str:
        """The table's own name and the number of its version."""
        made = current_keys(self.schema.metadata).get(MADE_KEY, b"").decode()
        return f"{made}-v{self._table.version}"

    def __len__(self) -> int:
        with reading(self.origin):
            return int(self._table.count_rows())

    def refresh(self) -> None:
        """Goes on with the newest revision.

        Raises:
            UserError: where its files are damaged or cannot be reached.
        """
        with reading(self.origin):
            self._table.checkout_latest()

    def scan(self, columns: Sequence[str], where: str = "") -> pa.Table:
        """Rows in the order in which they were written; ``ROW_ID`` is the last column.

        Raises:
            UserError: where a file of the table is damaged or gone.
        """
        with reading(self.origin):
            found = self._scan_of(columns, where).to_arrow()
        return found.select([*columns, ROW_ID]).replace_schema_metadata(None)

    def vectors(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint64]]]:
        """All vectors in the order of the rows, some thousands at a time.

        Raises:
            UserError: where a file of the table is damaged or gone.
        """
        with reading(self.origin):
            for batch in self._scan_of(["vector"]).to_batches(batch_size=BATCH_ROWS):
                yield matrix_of(batch.column("vector")), batch.column(ROW_ID).to_numpy()

    def take(self, row_ids: NDArray[np.uint64], columns: Sequence[str]) -> pa.Table:
        """Rows in the order of ``row_ids``.

        Raises:
            UserError: where a file of the table is damaged or gone.
        """
        with reading(self.origin):
            found = self._table.take_row_ids(row_ids.tolist()).select(list(columns)).with_row_id().to_arrow()
        # LanceDB answers in an order of its own.
        known = found.column(ROW_ID).to_numpy()
        order = np.argsort(known, kind="stable")
        return found.take(order[np.searchsorted(known, row_ids, sorter=order)]).select(list(columns))

    def append(self, rows: pa.Table) -> None:
        """Adds rows at the end.

        Raises:
            UserError: for a second writer, a full disk, or a place that cannot be written.
        """
        if rows.num_rows:
            self._commit(lambda: self._table.add(rows))

    def replace(self, rows: pa.Table) -> None:
        """Puts rows in the place of those with the same ids.

        Raises:
            UserError: for a second writer, a full disk, or a place that cannot be written.
        """
        if rows.num_rows:
            # New ids must not be among them: LanceDB then writes the rows in any order.
            self._commit(lambda: self._table.merge_insert("id").when_matched_update_all().execute(rows))

    def delete(self, column: str, values: Sequence[str]) -> None:
        """Removes the rows whose ``column`` has one of the values; many in several commits.

        Raises:
            UserError: for a second writer, a full disk, or a place that cannot be written.
        """
        for start in range(0, len(values), IN_ONE_CONDITION):
            condition = one_of(column, values[start : start + IN_ONE_CONDITION])
            self._commit(partial(self._table.delete, condition))

    def rename_column(self, former: str, name: str) -> None:
        """Rename a column without rewriting its values.

        Raises:
            UserError: for a second writer, a full disk, or a place that cannot be written.
        """
        self._commit(lambda: self._table.alter_columns({"path": former, "rename": name}))

    def tidy(self) -> None:
        """Joins small files, adds new rows to the index, and removes revisions older than a day.

        Raises:
            UserError: for a second writer, a full disk, or a place that cannot be written.
        """
        with writing(self.origin):
            self._refuse_second_writer()
            if self._table.stats()["fragment_stats"]["num_small_fragments"] > SMALL_FILES or self.has_index():
                self._table.optimize(cleanup_older_than=KEPT)

    def has_index(self) -> bool:
        """Whether the table has an approximate index of its vectors."""
        with reading(self.origin):
            return any("vector" in index.columns for index in self._table.list_indices())

    def build_index(self) -> None:
        """Builds an IVF-PQ index.

        Cells and codes of some dozens of bytes a row are little to read, which is what counts where the table is at an
        object store; a graph (HNSW) would find as much with fewer comparisons, but its links must be in memory. What
        the short codes lose is won back by comparing the whole vectors of the best ``REFINE_FACTOR * k``.

        Raises:
            UserError: for a full disk, or a place that cannot be written.
        """
        from lancedb.index import IvfPq

        size = self.schema.field("vector").type.list_size
        # Sixteen dimensions to a byte would be LanceDB's choice; eight lose less. The number must divide the length.
        parts = next(parts for parts in range(max(1, size // 8), 0, -1) if size % parts == 0)
        with writing(self.origin):
            self._refuse_second_writer()
            settings = IvfPq(distance_type="cosine", num_sub_vectors=parts)
            self._table.create_index("vector", config=settings, replace=True)

    def nearest(self, query: NDArray[np.float32], k: int, where: str = "") -> Neighbours:
        """Nearest rows by the approximate index, and by comparison of those that it does not have yet.

        Raises:
            UserError: where a file of the table is damaged or gone.
        """
        with reading(self.origin):
            search = self._table.search(query, vector_column_name="vector").distance_type("cosine").limit(k)
            search = search.nprobes(N_PROBES).refine_factor(REFINE_FACTOR).select(["id", "_distance"])
            if where:
                search = search.where(where, prefilter=True)
            found = search.with_row_id(True).to_arrow()
        scores = 1 - found.column("_distance").to_numpy()
        return Neighbours(found.column(ROW_ID).to_numpy(), scores.astype(np.float32))

    def _scan_of(self, columns: Sequence[str], where: str = "") -> Any:
        search = self._table.search().select(list(columns)).with_row_id(True)
        return search.where(where) if where else search

    def _commit(self, change: Callable[[], object]) -> None:
        """Makes one change, on top of the revision that this table was read at."""
        with writing(self.origin):
            self._refuse_second_writer()
            before = self._table.version
            change()
            if self._table.version > before + 1:
                raise UserError(second_writer(self.origin))

    def _refuse_second_writer(self) -> None:
        """LanceDB itself would let two writers append rows with the same id."""
        newest = _open_table(self._uri, self._name)
        if newest is None or newest.version != self._table.version:
            raise UserError(second_writer(self.origin))


def _connected(uri: str) -> Any:
    # Its warnings are about the inside of an index, such as cells without rows; errors are raised.
    os.environ.setdefault("LANCEDB_LOG", "error")
    import lancedb

    folder = local_folder(uri)
    return lancedb.connect(str(folder) if folder is not None else uri)


def _open_table(uri: str, name: str) -> Any:
    """The newest revision of a table; None where there is none."""
    try:
        return _connected(uri).open_table(name)
    except ValueError as error:
        if "was not found" in str(error):
            return None
        raise
