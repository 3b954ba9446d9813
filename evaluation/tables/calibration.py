"""Calibration of labels and of predicted numbers, before and after what ``calibrate`` fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import ndtri

from evaluation.statistics.calibration import LEVELS, calibration_error, chance_errors, conformal_width, coverages
from evaluation.statistics.intervals import Estimate
from evaluation.tables.summary import share, with_interval
from vitrail.console import Table
from vitrail.predictions import OutputCalibration, Predictions
from vitrail.types import UNKNOWN

Row = dict[str, Any]

_RESAMPLES = 1_000
"""Of each label's calibration error."""


def label_rows(predictions: Predictions, task: str, fitted: OutputCalibration) -> list[Row]:
    """Return the expected calibration error of each label of a multi-label task.

    Args:
        predictions: as they were trained.
        task: of them.
        fitted: by ``calibrate``; without the task, errors after calibration are None.

    Returns:
        One row a label with ``task``, ``label``, ``n`` (images with a known entry), ``support`` (that it applies to),
        ``temperature``, ``bias``, ``ece_before``, ``ece_after`` and ``chance``: the mean error of perfectly calibrated
        probabilities on as many images, of those after calibration where they are fitted.
    """
    own = predictions.take(predictions.known(task))
    temperature, *biases = fitted.labels.get(task, [1.0, *[0.0] * len(own.tasks[task])])
    stages = [own, fitted.apply(own)] if task in fitted.labels else [own]
    probabilities = [each.label_probabilities(task) for each in stages]
    known, applies = own.targets[task] != UNKNOWN, own.targets[task] == 1
    rows = []
    for column, name in enumerate(own.tasks[task]):
        kept = known[:, column]
        groups, right = own.groups[kept], applies[kept, column]
        errors: list[Estimate | None] = [
            calibration_error(each[kept, column], right, groups, n_resamples=_RESAMPLES) for each in probabilities
        ]
        chance = chance_errors(probabilities[-1][kept, column], right, groups, draws=_RESAMPLES) if kept.any() else ()
        rows.append(
            {
                "task": task,
                "label": str(name),
                "n": int(kept.sum()),
                "support": int(right.sum()),
                "temperature": temperature,
                "bias": biases[column],
                "ece_before": errors[0],
                "ece_after": errors[1] if len(errors) > 1 else None,
                "chance": float(np.mean(chance)) if len(chance) else math.nan,
            }
        )
    return rows


def number_rows(
    predictions: Predictions, validation: Predictions | None, task: str, fitted: OutputCalibration
) -> list[Row]:
    """Return how many true values of a regression task lie within intervals around the predicted ones.

    Args:
        predictions: as they were trained.
        validation: those that calibration was fitted on, for tasks without predicted standard deviations; without
            them these have no rows.
        task: of them.
        fitted: by ``calibrate``; without the task, intervals after calibration are None.

    Returns:
        One row a level with ``task``, ``n``, ``groups``, ``intervals`` (what they are made of), ``level``, and the
        coverages ``before`` and ``after``, None where there are no such intervals.
    """
    own = predictions.take(predictions.known(task))
    errors, deviations = own.values(task) - own.targets[task], own.deviations(task)
    if not len(own) or (deviations is None and validation is None):
        return []
    quantiles = [float(ndtri((1 + level) / 2)) for level in LEVELS]
    before: Sequence[Estimate | None] = [None] * len(LEVELS)
    after: Sequence[Estimate | None] = [None] * len(LEVELS)
    if deviations is None:
        assert validation is not None
        of = validation.take(validation.known(task))
        kind = "conformal, of val"
        widths: list[Any] = [conformal_width(of.values(task) - of.targets[task], level) for level in LEVELS]
        after = coverages(errors, widths, own.groups)
    else:
        kind = "normal"
        before = coverages(errors, [quantile * deviations for quantile in quantiles], own.groups)
        if task in fitted.scales:
            scale = fitted.scales[task]
            kind = f"normal, {scale:.3g} times as wide"
            after = coverages(errors, [quantile * scale * deviations for quantile in quantiles], own.groups)
    fixed = {"task": task, "n": len(own), "groups": len(set(own.groups.tolist())), "intervals": kind}
    return [
        {**fixed, "level": level, "before": first, "after": second}
        for level, first, second in zip(LEVELS, before, after, strict=True)
    ]


def label_calibration_table(rows: Sequence[Row]) -> Table:
    """Return the rows of ``label_rows``, with their ``split``, as a table."""
    columns = ("task", "label", "split", "n", "support", "T", "bias", "ECE before [95 %]", "after [95 %]", "by chance")
    cells = [
        [
            *(str(row[name]) for name in ("task", "label", "split", "n", "support")),
            *(f"{row['temperature']:.3g}", f"{row['bias']:+.2f}"),
            *(_estimate(row["ece_before"]), _estimate(row["ece_after"]), share(row["chance"])),
        ]
        for row in rows
    ]
    return Table(columns, cells, ("task", "label", "split"))


def number_calibration_table(rows: Sequence[Row]) -> Table:
    """Return the rows of ``number_rows``, with their ``split``, as a table."""
    columns = ("task", "split", "n", "groups", "intervals", "level", "coverage before [95 %]", "after [95 %]")
    cells = [
        [
            *(str(row[name]) for name in ("task", "split", "n", "groups", "intervals")),
            f"{row['level']:.0%}",
            *(_estimate(row["before"]), _estimate(row["after"])),
        ]
        for row in rows
    ]
    return Table(columns, cells, ("task", "split", "intervals"))


def _estimate(value: Estimate | None) -> str:
    return "–" if value is None else with_interval(*value)
