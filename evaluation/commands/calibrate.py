"""``python -m evaluation calibrate RUN``: a temperature for each task, fitted on validation, evaluated on test.

The temperatures are kept in ``checkpoints/calibration.json``, for whatever shows confidences of the run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.report.figures import reliability_figure, save_figure
from evaluation.statistics.calibration import HIGHEST, calibration_of, fit_temperature, is_at_end, reliability_bins
from evaluation.statistics.intervals import Estimate, known
from evaluation.tables.summary import predictions_of, share, with_interval
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.predictions import Predictions, other_kinds
from vitrail.runs import Run, write_temperatures
from vitrail.trust import file_name
from vitrail.types import CLASS_KINDS

FITTED_ON = "val"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``calibrate``."""
    command.description = (
        "Fits a temperature for each task on predictions/val.parquet, keeps it in checkpoints/"
        "calibration.json, and compares confidences with accuracy before and after, on val and on test where there are "
        "predictions of it. Diagrams go to figures/reliability_<split>_<task>.png."
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run directory")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _calibrated_tasks(predictions: Predictions) -> list[str]:
    """Return the tasks that have a softmax, and report the others."""
    if left_out := other_kinds(predictions.tasks, predictions.kinds):
        sys.stderr.write(f"calibrate: left out {left_out}, which have no temperature\n")
    return list(predictions.of_kinds(*CLASS_KINDS).tasks)


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Fit a temperature for each task that has known targets, save them, draw the diagrams, and print.

    Raises:
        UserError: there are no usable predictions of validation, or none of a sample with a known target.
    """
    files = Run(options.run)
    validation = predictions_of(files, FITTED_ON)
    has_best = "best" in files.checkpoints
    if has_best and (other := files.other_checkpoint(FITTED_ON)):
        raise UserError(
            f"{files.path}: predictions/{FITTED_ON}.parquet are of checkpoints/{other}.ckpt, temperatures are those "
            f"of best.ckpt; run `python -m experiments validate --ckpt_path {files.path}/checkpoints/best.ckpt`"
        )
    temperatures, facts, notes = {}, {}, {}
    for task in _calibrated_tasks(validation):
        rows = known(validation.targets[task])
        if len(rows):
            logits, targets = validation.logits[task][rows], validation.targets[task][rows]
            temperatures[task] = fit_temperature(logits, targets)
            notes[task] = _note(temperatures[task], validation.predicted(task)[rows] == targets)
            facts[task] = {"n": len(rows), "groups": len(set(validation.groups[rows].tolist()))}
    if not temperatures:
        raise UserError(f"{files.path}: no sample of {FITTED_ON} has a known target, so no temperature can be fitted")
    write_temperatures(files.path, temperatures, {"fitted_on": FITTED_ON, "samples": facts})
    splits = {FITTED_ON: validation}
    if "test" in files.splits and not (has_best and files.other_checkpoint("test")):
        splits |= {"test": test} if (test := files.predictions("test")) is not None else {}
    values = [
        _compared(files.path, predictions, task, split, temperature, notes[task])
        for task, temperature in temperatures.items()
        for split, predictions in splits.items()
        if task in predictions.tasks
    ]
    columns = ("task", "split", "n", "groups", "T", "ECE before [95 %]", "after [95 %]", "by chance", "NLL", "note")
    table = Table(columns, [_cells(row) for row in values], ("task", "split", "note"), values=values)
    table.show(as_json=options.json)
    if not options.json:
        sys.stdout.write(f"{options.run / Run.CALIBRATION} has the temperatures\n")


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
