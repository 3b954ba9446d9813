"""Calibration of labels and of predicted numbers, before and after what ``calibrate`` fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import ndtri

from evaluation.statistics.calibration import LEVELS, calibration_error, chance_errors, conformal_width, coverages
from evaluation.statistics.intervals import Estimate, Interval
from evaluation.tables.summary import predictions_of, share, with_interval
from vitrail.console import Table
from vitrail.predictions import OutputCalibration, Predictions
from vitrail.types import CLASS_KINDS, UNKNOWN

if TYPE_CHECKING:
    import pandas as pd

    from evaluation.tables.comparison import Side

Row = dict[str, Any]


def label_rows(predictions: Predictions, task: str, fitted: OutputCalibration, n_resamples: int = 1_000) -> list[Row]:
    """Return the expected calibration error of each label of a multi-label task.

    Args:
        predictions: as they were trained.
        task: of them.
        fitted: by ``calibrate``; without the task, errors after calibration are None.
        n_resamples: of the bootstrap of each error.

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
            calibration_error(each[kept, column], right, groups, n_resamples=n_resamples) for each in probabilities
        ]
        chance = chance_errors(probabilities[-1][kept, column], right, groups, draws=1_000) if kept.any() else ()
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


def compared_calibration(
    sides: Sequence[Side], tasks: Sequence[str], split: str
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Return tables, as texts, of the calibration of labels and of numbers, a row for each of several sides.

    Errors and coverages of a side of several runs are the mean over the runs, weighted by their samples, without an
    interval; those after calibration are there where it was fitted for all of them.

    Args:
        sides: with the same tasks.
        tasks: of any kind, those with a single class are left out.
        split: that the runs predicted.

    Returns:
        ``label_calibration`` and ``number_calibration``, where there are such tasks with known targets, and sentences
        about them.
    """
    import pandas as pd

    found: dict[str, list[list[str]]] = {"label_calibration": [], "number_calibration": []}
    for task in tasks:
        kind = sides[0].predictions[0].kind(task)
        if kind not in CLASS_KINDS:
            name, made = (
                ("label_calibration", _label_cells) if kind == "multi_label" else ("number_calibration", _number_cells)
            )
            cells = [made(side, task, split) for side in sides]
            # What is compared stands next to each other.
            found[name] += [row for rows in zip(*cells, strict=False) for row in rows]
    errors = ("ECE [95 %]", "calibrated ECE [95 %]", "by chance")
    covered = ("coverage [95 %]", "calibrated coverage [95 %]", "intervals")
    columns = {
        "label_calibration": ["task", "label", "run", "n", "support", *errors],
        "number_calibration": ["task", "level", "run", "n", *covered],
    }
    frames = {name: pd.DataFrame(rows, columns=columns[name]) for name, rows in found.items() if rows}
    notes = [_NOTES[name] for name in frames]
    if notes and any(len(side.runs) > 1 for side in sides):
        notes.append("Of several runs the calibration of labels and numbers is the mean, without an interval.")
    return frames, notes


_NOTES = {
    "label_calibration": "ECE of a label: how far the share of images that it applies to is from its probability on "
    "average (15 bins); by chance is what perfectly calibrated probabilities would show.",
    "number_calibration": "Coverage: share of true values within intervals around the predicted ones; it should equal "
    "level.",
}


def _label_cells(side: Side, task: str, split: str) -> list[list[str]]:
    """Rows of a side, one a label."""
    few = [2] if len(side.runs) > 1 else []  # their intervals are not shown
    every = [label_rows(predictions_of(run, split), task, run.output_calibration_for(split), *few) for run in side.runs]
    return [
        [
            *(task, str(rows[0]["label"]), side.name, _numbers(rows, "n"), _numbers(rows, "support")),
            *(_estimate(_mean(rows, name)) for name in ("ece_before", "ece_after")),
            share(float(np.mean([row["chance"] for row in rows]))),
        ]
        for rows in zip(*every, strict=True)
        if any(row["n"] for row in rows)
    ]


def _number_cells(side: Side, task: str, split: str) -> list[list[str]]:
    """Rows of a side, one a level; none where a run has neither standard deviations nor predictions of validation."""
    every = [
        number_rows(predictions_of(run, split), run.predictions("val"), task, run.output_calibration_for(split))
        for run in side.runs
    ]
    return [
        [
            *(task, f"{rows[0]['level']:.0%}", side.name, _numbers(rows, "n")),
            *(_estimate(_mean(rows, name)) for name in ("before", "after")),
            str(rows[0]["intervals"]) if len(rows) == 1 else "–",
        ]
        for rows in zip(*every, strict=False)
        if len(rows) == len(every)
    ]


def _numbers(rows: Sequence[Row], name: str) -> str:
    """The counts of all runs."""
    return ", ".join(dict.fromkeys(f"{row[name]}" for row in rows))


def _mean(rows: Sequence[Row], name: str) -> Estimate | None:
    """What several runs have, weighted by their samples; None where one has nothing."""
    estimates = [row[name] for row in rows]
    if any(one is None for one in estimates):
        return None
    if len(rows) == 1:
        return estimates[0]  # type: ignore[no-any-return]
    value = np.average([one.value for one in estimates], weights=[row["n"] for row in rows])
    return Estimate(float(value), Interval(math.nan, math.nan))


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
    if value is None:
        return "–"
    return share(value.value) if math.isnan(value.interval.low) else with_interval(*value)
