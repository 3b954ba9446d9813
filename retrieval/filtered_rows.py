"""Which rows of a table fit a filter; the answers to the last few filters are kept."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from retrieval.store import ROW_ID, Store

Where = str | NDArray[np.int64]
"""Which pictures may be found: a filter as a user writes it, empty for all, or their places in the gallery's order."""

_KEPT = 8
"""Filters whose rows are remembered: those who leaf through results ask with the same one again and again."""


class FilteredRows:
    """Rows of one table by filter.

    Args:
        store: the table.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._found: dict[tuple[str, str], NDArray[np.uint64]] = {}
        self._lock = threading.Lock()

    def row_ids(self, condition: str) -> NDArray[np.uint64]:
        """Row ids ``(n,)`` in the order of the table.

        Args:
            condition: as ``filters.checked_filter`` returns it, empty for all.

        Raises:
            UserError: where a file of the table is damaged or gone.
        """
        key = (self._store.revision, condition)
        with self._lock:
            found = self._found.pop(key, None)
        if found is None:
            found = self._store.scan(["id"], condition).column(ROW_ID).to_numpy()
        with self._lock:
            # Put back as the newest; the oldest goes.
            self._found[key] = found
            while len(self._found) > _KEPT:
                del self._found[next(iter(self._found))]
        return found

    def places(self, condition: str) -> NDArray[np.int64]:
        """Places ``(n,)`` of the rows in the order of the table, ascending.

        Args:
            condition: see ``row_ids``.

        Raises:
            UserError: as ``row_ids``.
        """
        if not condition:
            return np.arange(len(self._store))
        everything = self.row_ids("")
        order = np.argsort(everything, kind="stable")
        return np.sort(order[np.searchsorted(everything, self.row_ids(condition), sorter=order)])
