"""Predictions of two models on the same samples, row by row, and the paired difference with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics import Estimate, Interval, Statistic, group_bootstrap, wilson
from vitrail.errors import UserError
from vitrail.predictions import Predictions


def paired_difference(
    later: Statistic, earlier: Statistic, groups: NDArray[Any], agree: bool, n_resamples: int = 5_000, *, seed: int = 0
) -> Estimate:
    """Difference of a statistic of two models on the same N samples, with its 95 % interval by group.

    Both models see the same resamples, so what makes a sample hard for both cancels out.

    Args:
        later: of the one model, from 0 to 1.
        earlier: of the other; it is subtracted.
        groups: ``(N,)``, the group of each sample.
        agree: whether the models answered every sample alike. No resample can differ then: the interval is that of as
            many trials as groups in which none differed (Wilson), to both sides.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.
    """

    def shifted(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        # From 0 to 1, for which the bootstrap is made.
        return (later(weights) - earlier(weights) + 1) / 2

    value = 2 * float(shifted(np.ones((1, len(groups))))[0]) - 1
    if agree:
        most = wilson(0.0, len(np.unique(groups))).high
        return Estimate(value, Interval(-most, most))
    low, high = group_bootstrap(shifted, groups, n_resamples, seed=seed)
    return Estimate(value, Interval(2 * low - 1, 2 * high - 1))


def in_order_of(
    after: Predictions, before: Predictions, task: str, labels: tuple[str, str] = ("after", "before")
) -> Predictions:
    """Rows of ``before`` in the order of ``after``, with the groups of ``after``, so that both resample alike.

    Samples are told apart by name, because a data set that is loaded with other options (fewer classes, say) numbers
    its rows anew.

    Args:
        after: one model's predictions.
        before: the other's, of the same samples in any order.
        task: whose classes and targets must agree.
        labels: what the message calls the two, as in "2 samples only …".

    Raises:
        UserError: classes, samples or targets are not the same; names what differs first.
    """
    classes = [list(predictions.tasks.get(task, [])) for predictions in (after, before)]
    if classes[0] != classes[1]:
        raise UserError(
            _told(labels, f"the classes of '{task}' differ: {_first_difference(classes[0], classes[1], labels)}")
        )
    row_of = {name: row for row, name in enumerate(before.names.tolist())}
    names = after.names.tolist()
    if len(row_of) != len(before) or len(set(names)) != len(names):
        raise UserError(_told(labels, "several samples have the same name, so they cannot be paired"))
    only_after, only_before = [name for name in names if name not in row_of], sorted(row_of.keys() - set(names))
    if only_after or only_before:
        said = [
            f"{len(only)} only {when} (first '{only[0]}')"
            for only, when in ((only_after, labels[0]), (only_before, labels[1]))
            if only
        ]
        raise UserError(_told(labels, f"the samples differ: {', '.join(said)}"))
    ordered = before.take(np.array([row_of[name] for name in names], dtype=np.int64))
    bad = np.flatnonzero(ordered.targets[task] != after.targets[task])
    if bad.size:
        raise UserError(
            _told(
                labels, f"{bad.size} of {len(names)} samples have another target of '{task}', first '{names[bad[0]]}'"
            )
        )
    return replace(ordered, groups=after.groups)


def _told(labels: tuple[str, str], what: str) -> str:
    return f"predictions {labels[1]} and {labels[0]}: {what}; test both on the same data"


def _first_difference(after: Sequence[str], before: Sequence[str], labels: tuple[str, str]) -> str:
    for index, (new, old) in enumerate(zip(after, before, strict=False)):
        if new != old:
            return f"number {index} is '{new}' {labels[0]} and '{old}' {labels[1]}"
    return f"{len(after)} {labels[0]}, {len(before)} {labels[1]}"
