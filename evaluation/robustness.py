"""How scores and predictions change with faults in the images, as ``vitrail evaluate RUN --corrupt`` measured it.

``RUN/robustness/DATA/`` has a Parquet file for each corruption and one of the clean images. A file has one row for each
sample with what was right at each severity, and in its metadata the scores, and a key by which it is known whether it
is of this model and these images. ``robustness.parquet`` and ``robustness.json`` have the scores of all files.

The mean corruption error is the mean over the fifteen corruptions of ImageNet-C, each the mean over its five
severities, of the share of wrong predictions (Hendrycks & Dietterich, ICLR 2019). Normalised it is the mean of each
corruption's error divided by that of a reference run, as there by AlexNet's; lower is better.

Consistency is the share of images whose prediction stays as without the change (Zhang, Making Convolutional Networks
Shift-Invariant Again, ICML 2019, who compares two shifts; here one is compared with the image as it is).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.intervals import Estimate, Interval, estimate, share_interval
from evaluation.statistics.scores import HEADINGS, scores_of
from evaluation.tables.summary import number_text, score_text, with_interval
from vitrail.console import Table, without_nan
from vitrail.errors import UserError
from vitrail.files import DamagedFileError, read_parquet, write_atomically, write_parquet, write_text_atomically
from vitrail.predictions import Predictions
from vitrail.runs import Run
from vitrail.types import CLASS_KINDS

if TYPE_CHECKING:
    import pandas as pd

CLEAN = "clean"
TABLE = "robustness"

IMAGENET_C = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""Corruptions of the mean corruption error: noise, blur, weather, digital."""

SEVERITIES = (1, 2, 3, 4, 5)
"""Of each of them."""

CONSISTENCY = ("flip", "shift")
"""Changes that should leave a prediction as it is."""

_KEY = b"vitrail.robustness"


@dataclass(frozen=True)
class Condition:
    """The main score of a task on images with one fault.

    Attributes:
        corruption: name of the fault, ``clean`` for none.
        severity: from 1; 0 without a fault.
        level: what the severity stands for.
        task: name.
        n: samples with known targets.
        groups: of these.
        score: name of the score, a key of ``scores.HEADINGS``.
        value: of the score, with the ends of its 95 % interval by group.
        relative: to the value on clean images.
        unchanged: share of all samples whose prediction is that of the clean image, NaN for regression, with its ends.
    """

    corruption: str
    severity: int
    level: str
    task: str
    n: int
    groups: int
    score: str
    value: float
    low: float
    high: float
    relative: float = 1.0
    unchanged: float = math.nan
    unchanged_low: float = math.nan
    unchanged_high: float = math.nan


@dataclass(frozen=True)
class CorruptedResults:
    """What was measured with one corruption.

    Attributes:
        key: of model and images, see ``is_of``.
        conditions: by severity and task.
        groups: object ``(N,)``, of each sample.
        names: object ``(N,)``, of each sample.
        right: by task of classes and severity bool ``(N,)``; false where the target is not known.
        known: by task of classes bool ``(N,)``, whether the target is known.
    """

    key: Mapping[str, Any]
    conditions: Sequence[Condition]
    names: NDArray[np.object_]
    groups: NDArray[np.object_]
    right: Mapping[tuple[str, int], NDArray[np.bool_]]
    known: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)

    def joined(self, other: CorruptedResults) -> CorruptedResults:
        """Return the results of both, of other severities of the same samples."""
        conditions = sorted([*self.conditions, *other.conditions], key=lambda one: one.severity)
        return replace(self, conditions=conditions, right={**self.right, **other.right})

    @property
    def severities(self) -> set[int]:
        """Those that were measured."""
        return {one.severity for one in self.conditions}


