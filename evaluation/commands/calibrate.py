"""``python -m evaluation calibrate RUN``: a temperature for each task, fitted on validation, judged on test.

The temperatures are kept in ``checkpoints/calibration.json``; whatever shows confidences of the run can use them.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluation.report.figures import reliability_figure, save_figure
from evaluation.statistics.calibration import (
    HIGHEST,
    calibration_error,
    chance_errors,
    expected_calibration_error,
    fit_temperature,
    is_at_end,
    negative_log_likelihood,
    reliability_bins,
)
from evaluation.statistics.intervals import Estimate, known
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.predictions import Predictions
from vitrail.runs import Run, write_temperatures
from vitrail.trust import file_name

FITTED_ON = "val"


@dataclass(frozen=True)
class Calibrated:
    """One task of one split before (T = 1) and after.

    Attributes:
        task: its name.
        split: its name.
        n: samples with a known target.
        groups: different groups among them.
        temperature: fitted on validation.
        ece_before: expected calibration error in 15 bins of equal width.
        ece_after: the same with the temperature.
        ece_mass_before: the same in 15 bins of equal mass.
        ece_mass_after: the same with the temperature.
        chance_after: ECE that a perfectly calibrated model with these confidences would have on so few samples.
        nll_before: mean negative log-likelihood in nats, lower is better.
        nll_after: the same with the temperature.
        note: what a reader must know next to the numbers.
    """

    task: str
    split: str
    n: int
    groups: int
    temperature: float
    ece_before: Estimate
    ece_after: Estimate
    ece_mass_before: float
    ece_mass_after: float
    chance_after: float
    nll_before: float
    nll_after: float
    note: str


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``calibrate``."""
    command.description = (
        "Fits a temperature for each task on predictions/val.parquet, keeps it in checkpoints/"
        "calibration.json, and compares confidences with accuracy before and after, on val and on test where there are "
        "predictions of it. Diagrams go to figures/reliability_<split>_<task>.png."
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run directory")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Fits, saves, draws and prints.

    Raises:
        UserError: there are no usable predictions of validation, or none of a sample with a known target.
    """
    rows = calibrate(Run(options.run))
    columns = ("task", "split", "n", "groups", "T", "ECE before [95 %]", "after [95 %]", "by chance", "NLL", "note")
    values = [asdict(row) for row in rows]
    table = Table(columns, [_cells(row) for row in rows], ("task", "split", "note"), values=values)
    table.show(as_json=options.json)
    if not options.json:
        sys.stdout.write(f"{options.run / Run.CALIBRATION} has the temperatures\n")


def calibrate(run: Run) -> list[Calibrated]:
    """Fit a temperature for each task that has known targets, save them, and draw the diagrams.

    Returns:
        A row for each task and each of val and test.

    Raises:
        UserError: as ``run``.
    """
    validation = run.predictions(FITTED_ON)
    if validation is None:
        raise UserError(f"{run.path}: {run.problem_of(FITTED_ON)}")
    has_best = "best" in run.checkpoints
    if has_best and (other := run.other_checkpoint(FITTED_ON)):
        raise UserError(
            f"{run.path}: predictions/{FITTED_ON}.parquet are of checkpoints/{other}.ckpt, and temperatures are those "
            f"of best.ckpt; run `python -m experiments validate --ckpt_path {run.path}/checkpoints/best.ckpt`"
        )
    temperatures, facts, ends = {}, {}, {}
    for task in validation.tasks:
        rows = known(validation.targets[task])
        if len(rows):
            logits, targets = validation.logits[task][rows], validation.targets[task][rows]
            temperatures[task] = fit_temperature(logits, targets)
            ends[task] = _end(temperatures[task], validation.predicted(task)[rows] == targets)
            facts[task] = {"n": len(rows), "groups": len(set(validation.groups[rows].tolist()))}
    if not temperatures:
        raise UserError(f"{run.path}: no sample of {FITTED_ON} has a known target, so no temperature can be fitted")
    write_temperatures(run.path, temperatures, {"fitted_on": FITTED_ON, "samples": facts})
    splits = {FITTED_ON: validation}
    if (
        "test" in run.splits
        and not (has_best and run.other_checkpoint("test"))
        and (test := run.predictions("test")) is not None
    ):
        splits["test"] = test
    found = []
    for task, temperature in temperatures.items():
        for split, predictions in splits.items():
            if task in predictions.tasks:
                found.append(_judge(run.path, predictions, task, split, (temperature, ends[task])))
    return found


def _cells(row: Calibrated) -> list[str]:
    cells = [row.task, row.split, str(row.n), str(row.groups), f"{row.temperature:.3g}"]
    cells += [_with_interval(row.ece_before), _with_interval(row.ece_after)]
    return [*cells, _number(row.chance_after), f"{_number(row.nll_before)} → {_number(row.nll_after)}", row.note]


def _judge(run: Path, predictions: Predictions, task: str, split: str, fitted: tuple[float, str]) -> Calibrated:
    """Before and after; ``fitted`` is the temperature and what is to be said of it."""
    temperature, end = fitted
    rows = known(predictions.targets[task])
    targets, groups, logits = predictions.targets[task][rows], predictions.groups[rows], predictions.logits[task][rows]
    correct = predictions.predicted(task)[rows] == targets
    before, after = (predictions.probabilities(task, value)[rows].max(axis=1) for value in (1.0, temperature))
    if len(rows):
        panels = {
            "T = 1": reliability_bins(before, correct),
            f"T = {temperature:.3g}": reliability_bins(after, correct),
        }
        figure = reliability_figure(panels, f"{task}, {split} (n = {len(rows)})")
        save_figure(figure, run / Run.FIGURES / f"reliability_{split}_{file_name(task)}.png")
    return Calibrated(
        task=task,
        split=split,
        n=len(rows),
        groups=len(set(groups.tolist())),
        temperature=temperature,
        ece_before=calibration_error(before, correct, groups),
        ece_after=calibration_error(after, correct, groups),
        ece_mass_before=expected_calibration_error(before, correct, binning="mass"),
        ece_mass_after=expected_calibration_error(after, correct, binning="mass"),
        chance_after=float(chance_errors(after).mean()),
        nll_before=negative_log_likelihood(logits, targets),
        nll_after=negative_log_likelihood(logits, targets, temperature),
        note=_note(end, split, len(rows)),
    )


def _note(end: str, split: str, n: int) -> str:
    notes = [] if n else ["no known targets"]
    if split == FITTED_ON:
        notes.append("fitted here")
    return "; ".join([*notes, *([end] if end else [])])


def _end(temperature: float, right: NDArray[np.bool_]) -> str:
    """Why there is no best temperature, as far as the samples that it was fitted on say; empty where there is one."""
    if not is_at_end(temperature):
        return ""
    if temperature < HIGHEST / 2:
        return f"all right on {FITTED_ON}: T at the end" if right.all() else "T at the lower end of its range"
    return "T at the upper end of its range: the logits say little or nothing"


def _with_interval(estimate: Estimate) -> str:
    low, high = estimate.interval
    return "–" if np.isnan(estimate.value) else f"{estimate.value:.3f} [{low:.3f}, {high:.3f}]"


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"
