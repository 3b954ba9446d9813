"""Sections of a report on tasks without a single class: labels one by one, numbers, and the calibration of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from evaluation.report.charts import histogram_chart, reliability_chart, scatter_chart
from evaluation.report.images import mistakes_name
from evaluation.report.page import Matrix, Section
from evaluation.statistics.calibration import reliability_bins
from evaluation.statistics.intervals import share_interval
from evaluation.tables.calibration import label_calibration_table, label_rows, number_calibration_table, number_rows
from vitrail.console import Table
from vitrail.predictions import OutputCalibration, Predictions
from vitrail.trust import file_name
from vitrail.types import UNKNOWN

if TYPE_CHECKING:
    import pandas as pd

NOTHING = "(nothing)"
"""Row of labels that were predicted where nothing was missed, and column of those missed where none was predicted."""

_FEW = 5


def labels_section(predictions: Predictions, train: Mapping[str, Sequence[int]], split: str) -> Section:
    """Scores of every label of the multi-label tasks, and which labels are predicted where others are missed.

    Args:
        predictions: of multi-label tasks only.
        train: training samples of each label by task; a task may be missing.
        split: that was predicted.
    """
    section = Section("Labels")
    for task in predictions.tasks:
        if not len(predictions.known(task)):
            section.missing.append(f"Of {task!r} no target is known.")
            continue
        table = label_table(predictions, task, train.get(task))
        section.tables[f"labels_{split}_{file_name(task)}"] = table
        few = [f"{name} ({n})" for name, n in zip(table["label"], table["support"], strict=True) if n < _FEW]
        if few:
            section.paragraphs.append(
                f"{task}: fewer than {_FEW} samples, so their scores mean little: {', '.join(few)}."
            )
        counts = label_mistakes(predictions, task)
        if counts.to_numpy().any():
            heading, facets = f"{task}: mistakes in the same image", ("missed", "wrongly predicted")
            section.matrices.append(Matrix(heading, counts, mistakes_name(task, split), facets))
            section.files[f"label_mistakes_{split}_{file_name(task)}"] = counts.rename_axis(columns=None).reset_index()
    if section.tables:
        section.paragraphs.insert(
            0,
            "A label is predicted where its probability reaches its threshold. AP and AUROC do not depend on it. The "
            "interval of recall is Wilson's with the effective number of samples. Below, a row is a label that was "
            f"missed, a column one that was wrongly predicted in the same image; {NOTHING} means that there was none.",
        )
    return section


def label_table(predictions: Predictions, task: str, train: Sequence[int] | None = None) -> pd.DataFrame:
    """Return one row a label; NaN where there is nothing to compute a number from.

    Columns are ``label``, ``train`` where known, ``samples`` (with a known entry), ``support`` (that it applies to),
    ``groups`` (that these are of), ``prevalence``, ``AP``, ``AUROC``, ``threshold``, ``predicted`` (how often),
    ``precision``, ``recall``, its interval as text, and ``f1``.
    """
    import pandas as pd
    from sklearn.metrics import average_precision_score, roc_auc_score

    targets, probabilities = predictions.targets[task], predictions.label_probabilities(task)
    marked, thresholds = predictions.predicted_labels(task), predictions.thresholds_of(task)
    rows = []
    for column, name in enumerate(predictions.tasks[task]):
        known = targets[:, column] != UNKNOWN
        applies, given = targets[known, column] == 1, marked[known, column]
        scores, groups = probabilities[known, column], predictions.groups[known][applies]
        support, hits = int(applies.sum()), int((applies & given).sum())
        low, high = share_interval(given[applies].astype(np.float64), groups)
        rows.append(
            {
                "label": str(name),
                "AP": float(average_precision_score(applies, scores)) if support else np.nan,
                "AUROC": float(roc_auc_score(applies, scores)) if 0 < support < len(applies) else np.nan,
                "recall": hits / support if support else np.nan,
                "recall [95 %]": f"[{low:.3f}, {high:.3f}]" if support else "–",
                "precision": hits / given.sum() if given.any() else np.nan,
                "f1": 2 * hits / (support + int(given.sum())) if support else np.nan,
                "threshold": thresholds[column],
                "prevalence": support / len(applies) if len(applies) else np.nan,
                "support": support,
                "samples": len(applies),
                "groups": len(set(groups.tolist())),
                "predicted": int(given.sum()),
                **({} if train is None else {"train": train[column]}),
            }
        )
    return pd.DataFrame(rows)


def label_mistakes(predictions: Predictions, task: str) -> pd.DataFrame:
    """Count in how many images one label was missed and another wrongly predicted, int64 ``(C + 1, C + 1)``.

    The last row counts labels wrongly predicted in images where none was missed, the last column those missed in images
    where none was wrongly predicted.
    """
    import pandas as pd

    targets, marked = predictions.targets[task], predictions.predicted_labels(task)
    missed, wrong = (targets == 1) & ~marked, (targets == 0) & marked
    sides = [np.column_stack([side, ~side.any(axis=1)]).astype(np.int64) for side in (missed, wrong)]
    counts = sides[0].T @ sides[1]
    counts[-1, -1] = 0  # images without a mistake
    names = [*map(str, predictions.tasks[task]), NOTHING]
    index, columns = pd.Index(names, name="missed"), pd.Index(names, name="wrongly predicted")
    return pd.DataFrame(counts, index=index, columns=columns)


def numbers_section(predictions: Predictions, split: str) -> Section:
    """Predicted against true numbers of regression tasks, and their errors.

    Args:
        predictions: of regression tasks only.
        split: that was predicted.
    """
    section = Section("Numbers")
    for task in predictions.tasks:
        rows = predictions.known(task)
        if not len(rows):
            section.missing.append(f"Of {task!r} no target is known.")
            continue
        targets, values = predictions.targets[task][rows].astype(np.float64), predictions.values(task)[rows]
        errors = values - targets
        names, stem = [*map(str, predictions.names[rows])], f"{split}_{file_name(task)}"
        section.charts[f"numbers_{stem}"] = scatter_chart(
            f"{task}: predicted against true, n = {len(rows):,}",
            *_sampled(targets, values, names),
            ("true", "predicted"),
        )
        section.charts[f"errors_{stem}"] = histogram_chart(f"{task}: errors", errors, "error (predicted less true)")
        low, middle, high = np.quantile(errors, [0.05, 0.5, 0.95])
        section.paragraphs.append(
            f"{task}: errors (predicted less true) have a mean of {errors.mean():+.4g} and a median of {middle:+.4g}; "
            f"nine of ten lie between {low:+.4g} and {high:+.4g}."
        )
    return section


def outputs_calibration_section(
    predictions: Predictions, validation: Predictions | None, fitted: OutputCalibration, split: str, run: str
) -> Section:
    """How far probabilities of labels are from their shares, and how many true numbers intervals contain.

    Args:
        predictions: of multi-label and regression tasks only, as they were trained.
        validation: of the same tasks, on which intervals of numbers without a standard deviation rest.
        fitted: by ``calibrate``.
        split: that was predicted.
        run: its directory, named in what is missing.
    """
    section = Section("Calibration of labels and numbers")
    labels, numbers, without = [], [], []
    for task in predictions.tasks:
        if not len(predictions.known(task)):
            section.missing.append(f"Of {task!r} no target is known.")
            continue
        if predictions.kind(task) == "multi_label":
            labels += [{"split": split, **row} for row in label_rows(predictions, task, fitted)]
            own = (fitted.apply(predictions) if task in fitted.labels else predictions).take(predictions.known(task))
            known, applies = own.targets[task] != UNKNOWN, own.targets[task] == 1
            bins = reliability_bins(own.label_probabilities(task)[known], applies[known])
            stage = "calibrated" if task in fitted.labels else "as trained"
            section.charts[f"reliability_{split}_{file_name(task)}"] = reliability_chart(f"{task}, {stage}", bins)
        else:
            numbers += [{"split": split, **row} for row in number_rows(predictions, validation, task, fitted)]
        if task not in {**fitted.labels, **fitted.scales, **fitted.deviations}:
            without.append(task)
    if labels:
        section.tables[f"label_calibration_{split}"] = _frame(label_calibration_table(labels))
        section.paragraphs.append(
            "ECE of a label is the mean distance of the share of images that it applies to from its probability, in 15 "
            "bins of equal width; by chance is what perfectly calibrated probabilities would show with so few images."
        )
    if numbers:
        section.tables[f"number_calibration_{split}"] = _frame(number_calibration_table(numbers))
        section.paragraphs.append(
            "Coverage is the share of true values within intervals around the predicted ones; it should equal level."
        )
    if without:
        section.missing.append(
            f"Not calibrated: {', '.join(without)}. To fit on validation, run `python -m evaluation calibrate {run}`."
        )
    return section


def _frame(table: Table) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(table.rows, columns=list(table.columns))


_DRAWN = 3_000  # points of a chart; of more a sample


def _sampled(
    targets: NDArray[np.float64], values: NDArray[np.float64], names: list[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str]]:
    if len(names) <= _DRAWN:
        return targets, values, names
    kept = np.sort(np.random.default_rng(0).choice(len(names), _DRAWN, replace=False))
    return targets[kept], values[kept], [names[place] for place in kept.tolist()]
