"""One table of a gallery: Arrow columns in versioned files of LanceDB, in a folder or at an object store's URI.

An object store's credentials come from the environment, as LanceDB reads them (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL``, ``GOOGLE_SERVICE_ACCOUNT``, ``AZURE_STORAGE_ACCOUNT_NAME`` …).
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrieval.filters import IN_ONE_CONDITION, one_of
from vitrail.errors import DISK_FULL, UserError, refuse_passwords
from vitrail.files import current_keys, local_folder

if TYPE_CHECKING:
    import pyarrow as pa


ROW_ID = "_rowid"
"""Column that names a row within one revision of a table; uint64."""

MADE_KEY = b"vitrail.made"
"""Key of the schema's metadata with a random name of the table, which distinguishes two tables made at one place."""

KEPT = timedelta(days=1)
"""How long a replaced revision stays on disk for processes that still read it."""

SMALL_FILES = 16
"""Number of files from which on they are joined: each costs a read when the table is scanned."""

BATCH_ROWS = 8192
"""Rows that are read at a time where not all are needed at once."""

N_PROBES, REFINE_FACTOR = 40, 20
"""Cells of the index that a search looks into, and how many times ``k`` rows are compared by their full vectors.

Of 100,000 vectors of 128 numbers in 500 clusters, recall@10 was 0.28 by the index's short codes alone, 0.75 with a
factor of 5 and 1.0 with these, at 8 to 11 ms a query."""


class Neighbours(NamedTuple):
    """Rows nearest to one query, best first.

    Attributes:
        row_ids: uint64 ``(k,)``.
        scores: float32 ``(k,)``, cosines.
    """

    row_ids: NDArray[np.uint64]
    scores: NDArray[np.float32]