def measure(
    name: str, levels: Mapping[int, str], found: Mapping[int, Predictions], clean: Predictions, key: Mapping[str, Any]
) -> CorruptedResults:
    """Return scores and consistency of predictions for corrupted images.

    Args:
        name: of the corruption.
        levels: what each severity stands for.
        found: predictions by severity.
        clean: predictions of the same samples without it.
        key: of model and images.
    """
    conditions, right = [], {}
    for severity, predictions in found.items():
        for task in predictions.tasks:
            rows = predictions.known(task)
            if not len(rows):
                continue
            score = next(iter(scores_of(predictions, task).values()))
            value, interval = score.estimate(predictions.groups[rows], 1_000)
            [base] = next(iter(scores_of(clean, task).values())).statistic(np.ones((1, len(rows))))
            conditions.append(
                Condition(
                    name,
                    severity,
                    levels[severity],
                    task,
                    len(rows),
                    len(set(predictions.groups[rows].tolist())),
                    score.name,
                    value,
                    *interval,
                    float(value / base) if base else math.nan,
                    *_unchanged(predictions, clean, task),
                )
            )
            if predictions.kind(task) in CLASS_KINDS:
                right[task, severity] = predictions.predicted(task) == predictions.targets[task]
    known = {task: np.isin(np.arange(len(clean)), clean.known(task)) for task in dict.fromkeys(t for t, _ in right)}
    right = {(task, severity): hits & known[task] for (task, severity), hits in right.items()}
    return CorruptedResults(key, conditions, clean.names, clean.groups, right, known)


def _unchanged(predictions: Predictions, clean: Predictions, task: str) -> tuple[float, float, float]:
    match predictions.kind(task):
        case "regression":
            return (math.nan,) * 3
        case "multi_label":
            same = (predictions.predicted_labels(task) == clean.predicted_labels(task)).all(axis=1)
        case _:
            same = predictions.predicted(task) == clean.predicted(task)
    return float(same.mean()), *share_interval(same.astype(np.float64), predictions.groups)


def write_results(folder: Path, name: str, results: CorruptedResults) -> None:
    """Write the file of a corruption atomically."""
    import pyarrow as pa

    columns: dict[str, Any] = {
        "name": pa.array(results.names, pa.string()),
        "group": pa.array(results.groups, pa.string()),
        **{f"known_{task}": pa.array(rows, pa.bool_()) for task, rows in results.known.items()},
        **{f"right_{severity}_{task}": pa.array(rows, pa.bool_()) for (task, severity), rows in results.right.items()},
    }
    content = {"key": results.key, "conditions": [asdict(one) for one in results.conditions]}
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(content).encode()})
    with write_atomically(folder / f"{name}.parquet") as partial:
        write_parquet(table, partial)


