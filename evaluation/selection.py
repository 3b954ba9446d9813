"""A pool of unlabelled pictures, ranked, and the table in which they are labelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from evaluation.active_learning import Ranked, k_centre_greedy, most_uncertain
from vitrail.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Pool:
    """What may be labelled: N pictures.

    Attributes:
        names: object ``(N,)`` of strings.
        paths: object ``(N,)`` of strings, empty where a picture is no file.
        vectors: ``(N, D)``, of unit length.
        probability: float64 ``(N, C)``; None where a gallery kept only the best class's.
        classes: names of the C classes; None where the model predicts none.
        predicted: object ``(N,)`` of strings, the class that is predicted, and
        confidence: float64 ``(N,)``, with which probability; None where the model predicts none.
        covered: ``(M, D)``, vectors of labelled pictures.
    """

    names: NDArray[np.object_]
    paths: NDArray[np.object_]
    vectors: NDArray[np.float32]
    probability: NDArray[np.float64] | None
    predicted: NDArray[np.object_] | None
    confidence: NDArray[np.float64] | None
    covered: NDArray[np.float32]


def ranking(pool: Pool, by: str, n: int) -> Ranked:
    """The pictures to label, the most wanted first.

    Args:
        pool: to choose from.
        by: one of ``active_learning.STRATEGIES``.
        n: at most so many.

    Raises:
        UserError: where the pool does not have what the strategy needs.
    """
    if by == "coreset":
        return k_centre_greedy(pool.vectors, n, pool.covered)
    if by == "confidence" and pool.confidence is not None:
        rows = np.argsort(pool.confidence, kind="stable")[:n].astype(np.int64)
        return Ranked(rows, 1 - pool.confidence[rows])
    if pool.probability is None:
        has = "the best class's probability only" if pool.confidence is not None else "no probabilities"
        raise UserError(
            f"--by {by}: needs the probability of every class, and this pool has {has}; name the pictures themselves "
            f"as --pool, or take {'confidence or ' if pool.confidence is not None else ''}coreset"
        )
    return most_uncertain(pool.probability, cast("Any", by), n)


def to_label(pool: Pool, ranked: Ranked, task: str) -> pd.DataFrame:
    """What is written: rank, name, path, score, what the model says, and an empty column for the label."""
    import pandas as pd

    rows = ranked.rows
    columns: dict[str, Any] = {
        "rank": np.arange(1, len(rows) + 1),
        "name": pool.names[rows],
        "path": pool.paths[rows],
        "score": ranked.scores.round(6),
    }
    if pool.predicted is not None and pool.confidence is not None:
        columns |= {"predicted": pool.predicted[rows], "confidence": pool.confidence[rows].round(4)}
    return pd.DataFrame({**columns, task: ""})
