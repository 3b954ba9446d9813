"""The section of a report on thresholds: receiver operating characteristics, precision and recall, abstaining."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.report.charts import Chart, Span, line_chart
from evaluation.report.page import Section
from evaluation.statistics.curves import Curve, Shape, Side, curve, curves_of, sides_of
from evaluation.statistics.scores import auroc
from evaluation.tables.summary import with_interval
from vitrail.predictions import Predictions
from vitrail.trust import file_name
from vitrail.types import CLASS_KINDS

if TYPE_CHECKING:
    import pandas as pd

MOST = 10
"""Classes or labels of a task that have curves."""

_MANY = 4  # bands that would hide each other

_LARGEST = 5_000_000  # samples times classes up to which those with the lowest AUROC are looked for

_SHAPES: dict[Shape, tuple[str, str, str]] = {
    "roc": ("ROC", "false-positive rate", "true-positive rate (recall)"),
    "precision_recall": ("precision and recall", "recall", "precision"),
}
_AREAS = {"roc": "AUROC [95 %]", "precision_recall": "average precision [95 %]"}


def thresholds_section(predictions: Predictions, split: str) -> Section:
    """Curves of each class against the others or of each label, and of errors over coverage.

    Args:
        predictions: of tasks with classes or labels.
        split: that was predicted.
    """
    section = Section("Thresholds")
    for task in predictions.tasks:
        if not len(predictions.known(task)):
            section.missing.append(f"Of {task!r} no target is known.")
            continue
        stem = f"{split}_{file_name(task)}"
        if predictions.kind(task) in CLASS_KINDS:
            own = curves_of(predictions, task, "risk_coverage")[task]
            section.charts[f"risk_coverage_{stem}"] = _abstaining(task, own)
        if predictions.logits[task].size > _LARGEST:
            section.paragraphs.append(
                f"{task}: {len(predictions.tasks[task]):,} classes on {len(predictions):,} images have no curve each; "
                "`evaluation.statistics.curves.curves_of` makes them."
            )
            continue
        sides = _worst(sides_of(predictions, task))
        if len(sides) < len(predictions.tasks[task]):
            section.paragraphs.append(
                f"{task}: curves of the {len(sides)} of {len(predictions.tasks[task])} with the lowest AUROC."
            )
        has_bands = len(sides) < _MANY
        curves = {
            shape: {name: curve(shape, *side, has_band=has_bands) for name, side in sides.items()} for shape in _SHAPES
        }
        if sides:
            for shape, own_curves in curves.items():
                section.charts[f"{shape}_{stem}"] = _of_classes(task, shape, own_curves)
            section.tables[f"areas_{stem}"] = _areas(task, sides, curves)
    if section.charts:
        section.paragraphs.insert(
            0,
            "Each class is separated from all others, each label from its absence, by its probability. Risk is the "
            "share of errors among what is predicted where the least confident images are left out; AURC is its mean. "
            "Bands are 95 % intervals by group at each threshold.",
        )
    return section


def _worst(sides: dict[str, Side]) -> dict[str, Side]:
    """Those with both positive and negative samples; of many the ones with the lowest AUROC, in their order."""
    usable = {name: side for name, side in sides.items() if side.positive.any() and not side.positive.all()}
    if len(usable) <= MOST:
        return usable
    areas = {name: auroc(side.positive, side.scores) for name, side in usable.items()}
    kept = set(sorted(usable, key=areas.__getitem__)[:MOST])
    return {name: side for name, side in usable.items() if name in kept}


def _abstaining(task: str, own: Curve) -> Chart:
    return line_chart(
        f"{task}: risk and coverage",
        {"risk": (own.x, own.y)},
        "coverage",
        "risk",
        bands={"risk": (own.x, own.low, own.high)},
        caption=f"AURC {with_interval(*own.area)}, lower is better; {own.positives:,} of {own.n:,} are errors.",
    )


def _of_classes(task: str, shape: Shape, curves: dict[str, Curve]) -> Chart:
    title, x, y = _SHAPES[shape]
    # From the corner where everything is negative; precision is not defined there.
    begin = np.zeros(1 if shape == "roc" else 0)
    lines = {name: (np.append(begin, own.x), np.append(begin, own.y)) for name, own in curves.items()}
    bands = {name: (own.x, own.low, own.high) for name, own in curves.items()} if len(curves) < _MANY else {}
    return line_chart(f"{task}: {title}", lines, x, y, unit=True, diagonal=shape == "roc", bands=bands)


def _areas(task: str, sides: dict[str, Side], curves: dict[Shape, dict[str, Curve]]) -> pd.DataFrame:
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for name, side in sides.items():
        row: dict[str, Any] = {"class": name}
        for shape, chance in (("roc", 0.5), ("precision_recall", float(side.positive.mean()))):
            area = curves[shape][name].area  # type: ignore[index]  # both are shapes
            row[_AREAS[shape]] = Span(area, with_interval(*area), (0.0, 1.0), chance)
        rows.append({**row, "positive": int(side.positive.sum()), "n": len(side.positive), "task": task})
    return pd.DataFrame(rows)