def read_results(path: Path) -> CorruptedResults:
    """Read what ``write_results`` wrote.

    Raises:
        UserError: it cannot be read.
    """
    try:
        table = read_parquet(path)
        content = json.loads(table.schema.metadata[_KEY])
        conditions = [Condition(**one) for one in content["conditions"]]
    except (DamagedFileError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no results of corrupted images ({error}); delete it and evaluate again") from error
    columns = {name: table.column(name).to_numpy() for name in table.column_names}
    right = {
        (task, int(severity)): values
        for name, values in columns.items()
        if name.startswith("right_")
        for severity, task in [name.removeprefix("right_").split("_", 1)]
    }
    known = {name.removeprefix("known_"): values for name, values in columns.items() if name.startswith("known_")}
    return CorruptedResults(content["key"], conditions, columns["name"], columns["group"], right, known)


def mean_corruption_error(errors: NDArray[np.float64], groups: NDArray[Any]) -> Estimate:
    """Return the mean of errors of samples on corruptions, ``(N, corruptions)`` from 0 to 1; lower is better."""
    of_samples = errors.mean(axis=1)
    return Estimate(float(of_samples.mean()), share_interval(of_samples, groups))


def normalised_error(
    errors: NDArray[np.float64], reference: NDArray[np.float64], groups: NDArray[Any]
) -> Estimate | None:
    """Return the mean over corruptions of the error divided by the reference's on the same samples.

    Lower is better, 1 equals the reference; None where the reference makes no error on a corruption.

    Args:
        errors: float64 ``(N, corruptions)``.
        reference: likewise.
        groups: ``(N,)``.
    """
    if not reference.any(axis=0).all():
        return None

    def ratio(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        below = weights @ reference
        shares = np.divide(weights @ errors, below, out=np.full_like(below, np.nan), where=below > 0)
        means: NDArray[np.float64] = shares.mean(axis=1)
        return means

    return estimate(ratio, groups, 2_000, percentiles=True, bounds=(0.0, math.inf))


class Robustness:
    """All that was measured of a run on corrupted images of one data set.

    Args:
        folder: ``RUN/robustness/DATA``, with results on clean images.

    Raises:
        UserError: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = [path for path in sorted(folder.glob("[!.]*.parquet")) if path.stem != TABLE]
        found = {path.stem: read_results(path) for path in paths}
        if CLEAN not in found:
            raise UserError(f"{folder}: has no results on clean images; evaluate again with --corrupt")
        # Others are left of an evaluation of another model or of other images.
        self.results = {name: one for name, one in found.items() if one.key == found[CLEAN].key}

    @property
    def conditions(self) -> list[Condition]:
        """Those of all corruptions, clean images first."""
        order = [CLEAN, *IMAGENET_C, *self.results]
        names = dict.fromkeys(name for name in order if name in self.results)
        return [one for name in names for one in self.results[name].conditions]

    @cached_property
    def tasks(self) -> list[str]:
        """Those with scores."""
        return list(dict.fromkeys(one.task for one in self.conditions))

    def clean(self, task: str) -> Condition:
        """Return the score on clean images."""
        return next(one for one in self.results[CLEAN].conditions if one.task == task)

    def errors(self, task: str) -> NDArray[np.float64] | None:
        """Return the mean error over severities of each sample with a known target, float64 ``(N, corruptions)``.

        None where a corruption of the mean corruption error is missing, or the task has no classes.
        """
        columns = []
        for name in IMAGENET_C:
            results = self.results.get(name)
            if results is None or not all((task, severity) in results.right for severity in SEVERITIES):
                return None
            rows = results.known[task]
            columns.append(1 - np.mean([results.right[task, one][rows] for one in SEVERITIES], axis=0))
        return np.stack(columns, axis=1)

    def groups(self, task: str) -> NDArray[np.object_]:
        """Return the group of each sample with a known target."""
        clean = self.results[CLEAN]
        return clean.groups[clean.known[task]]

    def mean_error(self, task: str) -> Estimate | None:
        """Return the mean corruption error, 0 to 1, lower is better; None where corruptions of it are missing."""
        errors = self.errors(task)
        return None if errors is None else mean_corruption_error(errors, self.groups(task))

    def same_images(self, other: Robustness, task: str) -> bool:
        """Return whether both were measured on the same images of the task."""
        mine, theirs = self.results[CLEAN], other.results[CLEAN]
        keys = [{name: one.key.get(name) for name in ("version", "seed", "side")} for one in (mine, theirs)]
        if keys[0] != keys[1] or task not in mine.known or task not in theirs.known:
            return False
        return np.array_equal(mine.names[mine.known[task]], theirs.names[theirs.known[task]])

    def write_table(self) -> None:
        """Write the scores of all corruptions as Parquet and JSON."""
        import pyarrow as pa

        rows = [asdict(one) for one in self.conditions]
        with write_atomically(self.folder / f"{TABLE}.parquet") as partial:
            write_parquet(pa.Table.from_pylist(rows), partial)
        errors = {task: error for task in self.tasks if (error := self.mean_error(task)) is not None}
        means = {task: {"value": one.value, **one.interval._asdict()} for task, one in errors.items()}
        content = {"key": dict(self.results[CLEAN].key), "mean_corruption_error": means, "conditions": rows}
        write_text_atomically(self.folder / f"{TABLE}.json", json.dumps(without_nan(content), indent=2) + "\n")

    def table(self, task: str) -> Table:
        """Return the scores of a task: a row for each corruption, a column for each severity that was measured."""
        own = [one for one in self.conditions if one.task == task]
        severities = sorted({one.severity for one in own} - {0})
        rows = []
        for name in dict.fromkeys(one.corruption for one in own):
            of_name = {one.severity: one for one in own if one.corruption == name}
            cells = [
                number_text(of_name[one].score, of_name[one].value) if one in of_name else "–" for one in severities
            ]
            kept = float(np.mean([one.unchanged for one in of_name.values()]))
            shown = score_text(own[0].score, self._mean_over_severities(name, task))
            rows.append([name, *cells, shown, "–" if math.isnan(kept) or name == CLEAN else f"{kept:.3f}"])
        mean = f"mean {HEADINGS[own[0].score]} [95 %] (n {own[0].n} in {own[0].groups} groups)"
        return Table([task, *map(str, severities), mean, "same prediction"], rows)

    def _mean_over_severities(self, name: str, task: str) -> Estimate:
        """The mean score with its interval, which only classes and single conditions have."""
        results = self.results[name]
        own = [one for one in results.conditions if one.task == task]
        if len(own) == 1:
            return Estimate(own[0].value, Interval(own[0].low, own[0].high))
        value, interval = float(np.mean([one.value for one in own])), Interval(math.nan, math.nan)
        if task in results.known:
            rows = results.known[task]
            right = np.mean([results.right[task, one.severity][rows] for one in own], axis=0)
            interval = share_interval(right, results.groups[rows])
        return Estimate(value, interval)

    def sentences(self) -> list[str]:
        """Return what the tables come to, one sentence each."""
        found = []
        for task in self.tasks:
            clean, error = self.clean(task), self.mean_error(task)
            if error is not None:
                found.append(
                    f"{task}: mean corruption error {with_interval(*error)}, clean error {1 - clean.value:.3f} "
                    f"({clean.n} images of {clean.groups} groups)."
                )
            for one in self.conditions:
                if one.task == task and one.corruption in CONSISTENCY and not math.isnan(one.unchanged):
                    kept = with_interval(one.unchanged, Interval(one.unchanged_low, one.unchanged_high))
                    found.append(f"{task}: {one.corruption} {one.level} leaves {kept} of the predictions as they are.")
        return found


def robustness_of(run: Run, data: str = "test") -> Robustness | None:
    """Return what was measured of a run on a data set; None where nothing was."""
    folder = run.path / Run.ROBUSTNESS / data
    return Robustness(folder) if (folder / f"{CLEAN}.parquet").is_file() else None


def compared_robustness(
    sides: Mapping[str, Sequence[Run]], tasks: Sequence[str], reference: str
) -> tuple[pd.DataFrame | None, list[str]]:
    """Return the mean corruption errors of several runs next to their clean accuracy, and sentences about them.

    Args:
        sides: runs by name of their experiment, or each by its own.
        tasks: that they have in common.
        reference: the side that errors are divided by.

    Returns:
        A row for each side, data set and task with corruption errors, as texts; None where there are none.
    """
    import pandas as pd

    data = sorted(
        {path.name for runs in sides.values() for run in runs for path in (run.path / Run.ROBUSTNESS).glob("*/")}
    )
    rows, notes = [], []
    for name, task in itertools.product(data, tasks):
        found = {side: _pooled([robustness_of(run, name) for run in runs], task) for side, runs in sides.items()}
        base = found.get(reference)
        for side, own in found.items():
            if own is None:
                continue
            first, errors = own
            same = base is not None and side != reference and base[0].same_images(first, task)
            divided = normalised_error(errors, base[1], first.groups(task)) if base is not None and same else None
            rows.append(
                {
                    "run": side,
                    "data": name,
                    "task": task,
                    "clean accuracy [95 %]": _clean_text(first, task),
                    "corruption error [95 %]": with_interval(*mean_corruption_error(errors, first.groups(task))),
                    "divided by reference's [95 %]": "–" if divided is None else with_interval(*divided),
                }
            )
    if rows:
        notes.append(
            "Corruption error: mean share of wrong predictions over the fifteen corruptions of ImageNet-C at five "
            f"severities; the last column is the mean of each corruption's error divided by that of {reference}."
        )
    return (pd.DataFrame(rows) if rows else None), notes


def _clean_text(of: Robustness, task: str) -> str:
    clean = of.clean(task)
    return with_interval(clean.value, Interval(clean.low, clean.high))


def _pooled(found: Sequence[Robustness | None], task: str) -> tuple[Robustness, NDArray[np.float64]] | None:
    """The first of an experiment's runs, and the mean errors of all; None where they are not of the same images."""
    there = [one for one in found if one is not None and task in one.tasks]
    errors = [values for one in there if (values := one.errors(task)) is not None]
    if not errors or len(errors) < len(found) or not all(there[0].same_images(one, task) for one in there):
        return None
    return there[0], np.mean(errors, axis=0)
