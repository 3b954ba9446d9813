"""Sections of a report that say how good the predictions are: per task, per class, confusions, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.calibration import (
    calibration_error,
    chance_errors,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_bins,
)
from evaluation.classification import class_report, confusion_matrix
from evaluation.figures import confusion_figure
from evaluation.html_page import Section
from evaluation.reliability_figure import reliability_figure
from evaluation.statistics import clustered_wilson, known
from evaluation.summary import TaskSummary, share, summarise, with_interval
from vitrail.predictions import Predictions
from vitrail.trust import file_name

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

FEW = 5
"""Classes with fewer samples are named: what is said of them rests on next to nothing."""

_TOP_CONFUSIONS = 10
_ALWAYS_IN_TOP = 3  # with so many classes every target is among the three largest logits


def scores_section(
    predictions: Predictions, class_counts: Mapping[str, Sequence[int]], run: str, split: str
) -> Section:
    """Accuracy and F1 of every task with intervals by group, next to the majority baseline.

    Args:
        predictions: of the split.
        class_counts: of the train split, by task; a task may be missing.
        run: name of the run.
        split: name of the split.
    """
    import pandas as pd

    summaries = summarise(predictions, class_counts, run, split)
    says = [
        "Intervals are 95 %, by bootstrap over groups (physical objects) where there are any; the one after Wilson, "
        "with the effective number of samples, is the cross-check. Majority is the accuracy of always answering the "
        "class that is most frequent in training.",
        *(sentence for task in predictions.tasks for sentence in _degenerate(predictions, task)),
    ]
    if below := [summary.task for summary in summaries if summary.n and not summary.above_majority]:
        says.append(f"Not shown to be better than always answering the majority class: {', '.join(below)}.")
    rows = [_score_row(summary, len(predictions.tasks[summary.task])) for summary in summaries]
    return Section(f"Scores on {split}", says=says, tables={f"scores_{split}": pd.DataFrame(rows)})


def classes_section(predictions: Predictions, class_counts: Mapping[str, Sequence[int]], split: str) -> Section:
    """Precision, recall and F1 of every class of every task, and which classes have next to no samples.

    Args:
        predictions: of the split.
        class_counts: of the train split, by task; a task may be missing.
        split: name of the split.
    """
    tables: dict[str, pd.DataFrame] = {}
    says, missing = [], []
    for task, names in predictions.tasks.items():
        rows = known(predictions.targets[task])
        if not len(rows):
            missing.append(f"Of {task!r} no target is known.")
            continue
        tables[f"classes_{split}_{file_name(task)}"] = class_table(predictions, task, class_counts.get(task))
        support = np.bincount(predictions.targets[task][rows], minlength=len(names))
        few = [f"{name} ({count})" for name, count in zip(names, support, strict=True) if 0 < count < FEW]
        absent = [str(name) for name, count in zip(names, support, strict=True) if not count]
        if few:
            says.append(f"{task}: fewer than {FEW} samples, so next to nothing is known of: {', '.join(few)}.")
        if absent:
            says.append(f"{task}: without any sample in {split}, so without recall and F1: {', '.join(absent)}.")
    lead = "The interval of recall is Wilson's with the effective number of samples, which knows of groups."
    return Section("Classes", says=[lead, *says] if tables else says, tables=tables, missing=missing)


def class_table(predictions: Predictions, task: str, train: Sequence[int] | None = None) -> pd.DataFrame:
    """One row a class; NaN where there is nothing to compute a number from, unlike ``class_report``.

    Args:
        predictions: of a split, with a known target of the task at least.
        task: whose.
        train: samples of each class in the train split, where known.

    Returns:
        ``class``, ``train`` where known, ``samples``, ``groups``, ``answers`` (how often it was predicted),
        ``precision``, ``recall``, its interval as text, and ``f1``.
    """
    import pandas as pd

    rows = known(predictions.targets[task])
    targets, predicted, groups = (
        predictions.targets[task][rows],
        predictions.predicted(task)[rows],
        predictions.groups[rows],
    )
    names = [str(name) for name in predictions.tasks[task]]
    confusion = confusion_matrix(targets, predicted, names)
    report = class_report(confusion).iloc[: len(names)]
    answers = confusion.to_numpy()[:, : len(names)].sum(axis=0)
    support = report["support"].to_numpy()
    own = [targets == label for label in range(len(names))]
    return pd.DataFrame(
        {
            "class": names,
            **({} if train is None else {"train": list(train)}),
            "samples": support.tolist(),
            "groups": [len(set(groups[mask].tolist())) for mask in own],
            "answers": answers.tolist(),
            "precision": np.where(answers > 0, report["precision"], np.nan),
            "recall": np.where(support > 0, report["recall"], np.nan),
            "recall [95 %]": [_interval(predicted[mask] == targets[mask], groups[mask]) for mask in own],
            "f1": np.where(support > 0, report["f1"], np.nan),
        }
    )


def confusion_section(predictions: Predictions, split: str) -> Section:
    """Confusion matrices, and which classes are taken for which most often."""
    import pandas as pd

    section = Section("Confusions", says=["Rows are targets, columns predictions; the numbers are samples."])
    for task, names in predictions.tasks.items():
        rows = known(predictions.targets[task])
        if not len(rows):
            section.missing.append(f"Of {task!r} no target is known.")
            continue
        counts = confusion_matrix(
            predictions.targets[task][rows], predictions.predicted(task)[rows], [*map(str, names)]
        )
        section.figures[f"confusion_{split}_{file_name(task)}"] = confusion_figure(
            counts, f"{task}, {split} (n = {len(rows)})"
        )
        wrong = counts.to_numpy() * (1 - np.eye(*counts.shape, dtype=np.int64))
        order = np.argsort(-wrong, axis=None, kind="stable")[:_TOP_CONFUSIONS]
        pairs = [(int(row), int(column)) for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)]
        totals = counts.to_numpy().sum(axis=1)
        top = [
            {
                "task": task,
                "target": names[row],
                "predicted": counts.columns[column],
                "samples": int(wrong[row, column]),
                "share of the target": float(wrong[row, column] / totals[row]),
            }
            for row, column in pairs
            if wrong[row, column]
        ]
        if top:
            section.tables[f"confused_{split}_{file_name(task)}"] = pd.DataFrame(top)
    return section


def calibration_section(predictions: Predictions, temperatures: Mapping[str, float], split: str, run: str) -> Section:
    """How far confidences are from accuracy, before and after temperature scaling.

    Args:
        predictions: of the split.
        temperatures: by task; of a task without one only the confidences as they are.
        split: name of the split.
        run: the run directory, for the command that fits temperatures.
    """
    import pandas as pd

    section = Section(
        "Calibration",
        says=[
            "Confidence is the largest probability. ECE is the mean distance of accuracy from confidence in 15 bins of "
            "equal width; by chance is what a perfectly calibrated model would show with so few samples."
        ],
    )
    table = []
    for task in predictions.tasks:
        rows = known(predictions.targets[task])
        if not len(rows):
            section.missing.append(f"Of {task!r} no target is known.")
            continue
        # As it was trained, and with the temperature that was fitted on validation.
        values = {"T = 1": 1.0} | (
            {f"T = {temperatures[task]:.3g}": temperatures[task]} if task in temperatures else {}
        )
        correct = predictions.predicted(task)[rows] == predictions.targets[task][rows]
        panels = {}
        for name, temperature in values.items():
            confidence = predictions.probabilities(task, temperature)[rows].max(axis=1)
            panels[name] = reliability_bins(confidence, correct)
            table.append(_calibration_row(predictions, task, rows, temperature, confidence, correct))
        section.figures[f"reliability_{split}_{file_name(task)}"] = reliability_figure(
            panels, f"{task}, {split} (n = {len(rows)})"
        )
    if table:
        section.tables[f"calibration_{split}"] = pd.DataFrame(table)
    if without := [task for task in predictions.tasks if task not in temperatures]:
        section.missing.append(
            f"No temperature is fitted for {', '.join(without)}: `python -m evaluation calibrate {run}` does, on val."
        )
    return section


def _calibration_row(
    predictions: Predictions,
    task: str,
    rows: NDArray[np.int64],
    temperature: float,
    confidence: NDArray[np.float64],
    correct: NDArray[np.bool_],
) -> dict[str, Any]:
    return {
        "task": task,
        "T": temperature,
        "n": len(rows),
        "accuracy": float(correct.mean()),
        "mean confidence": float(confidence.mean()),
        "ECE [95 %]": with_interval(*calibration_error(confidence, correct, predictions.groups[rows])),
        "by chance": float(chance_errors(confidence).mean()),
        "ECE, bins of equal mass": expected_calibration_error(confidence, correct, binning="mass"),
        "NLL": negative_log_likelihood(predictions.logits[task][rows], predictions.targets[task][rows], temperature),
    }


def _score_row(summary: TaskSummary, num_classes: int) -> dict[str, Any]:
    trivial = num_classes <= _ALWAYS_IN_TOP
    return {
        "task": summary.task,
        "n": summary.n,
        "groups": summary.groups,
        "classes": num_classes,
        "majority": share(summary.majority),
        "accuracy [95 %]": with_interval(summary.accuracy, summary.accuracy_interval),
        "Wilson": _bounds(summary.accuracy_wilson),
        "macro F1 [95 %]": with_interval(summary.f1_macro, summary.f1_macro_interval),
        "weighted F1 [95 %]": with_interval(summary.f1_weighted, summary.f1_weighted_interval),
        "top-3 [95 %]": "–" if trivial else with_interval(summary.top3_accuracy, summary.top3_interval),
        "note": summary.note,
    }


def _degenerate(predictions: Predictions, task: str) -> list[str]:
    """What makes the numbers of a task say little or nothing."""
    rows = known(predictions.targets[task])
    occur = np.unique(predictions.targets[task][rows])
    if len(occur) != 1:
        return []
    return [
        f"{task}: the only class in the targets is {str(predictions.tasks[task][occur[0]])!r}, so its scores do not "
        "say whether classes are told apart."
    ]


def _interval(correct: NDArray[np.bool_], groups: NDArray[Any]) -> str:
    return _bounds(clustered_wilson(correct, groups))


def _bounds(interval: tuple[float, float]) -> str:
    low, high = interval
    return "–" if np.isnan(low) else f"[{low:.3f}, {high:.3f}]"
