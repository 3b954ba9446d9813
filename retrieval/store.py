"""What a gallery needs of a table that holds rows with an ``id`` and a vector of unit length.

``LanceStore`` is the one that there is. A server such as Milvus or Qdrant is one more file with a class of these
methods, and one more scheme of URIs in ``open_store`` and ``create_store``; galleries, rankers, filters and command
lines stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

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
    from retrieval.lance_store import LanceStore

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
    from retrieval.lance_store import LanceStore

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
