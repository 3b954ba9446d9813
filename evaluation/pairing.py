"""Predictions of two models on the same samples, row by row: what a paired difference needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from datamodules.schema import UserError
from evaluation.predictions import Predictions


def in_order_of(after: Predictions, before: Predictions, task: str) -> Predictions:
    """Rows of ``before`` in the order of ``after``, with the groups of ``after``, so that both resample alike.

    Samples are told apart by name, because a data set that is loaded with other options (fewer classes, say) numbers
    its rows anew.

    Args:
        after: one model's predictions.
        before: the other's, of the same samples in any order.
        task: whose classes and targets must agree.

    Raises:
        UserError: classes, samples or targets are not the same; names what differs first.
    """
    classes = [list(predictions.tasks.get(task, [])) for predictions in (after, before)]
    if classes[0] != classes[1]:
        raise UserError(_told(f"the classes of '{task}' differ: {_first_difference(*classes)}"))
    row_of = {name: row for row, name in enumerate(before.names.tolist())}
    names = after.names.tolist()
    if len(row_of) != len(before) or len(set(names)) != len(names):
        raise UserError(_told("several samples have the same name, so they cannot be paired"))
    only_after, only_before = [name for name in names if name not in row_of], sorted(row_of.keys() - set(names))
    if only_after or only_before:
        said = [
            f"{len(only)} only {when} (first '{only[0]}')"
            for only, when in ((only_after, "after"), (only_before, "before"))
            if only
        ]
        raise UserError(_told(f"the samples differ: {', '.join(said)}"))
    ordered = before.take(np.array([row_of[name] for name in names], dtype=np.int64))
    bad = np.flatnonzero(ordered.targets[task] != after.targets[task])
    if bad.size:
        raise UserError(
            _told(f"{bad.size} of {len(names)} samples have another target of '{task}', first '{names[bad[0]]}'")
        )
    return replace(ordered, groups=after.groups)


def _told(what: str) -> str:
    return f"predictions before and after: {what}; test both on the same data"


def _first_difference(after: Sequence[str], before: Sequence[str]) -> str:
    for index, (new, old) in enumerate(zip(after, before, strict=False)):
        if new != old:
            return f"number {index} is '{new}' after and '{old}' before"
    return f"{len(after)} after, {len(before)} before"
