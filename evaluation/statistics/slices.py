"""Slices: a score on some of the samples, next to that on the rest, with a correction for looking at many.

The test permutes which samples are in a slice, whole groups together: a group takes the pattern of another one, so
that slices of whole groups (a store, a product) and slices within groups (dark images) are tested alike, and a slice of
few groups cannot reach small p-values (Good, Permutation, Parametric and Bootstrap Tests of Hypotheses, 2005). It needs
a score that is a mean over samples (``scores.TESTED``); of others there is the interval alone. All slices of a table
count as looks at one set of data: p-values are corrected together (Holm, 1979), those of a search as well, which may
leave nothing where it looks at hundreds.

Simulated size at p < .05 (40 and 200 groups of equal and very unequal size, accuracy .7 and .97, slices of whole groups
and within groups, of 5 to 50 % of the data): .00 to .05; of the smallest of 20 corrected p-values .00 to .05.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.intervals import FEW_GROUPS, Estimate, Mean
from evaluation.statistics.paired import holm
from evaluation.statistics.scores import LOWER_IS_BETTER, MAIN, TESTED, scores_of
from vitrail.predictions import Predictions

_PERMUTATIONS, _MORE = 1_000, 20_000
"""For every slice, and for those whose p-value is small after these."""

SMALLEST = 10
"""Samples that a slice of a search needs."""

_MOST_VALUES = 30
"""Different words of a column that a search makes slices of."""


@dataclass(frozen=True)
class SliceScore:
    """A score on the samples of a slice.

    Attributes:
        name: such as ``store = north``.
        n: samples with a known target.
        groups: different groups among them.
        score: with its 95 % interval by group.
        rest: the score on all other samples; NaN where there are none.
        p_value: of an equal score on the rest, corrected for all slices; NaN without a test.
    """

    name: str
    n: int
    groups: int
    score: Estimate
    rest: float
    p_value: float

    @property
    def difference(self) -> float:
        """From the rest."""
        return self.score.value - self.rest

    @property
    def note(self) -> str:
        """What a reader must know next to the numbers."""
        return f"fewer than {FEW_GROUPS} groups" if self.groups < FEW_GROUPS else ""


def slice_scores(
    predictions: Predictions, task: str, slices: Mapping[str, NDArray[np.bool_]], metric: str = "", *, seed: int = 0
) -> list[SliceScore]:
    """Score every slice that has samples with a known target, the worst first.

    Worst is the slice whose interval has the worst better end: one of a few images is not first by chance. Slices of
    fewer than ``FEW_GROUPS`` groups are last.

    Args:
        predictions: of one split.
        task: whose score.
        slices: bool ``(N,)`` of all samples, by name.
        metric: a name of ``scores``, by default the main score.
        seed: of permutations and resamples.
    """
    metric = metric or MAIN[predictions.kind(task)]
    rows = predictions.known(task)
    own, members = predictions.take(rows), {name: mask[rows] for name, mask in slices.items() if mask[rows].any()}
    if not members:
        return []
    whole = scores_of(own, task, (metric,))[metric].statistic
    p_values = [math.nan] * len(members)
    if metric in TESTED and isinstance(whole, Mean):
        p_values = holm(permutation_p(whole.scores, own.groups, np.stack([*members.values()]), seed=seed).tolist())
    found = []
    for (name, mask), p_value in zip(members.items(), p_values, strict=True):
        inside, outside = (np.flatnonzero(one) for one in (mask, ~mask))
        there = own.take(inside)
        score = scores_of(there, task, (metric,))[metric].estimate(there.groups, 1_000, seed=seed)
        found.append(
            SliceScore(
                name,
                len(inside),
                len(set(there.groups.tolist())),
                score,
                _value(own.take(outside), task, metric) if len(outside) else math.nan,
                p_value,
            )
        )
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0

    def badness(one: SliceScore) -> tuple[bool, float]:
        low, high = one.score.interval
        end = low if sign < 0 else high
        return bool(one.note), sign * (one.score.value if math.isnan(end) else end)

    return sorted(found, key=badness)


def _value(predictions: Predictions, task: str, metric: str) -> float:
    return float(scores_of(predictions, task, (metric,))[metric].statistic(np.ones((1, len(predictions))))[0])


def permutation_p(
    scores: NDArray[np.float64], groups: NDArray[np.object_], members: NDArray[np.bool_], *, seed: int = 0
) -> NDArray[np.float64]:
    """Return two-sided p-values that slices have the same mean score as the rest, float64 ``(K,)``, not corrected.

    Args:
        scores: float64 ``(N,)``.
        groups: ``(N,)``, the group of each sample.
        members: bool ``(K, N)``, which samples are in each slice.
        seed: of the permutations.
    """
    index = np.unique(groups.astype(str), return_inverse=True)[1]
    order = np.argsort(index, kind="stable")
    residuals, inside = (scores - scores.mean())[order], members[:, order].astype(np.float64)
    sizes = np.bincount(index)
    p_values = _share_beyond(residuals, sizes, inside, _PERMUTATIONS, seed)
    if len(small := np.flatnonzero(p_values < 0.02)):
        p_values[small] = _share_beyond(residuals, sizes, inside[small], _MORE, seed + 1)
    return p_values


def _share_beyond(
    residuals: NDArray[np.float64], sizes: NDArray[np.int64], inside: NDArray[np.float64], times: int, seed: int
) -> NDArray[np.float64]:
    """P-values by ``times`` permutations of samples that are sorted by group."""
    rng, n, num_groups = np.random.default_rng(seed), len(residuals), len(sizes)
    begins, of_group = np.cumsum(sizes) - sizes, np.repeat(np.arange(num_groups), sizes)
    place = np.arange(n) - begins[of_group]

    def statistics(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.abs(sums) / np.sqrt(np.maximum(counts * (n - counts) / n, 1e-9))

    observed = statistics(inside @ residuals, inside.sum(axis=1)) * (1 - 1e-9)
    beyond = np.ones(len(inside))
    rows = max(1, 2_000_000 // n)
    for start in range(0, times, rows):
        taken = np.zeros((2, min(rows, times - start), n))
        for row in range(taken.shape[1]):
            # Each sample takes the membership of one in another group, from a random one there onwards.
            donor = rng.permutation(num_groups)[of_group]
            source = begins[donor] + (place + rng.integers(n, size=num_groups)[of_group]) % sizes[donor]
            taken[0, row] = np.bincount(source, weights=residuals, minlength=n)
            taken[1, row] = np.bincount(source, minlength=n)
        beyond += (statistics(*(taken @ inside.T)) >= observed).sum(axis=0)
    return beyond / (times + 1)


def column_slices(name: str, values: NDArray[np.object_] | NDArray[np.float64]) -> dict[str, NDArray[np.bool_]]:
    """Return a slice for each value of a column, of many numbers one for each quarter; missing ones are in none.

    Args:
        name: of the column.
        values: ``(N,)``, texts (None where missing) or numbers (NaN where missing).
    """
    if values.dtype.kind == "f":
        numbers = np.unique(values[~np.isnan(values)])
        if len(numbers) <= 10:
            return {f"{name} = {number:g}": values == number for number in numbers}
        ends = np.unique(np.quantile(values[~np.isnan(values)], (0.25, 0.5, 0.75)))
        parts = {f"{name} <= {ends[0]:g}": values <= ends[0]}
        parts |= {
            f"{low:g} < {name} <= {high:g}": (values > low) & (values <= high) for low, high in itertools.pairwise(ends)
        }
        return {**parts, f"{name} > {ends[-1]:g}": values > ends[-1]}
    return {
        f"{name} = {value}": values == value for value in sorted({one for one in values.tolist() if one is not None})
    }


def searched_slices(columns: Mapping[str, NDArray[np.object_] | NDArray[np.float64]]) -> dict[str, NDArray[np.bool_]]:
    """Return the slices of all columns and of pairs of them that have ``SMALLEST`` samples, and as many outside.

    Columns of more than thirty different texts are left out.
    """
    single: dict[str, dict[str, NDArray[np.bool_]]] = {}
    for name, values in columns.items():
        if values.dtype.kind == "f" or len({one for one in values.tolist() if one is not None}) <= _MOST_VALUES:
            own = column_slices(name, values) if len(values) and not _is_missing(values).all() else {}
            single[name] = {part: mask for part, mask in own.items() if _is_large(mask)}
    found = {name: mask for parts in single.values() for name, mask in parts.items()}
    for first, second in itertools.combinations(single.values(), 2):
        for (one, mask), (other, its) in itertools.product(first.items(), second.items()):
            # A pair that is one of the two alone is no further slice.
            if _is_large(mask & its) and (mask & its).sum() < min(mask.sum(), its.sum()):
                found[f"{one}, {other}"] = mask & its
    return found


def _is_missing(values: NDArray[np.object_] | NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.isnan(values) if values.dtype.kind == "f" else np.array([one is None for one in values.tolist()])


def _is_large(mask: NDArray[np.bool_]) -> bool:
    return bool(SMALLEST <= mask.sum() <= len(mask) - SMALLEST)
