"""The approximate index of a gallery that has outgrown exact search, and what it misses of the exact answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retrieval.exact import ExactIndex
from retrieval.store import ROW_ID, Store, matrix_of
from vitrail.errors import UserError

SMALLEST = 1000
"""Pictures below which an index cannot be trained, and would gain nothing."""


@dataclass(frozen=True)
class IndexReport:
    """What an index finds.

    Attributes:
        rows: pictures in the gallery.
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
            f"{uri}: has {len(store)} pictures; an index needs {SMALLEST:,}, and exact search of so few is faster"
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
