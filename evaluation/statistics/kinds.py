"""Scores of multi-label, ordinal and regression tasks as functions of sample weights (see ``intervals.Statistic``)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.intervals import Statistic
from vitrail.types import UNKNOWN


def mean_average_precision(targets: NDArray[Any], probabilities: NDArray[np.float64]) -> Statistic:
    """Return the mean average precision over labels, scikit-learn's ``average_precision_score``; higher is better.

    Labels that apply to no sample, or to none of a resample, are left out of the mean.

    Args:
        targets: ``(N, C)``, 1, 0, or ``UNKNOWN`` for entries that are left out.
        probabilities: ``(N, C)``.
    """
    ranked = []
    for label in range(targets.shape[1]):
        known = np.flatnonzero(targets[:, label] != UNKNOWN)
        order = known[np.argsort(-probabilities[known, label], kind="stable")]
        scores, applies = probabilities[order, label], (targets[order, label] == 1).astype(np.float64)
        if applies.any():
            # Samples with the same probability are found together.
            ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
            ranked.append((order, applies, ends))

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total, count = np.zeros(len(weights)), np.zeros(len(weights))
        for order, applies, ends in ranked:
            own = weights[:, order]
            found, hits = own.cumsum(axis=1)[:, ends], (own * applies).cumsum(axis=1)[:, ends]
            precision = np.divide(hits, found, out=np.zeros_like(hits), where=found > 0)
            steps = np.diff(hits, axis=1, prepend=0.0)
            support = hits[:, -1]
            total += np.divide((precision * steps).sum(axis=1), support, out=np.zeros_like(support), where=support > 0)
            count += support > 0
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)

    return statistic


def micro_f1(targets: NDArray[Any], predicted: NDArray[np.bool_]) -> Statistic:
    """Return F1 over all known entries of multi-label targets ``(N, C)``; higher is better."""
    known, applies = targets != UNKNOWN, targets == 1
    hits = (predicted & applies).sum(axis=1).astype(np.float64)
    marked = ((predicted & known).sum(axis=1) + applies.sum(axis=1)).astype(np.float64)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = weights @ marked
        values: NDArray[np.float64] = np.divide(2 * (weights @ hits), total, out=np.zeros_like(total), where=total > 0)
        return values

    return statistic


def mean_error(errors: NDArray[np.float64]) -> Statistic:
    """Return the mean of absolute errors ``(N,)``; lower is better."""

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        values: NDArray[np.float64] = weights @ np.abs(errors) / weights.sum(axis=1)
        return values

    return statistic


def explained_variance(targets: NDArray[np.float64], values: NDArray[np.float64]) -> Statistic:
    """Return R², scikit-learn's ``r2_score``, 0 where the targets of a resample do not vary; higher is better."""
    centred, errors = targets - targets.mean(), targets - values

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        size = weights.sum(axis=1)
        spread = weights @ centred**2 - (weights @ centred) ** 2 / size
        values: NDArray[np.float64] = 1 - np.divide(
            weights @ errors**2, spread, out=np.ones_like(spread), where=spread > 1e-12
        )
        return values

    return statistic


def quadratic_kappa(targets: NDArray[np.int64], predicted: NDArray[np.int64]) -> Statistic:
    """Return Cohen's kappa with quadratic weights, 0 where it is not defined; higher is better.

    Args:
        targets: classes ``(N,)``.
        predicted: classes ``(N,)``.
    """
    first, second = targets.astype(np.float64), predicted.astype(np.float64)
    distance = (first - second) ** 2

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        size = weights.sum(axis=1)
        means = [weights @ values / size for values in (first, second, first**2, second**2)]
        # Of independent targets and predictions the expected squared distance.
        by_chance = means[2] + means[3] - 2 * means[0] * means[1]
        observed = weights @ distance / size
        values: NDArray[np.float64] = 1 - np.divide(
            observed, by_chance, out=np.ones_like(size), where=by_chance > 1e-12
        )
        return values

    return statistic
