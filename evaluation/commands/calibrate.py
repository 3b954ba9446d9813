"""``python -m evaluation calibrate RUN``: a temperature for each task, fitted on validation, evaluated on test.

Labels have a bias each as well; of predicted numbers the standard deviation is scaled, or found where none is. All
is kept in ``checkpoints/calibration.json``, for whatever shows confidences of the run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.report.figures import reliability_figure, save_figure
from evaluation.report.thresholds import choose_point, point_rows, point_tables
from evaluation.statistics.calibration import (
    HIGHEST,
    calibration_of,
    fit_labels,
    fit_scale,
    fit_temperature,
    is_at_end,
    reliability_bins,
    standard_width,
)
from evaluation.statistics.intervals import Estimate, known
from evaluation.tables.calibration import (
    label_calibration_table,
    label_rows,
    number_calibration_table,
    number_rows,
)
from evaluation.tables.summary import predictions_of, share, with_interval
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.predictions import OperatingPoint, OutputCalibration, Predictions
from vitrail.runs import Run, write_temperatures
from vitrail.trust import file_name
from vitrail.types import UNKNOWN

FITTED_ON = "val"

Row = dict[str, Any]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``calibrate``."""
    command.description = (
        "Fits a temperature for each task on predictions/val.parquet, keeps it in checkpoints/"
        "calibration.json, and compares confidences with accuracy before and after, on val and on test where there are "
        "predictions of it. Multi-label tasks have one temperature and a bias for each label; of regression tasks the "
        "predicted standard deviation is scaled, or one for all is found, and the coverage of intervals is compared. "
        "Diagrams go to figures/reliability_<split>_<task>.png."
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run directory")
    command.add_argument(
        "--operating-point",
        metavar="GOAL",
        help="also choose a threshold on val that `predict` uses, such as 'recall>=.95' or 'fpr<=.01' of one class or "
        "of every label, or 'risk<=.05', below which nothing is predicted; it is chosen again with every later "
        "calibration, 'none' removes it, with --task that of one task",
    )
    command.add_argument("--task", default="", help="task of the operating point (default: the first)")
    command.add_argument(
        "--positive", default="", metavar="CLASS", help="class of the operating point (default: the last of two)"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Fit a temperature for each task that has known targets, save them, draw the diagrams, and print.

    Raises:
        UserError: there are no usable predictions of validation, or none of a sample with a known target.
    """
    _refuse_without_goal(options)
    files = Run(options.run)
    validation = predictions_of(files, FITTED_ON)
    has_best = "best" in files.checkpoints
    if has_best and (other := files.other_checkpoint(FITTED_ON)):
        raise UserError(
            f"{files.path}: predictions/{FITTED_ON}.parquet are of checkpoints/{other}.ckpt, temperatures are those "
            f"of best.ckpt; run `python -m experiments validate --ckpt_path {files.path}/checkpoints/best.ckpt`"
        )
    fit = _fit(validation)
    facts, temperatures, notes, fitted = fit.facts, fit.temperatures, fit.notes, fit.outputs
    if not facts:
        raise UserError(f"{files.path}: no sample of {FITTED_ON} has a known target, so no temperature can be fitted")
    splits = {FITTED_ON: validation}
    if "test" in files.splits and not (has_best and files.other_checkpoint("test")):
        splits |= {"test": test} if (test := files.predictions("test")) is not None else {}
    factors = {task: np.float32(value) for task, value in temperatures.items()}
    scaled = {split: _calibrated(predictions, factors, fitted) for split, predictions in splits.items()}
    points = _points(files, scaled[FITTED_ON], options)
    known = {"operating_points": {task: vars(point) for task, point in points.items()}} if points else {}
    write_temperatures(files.path, temperatures, {"fitted_on": FITTED_ON, "samples": facts, **known}, fitted)
    values = [
        _compared(files.path, predictions, task, split, temperature, notes[task])
        for task, temperature in temperatures.items()
        for split, predictions in splits.items()
        if task in predictions.tasks
    ]
    labels, numbers = [], []
    for split, predictions in splits.items():
        for task in predictions.tasks:
            if task in fitted.labels:
                labels += [{"split": split, **row} for row in label_rows(predictions, task, fitted)]
                _draw_labels(files.path, predictions, task, split, fitted)
            elif task in fitted.scales or task in fitted.deviations:
                numbers += [{"split": split, **row} for row in number_rows(predictions, validation, task, fitted)]
    _show(values, labels, numbers, point_rows(points, scaled), as_json=options.json)
    if not options.json:
        sys.stdout.write(f"{options.run / Run.CALIBRATION} has the {_contents(temperatures, fitted)}\n")


def _refuse_without_goal(options: argparse.Namespace) -> None:
    """Refuse options of an operating point where none is chosen."""
    goal = options.operating_point
    if options.positive and goal in (None, "none"):
        raise UserError("--positive: is the class of an operating point; give --operating-point GOAL, or leave it out")
    if options.task and goal is None:
        raise UserError("--task: is that of an operating point; give --operating-point GOAL, or leave it out")


def _calibrated(predictions: Predictions, factors: Mapping[str, np.float32], fitted: OutputCalibration) -> Predictions:
    own = {task: logits / factors.get(task, np.float32(1)) for task, logits in predictions.logits.items()}
    return fitted.apply(replace(predictions, logits=own))


def _points(files: Run, validation: Predictions, options: argparse.Namespace) -> dict[str, OperatingPoint]:
    """The operating point that is asked for, and those of other tasks, all chosen on this validation."""
    points: dict[str, OperatingPoint] = {}
    for task, before in files.operating_points.items():
        removed = options.operating_point == "none" and options.task in ("", task)
        if task in validation.tasks and not removed:
            positive = next(iter(before.thresholds)) if len(before.thresholds) == 1 else ""
            points |= choose_point(validation, before.goal, task, positive)
    if options.operating_point == "none" and options.task and options.task not in files.operating_points:
        there = ", ".join(files.operating_points) or "no task"
        raise UserError(f"--task {options.task}: has no operating point to remove; {there} has")
    if options.operating_point not in (None, "none"):
        points |= choose_point(validation, options.operating_point, options.task, options.positive)
    return points


class _Fit(NamedTuple):
    """What was fitted by task, how many samples it rests on, and notes on temperatures."""

    temperatures: dict[str, float]
    outputs: OutputCalibration
    facts: dict[str, dict[str, int]]
    notes: dict[str, str]


def _fit(validation: Predictions) -> _Fit:
    """Fit every task that has known targets."""
    temperatures: dict[str, float] = {}
    facts: dict[str, dict[str, int]] = {}
    notes: dict[str, str] = {}
    outputs: dict[str, dict[str, Any]] = {"labels": {}, "scales": {}, "deviations": {}}
    for task in validation.tasks:
        own = validation.take(validation.known(task))
        if not len(own):
            continue
        facts[task] = {"n": len(own), "groups": len(set(own.groups.tolist()))}
        match own.kind(task):
            case "multi_label":
                outputs["labels"][task] = fit_labels(own.logits[task], own.targets[task])
            case "regression":
                name, value = _fit_numbers(own, task)
                if value > 0:
                    outputs[name][task] = value
            case _:
                temperatures[task] = fit_temperature(own.logits[task], own.targets[task])
                notes[task] = _note(temperatures[task], own.predicted(task) == own.targets[task])
    return _Fit(temperatures, OutputCalibration(**outputs), facts, notes)


def _contents(temperatures: Mapping[str, float], fitted: OutputCalibration) -> str:
    parts = {"temperatures": {**temperatures, **fitted.labels}, "biases of labels": fitted.labels}
    parts["standard deviations"] = {**fitted.scales, **fitted.deviations}
    return " and ".join(name for name, found in parts.items() if found)


def _show(values: list[Row], labels: list[Row], numbers: list[Row], points: list[Row], *, as_json: bool) -> None:
    if as_json:
        Table((), (), values=[*values, *labels, *numbers, *points]).show(as_json=True)
        return
    for table in point_tables(points):
        table.show()
    if values:
        columns = ("task", "split", "n", "groups", "T", "ECE before [95 %]", "after [95 %]", "by chance", "NLL", "note")
        Table(columns, [_cells(row) for row in values], ("task", "split", "note")).show()
    for table in (label_calibration_table(labels), number_calibration_table(numbers)):
        if table.rows:
            table.show()


def _fit_numbers(predictions: Predictions, task: str) -> tuple[str, float]:
    """The scale of predicted standard deviations, or one deviation for all; 0 where every prediction is exact."""
    errors = predictions.values(task) - predictions.targets[task]
    deviations = predictions.deviations(task)
    if deviations is None:
        return "deviations", standard_width(errors)
    return "scales", fit_scale(errors, deviations)


def _draw_labels(run: Path, predictions: Predictions, task: str, split: str, fitted: OutputCalibration) -> None:
    """Draw the diagram of all labels together."""
    own = predictions.take(predictions.known(task))
    known, applies = own.targets[task] != UNKNOWN, own.targets[task] == 1
    if known.any():
        headings = ("as trained", f"T = {fitted.labels[task][0]:.3g} and biases")
        panels = {
            heading: reliability_bins(each.label_probabilities(task)[known], applies[known])
            for heading, each in zip(headings, (own, fitted.apply(own)), strict=True)
        }
        figure = reliability_figure(
            panels, f"{task}, {split} ({int(known.sum())} labels of {len(own)} images)", score="share that applies"
        )
        save_figure(figure, run / Run.FIGURES / f"reliability_{split}_{file_name(task)}.png")


def _compared(
    run: Path, predictions: Predictions, task: str, split: str, temperature: float, note: str
) -> dict[str, Any]:
    """Calibration before (T = 1) and after; draws the diagram."""
    before, after = (calibration_of(predictions, task, value) for value in (1.0, temperature))
    n = len(before.correct)
    if n:
        panels = {
            "T = 1": reliability_bins(before.confidence, before.correct),
            f"T = {temperature:.3g}": reliability_bins(after.confidence, after.correct),
        }
        figure = reliability_figure(panels, f"{task}, {split} (n = {n})")
        save_figure(figure, run / Run.FIGURES / f"reliability_{split}_{file_name(task)}.png")
    notes = ("" if n else "no known targets", "fitted here" if split == FITTED_ON else "", note)
    return {
        "task": task,
        "split": split,
        "n": n,
        "groups": len(set(predictions.groups[known(predictions.targets[task])].tolist())),
        "temperature": temperature,
        "ece_before": before.ece,
        "ece_after": after.ece,
        "ece_mass_before": before.ece_mass,
        "ece_mass_after": after.ece_mass,
        "chance_after": after.by_chance,
        "nll_before": before.nll,
        "nll_after": after.nll,
        "note": "; ".join(one for one in notes if one),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    before: Estimate = row["ece_before"]
    after: Estimate = row["ece_after"]
    return [
        *(str(row[name]) for name in ("task", "split", "n", "groups")),
        f"{row['temperature']:.3g}",
        with_interval(*before),
        with_interval(*after),
        share(row["chance_after"]),
        f"{share(row['nll_before'])} → {share(row['nll_after'])}",
        row["note"],
    ]


def _note(temperature: float, right: NDArray[np.bool_]) -> str:
    """Why there is no best temperature, as far as the samples that it was fitted on show; empty where there is one."""
    if not is_at_end(temperature):
        return ""
    if temperature < HIGHEST / 2:
        return f"all right on {FITTED_ON}: T at the end" if right.all() else "T at the lower end of its range"
    return "T at the upper end of its range: the logits show little or nothing"
