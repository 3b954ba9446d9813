"""Reciprocal-rank fusion: one ranking out of several whose scores do not compare.

Cormack, Clarke & Büttcher, Reciprocal rank fusion outperforms Condorcet and individual rank learning methods, SIGIR
2009: an item's score is the sum over rankings of 1 / (k + rank), with k = 60 and ranks from 1. An item that a ranking
does not hold gets nothing from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SMOOTHING = 60
"""The k of the paper: how little the first ranks stand out."""


def reciprocal_rank_fusion(
    rankings: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]], smoothing: int = SMOOTHING
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Fuse rankings.

    Items of a ranking with equal scores share the mean of their ranks, so that a ranking that cannot tell them apart
    does not order them by accident.

    Args:
        rankings: of each the items, distinct int64 ``(n,)``, and their scores, float32 ``(n,)``; higher is better.
        smoothing: the k of the formula.

    Returns:
        Items that any ranking holds, int64 ``(m,)``, best first, equal ones in ascending order, and their scores,
        float64 ``(m,)``.
    """
    items = np.concatenate([np.asarray(found, dtype=np.int64) for found, _ in rankings] or [np.zeros(0, np.int64)])
    shares = [1 / (smoothing + _mean_ranks(scores)) for _, scores in rankings]
    distinct, place = np.unique(items, return_inverse=True)
    # Summed in the order of the rankings, so the result is the same on every machine.
    sums = np.zeros(len(distinct))
    np.add.at(sums, place, np.concatenate(shares or [np.zeros(0)]))
    order = np.argsort(-sums, kind="stable")
    return distinct[order], sums[order]


def _mean_ranks(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Ranks from 1, highest score first; equal scores share the mean of theirs."""
    _, place, counts = np.unique(-np.asarray(scores), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: NDArray[np.float64] = (last - (counts - 1) / 2)[place]
    return mean