class Store:
    """A table whose rows have an ``id`` and a vector of unit length.

    A reader keeps the revision that was there when it opened the table. Every change is one commit: after a kill it is
    there completely or not at all. Conditions are SQL as ``filters.checked_filter`` returns it. All methods raise
    ``UserError`` where files are damaged, missing or out of reach; those that change the table also for a second
    writer, a full disk, and a place that cannot be written.

    Attributes:
        origin: where the table is, for messages.
    """

    def __init__(self, uri: str, name: str, table: Any) -> None:
        self.origin = f"{uri}: table {name!r}"
        self._uri = uri
        self._name = name
        self._table = table

    @classmethod
    def open(cls, uri: str, name: str) -> Store | None:
        """Open the newest revision of the table ``name`` of the gallery ``uri``; None where there is none."""
        folder = local_folder(uri)
        if folder is not None and not (folder / f"{name}.lance").is_dir():
            return None  # connecting would make the folder
        with _one_line_errors(f"{uri}: table {name!r}"):
            table = _open_table(uri, name)
            if table is not None:
                return cls(uri, name, table)
            # A kill between making the folder and the first commit leaves no file of rows; rows without a list of
            # revisions are a damaged table, which must not be overwritten.
            if folder is not None and any((folder / f"{name}.lance").glob("data/*")):
                raise UserError(
                    f"{uri}: table {name!r} has rows but its list of revisions is gone; restore the gallery from a "
                    "copy, or index again into a new one"
                )
        return None

    @classmethod
    def create(cls, uri: str, name: str, schema: pa.Schema, *, replace: bool = False) -> Store:
        """Make an empty table; one of this name is an error unless ``replace``."""
        mode = "overwrite" if replace else "create"
        schema = schema.with_metadata({**(schema.metadata or {}), MADE_KEY: uuid.uuid4().hex[:12].encode()})
        with _one_line_errors(f"{uri}: table {name!r}", writing=True):
            return cls(uri, name, _connected(uri).create_table(name, schema=schema, mode=mode))

    @property
    def schema(self) -> pa.Schema:
        """Columns, with the metadata that the table was made with."""
        return self._table.schema

    @property
    def revision(self) -> str:
        """A name that changes with every change of the table; valid as part of a file name."""
        made = current_keys(self.schema.metadata).get(MADE_KEY, b"").decode()
        return f"{made}-v{self._table.version}"

    def __len__(self) -> int:
        with _one_line_errors(self.origin):
            return int(self._table.count_rows())

    def refresh(self) -> None:
        """Move to the newest revision."""
        with _one_line_errors(self.origin):
            self._table.checkout_latest()

    def scan(self, columns: Sequence[str], where: str = "") -> pa.Table:
        """Return rows in the order in which they were written; ``ROW_ID`` is the last column."""
        with _one_line_errors(self.origin):
            found = self._scan(columns, where).to_arrow()
        return found.select([*columns, ROW_ID]).replace_schema_metadata(None)

    def row_ids(self) -> NDArray[np.uint64]:
        """Return the ids of all rows ``(N,)``, in order."""
        with _one_line_errors(self.origin):
            found: NDArray[np.uint64] = self._scan([ROW_ID]).to_arrow().column(ROW_ID).to_numpy()
            return found

    def vectors(self, start: int = 0) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint64]]]:
        """Yield vectors, float32 ``(n, D)``, with their row ids ``(n,)``, in order, ``BATCH_ROWS`` at a time.

        Args:
            start: number of rows before the first one.
        """
        with _one_line_errors(self.origin):
            scan = self._scan(["vector"])
            for batch in (scan.offset(start) if start else scan).to_batches(batch_size=BATCH_ROWS):
                yield matrix_of(batch.column("vector")), batch.column(ROW_ID).to_numpy()

    def take(self, row_ids: NDArray[np.uint64], columns: Sequence[str]) -> pa.Table:
        """Return rows in the order of ``row_ids``."""
        with _one_line_errors(self.origin):
            found = self._table.take_row_ids(row_ids.tolist()).select(list(columns)).with_row_id().to_arrow()
        # LanceDB returns them in an order of its own.
        known = found.column(ROW_ID).to_numpy()
        order = np.argsort(known, kind="stable")
        return found.take(order[np.searchsorted(known, row_ids, sorter=order)]).select(list(columns))

    def append(self, rows: pa.Table) -> None:
        """Add rows at the end; the caller knows that their ids are new."""
        if rows.num_rows:
            self._commit(lambda: self._table.add(rows))

    def replace(self, rows: pa.Table) -> None:
        """Replace the rows with the same ids, all of which must be there; the new rows are then at the end."""
        if rows.num_rows:
            # New ids must not be among them: LanceDB then writes the rows in any order.
            self._commit(lambda: self._table.merge_insert("id").when_matched_update_all().execute(rows))

    def delete(self, column: str, values: Sequence[str]) -> None:
        """Remove the rows whose ``column`` has one of the values; many values in several commits."""
        for start in range(0, len(values), IN_ONE_CONDITION):
            condition = one_of(column, values[start : start + IN_ONE_CONDITION])
            self._commit(partial(self._table.delete, condition))

    def rename_column(self, former: str, name: str) -> None:
        """Rename a column without rewriting its values."""
        self._commit(lambda: self._table.alter_columns({"path": former, "rename": name}))

    def tidy(self) -> None:
        """Join small files, add new rows to the index, and remove revisions older than a day."""
        with _one_line_errors(self.origin, writing=True):
            self._refuse_second_writer()
            if self._table.stats()["fragment_stats"]["num_small_fragments"] > SMALL_FILES or self.has_index():
                self._table.optimize(cleanup_older_than=KEPT)

    def has_index(self) -> bool:
        """Whether the table has an approximate index of its vectors."""
        with _one_line_errors(self.origin):
            return any("vector" in index.columns for index in self._table.list_indices())

    def build_index(self) -> None:
        """Build an approximate index, IVF-PQ, or build it again.

        Cells and codes of some dozens of bytes a row are little to read, which is what counts where the table is at an
        object store; a graph (HNSW) needs fewer comparisons for the same recall, but its links must be in memory. What
        the short codes lose is regained by comparing the full vectors of the best ``REFINE_FACTOR * k``.
        """
        from lancedb.index import IvfPq

        size = self.schema.field("vector").type.list_size
        # LanceDB's default is sixteen dimensions a byte; eight lose less. The number must divide the length.
        parts = next(parts for parts in range(max(1, size // 8), 0, -1) if size % parts == 0)
        with _one_line_errors(self.origin, writing=True):
            self._refuse_second_writer()
            settings = IvfPq(distance_type="cosine", num_sub_vectors=parts)
            self._table.create_index("vector", config=settings, replace=True)

    def nearest(self, query: NDArray[np.float32], k: int, where: str = "") -> Neighbours:
        """Return the nearest rows by the approximate index; rows that are not in it yet are compared one by one.

        Args:
            query: float32 ``(D,)``, of unit length.
            k: number of rows.
            where: condition that the rows meet; it is applied before the ``k`` are chosen.
        """
        with _one_line_errors(self.origin):
            search = self._table.search(query, vector_column_name="vector").distance_type("cosine").limit(k)
            search = search.nprobes(N_PROBES).refine_factor(REFINE_FACTOR).select(["id", "_distance"])
            if where:
                search = search.where(where, prefilter=True)
            found = search.with_row_id(True).to_arrow()
        scores = 1 - found.column("_distance").to_numpy()
        return Neighbours(found.column(ROW_ID).to_numpy(), scores.astype(np.float32))

    def _scan(self, columns: Sequence[str], where: str = "") -> Any:
        search = self._table.search().select(list(columns)).with_row_id(True)
        return search.where(where) if where else search

    def _commit(self, change: Callable[[], object]) -> None:
        """Make one change, on top of the revision that this table was read at."""
        with _one_line_errors(self.origin, writing=True):
            self._refuse_second_writer()
            before = self._table.version
            change()
            if self._table.version > before + 1:
                raise UserError(_second_writer(self.origin))

    def _refuse_second_writer(self) -> None:
        """LanceDB itself would let two writers append rows with the same id."""
        newest = _open_table(self._uri, self._name)
        if newest is None or newest.version != self._table.version:
            raise UserError(_second_writer(self.origin))


def matrix_of(column: Any) -> NDArray[np.float32]:
    """Return the vectors of an Arrow column as float32 ``(n, D)``; without a copy where the column is in one piece."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # combining no chunks at all
        return np.zeros((0, column.type.list_size), np.float32)
    size: int = column.type.list_size
    values: NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, size)


def _connected(uri: str) -> Any:
    # Its warnings are about the inside of an index, such as cells without rows; errors are raised.
    os.environ.setdefault("LANCEDB_LOG", "error")
    import lancedb

    folder = local_folder(uri)
    if folder is not None:
        return lancedb.connect(str(folder))
    refuse_passwords(uri, "gallery")
    # An endpoint without TLS, such as a MinIO server's, needs an option of its own.
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
    return lancedb.connect(uri, storage_options={"allow_http": "true"} if endpoint.startswith("http://") else None)


def _open_table(uri: str, name: str) -> Any:
    """The newest revision of a table; None where there is none."""
    try:
        return _connected(uri).open_table(name)
    except ValueError as error:
        if "was not found" in str(error):
            return None
        raise


@contextmanager
def _one_line_errors(origin: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what LanceDB raises into one line: which table, what is wrong, and the fix."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # A cut file can make the library panic; that class is of its own module and no Exception.
        if not isinstance(error, RuntimeError | ValueError | OSError) and type(error).__name__ != "PanicException":
            raise
        # Without the place in the library's source.
        first = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("lance error: ")
        reason = re.sub(r", /\S*\.rs:\d+:\d+.*$", "", first)
        if problem := _object_store_problem(str(error)):
            line = f"{origin}: {problem}"
        elif not writing:
            line = f"{origin} cannot be read ({reason}); restore it from a copy, or index into a new one"
        else:
            line = _writing_failed(origin, reason)
        raise UserError(line) from error


def _object_store_problem(text: str) -> str:
    """What an object store answered, and a fix; empty where it is not about that. The library prints its structures."""
    code = re.search(r"<Code>(\w+)</Code>", text)
    if "credentials" in text:
        return "no credentials for the object store; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or log in"
    if code and code[1] == "NoSuchBucket":
        return "there is no such bucket (NoSuchBucket); make it, or correct the address"
    if refused := re.search(r"status: (40[13])\b", text):
        return f"the object store refuses access ({code[1] if code else refused[1]}); check credentials and rights"
    if re.search(r"kind: (Connect|Timeout)\b|BadScheme", text):
        return "the object store cannot be reached; check the network, AWS_ENDPOINT_URL and AWS_DEFAULT_REGION"
    return ""


def _writing_failed(origin: str, reason: str) -> str:
    number = re.search(r"os error (\d+)", reason)
    if number and int(number[1]) in DISK_FULL:
        return f"{origin} cannot be written ({reason}); free some space; what was there is untouched"
    if "conflict" in reason.lower() or "concurrent" in reason.lower():
        return _second_writer(origin)
    if "already exists" in reason:
        return f"{origin} exists already; name a new gallery"
    return f"{origin} cannot be written ({reason}); what was there is untouched"


def _second_writer(origin: str) -> str:
    return (
        f"{origin}: another process has written to it meanwhile; wait until it is done, then run the same command "
        "again: what it wrote is complete, and only what is missing is added"
    )
