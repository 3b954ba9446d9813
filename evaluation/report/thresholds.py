"""Thresholds: curves with bands by group, operating points chosen on validation, and their section of a report.

* ``roc``: true-positive rate over false-positive rate (Fawcett, Pattern Recognition Letters 27, 2006).
* ``precision_recall``: precision over recall (Davis & Goadrich, ICML 2006).
* ``risk_coverage``: share of errors among the samples that are predicted, over their share, the most confident ones
  first (El-Yaniv & Wiener, JMLR 11, 2010; Geifman & El-Yaniv, NeurIPS 2017).

A band is, at each of the thresholds that a curve shows, the 95 % interval of its height at that threshold
(``intervals.share_interval``): it holds for one threshold, not for the whole curve at once. Thresholds that are chosen
are chosen on validation (``choose_threshold``) and measured on test (``rates``).

Example:
    >>> from evaluation.report.thresholds import curves_of
    >>> curves = curves_of(run.predictions("test"), "class", "roc")
    >>> sorted(curves) == sorted(run.model.tasks["class"])
    True
    >>> curve = next(iter(curves.values()))
    >>> bool((curve.low <= curve.y).all() and (curve.y <= curve.high).all())
    True
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.report.charts import Chart, Span, line_chart
from evaluation.report.page import Section
from evaluation.statistics.intervals import Estimate, Statistic, estimate, share_interval
from evaluation.statistics.scores import aurc_statistic, auroc, auroc_statistic, precision_statistic
from evaluation.tables.summary import with_interval
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.predictions import OperatingPoint, Predictions, refuse_kinds
from vitrail.trust import file_name
from vitrail.types import CLASS_KINDS, UNKNOWN

if TYPE_CHECKING:
    import pandas as pd


Shape = Literal["roc", "precision_recall", "risk_coverage"]

POINTS = 100
"""Thresholds that a curve shows, at most."""


@dataclass(frozen=True)
class Curve:
    """A curve of P points, from the highest threshold to the lowest.

    Attributes:
        shape: which curve.
        x: float64 ``(P,)``, false-positive rate, recall or coverage; rising.
        y: float64 ``(P,)``, true-positive rate, precision or risk.
        low: float64 ``(P,)``, lower end of the 95 % interval of ``y`` by group.
        high: float64 ``(P,)``, upper end.
        thresholds: float64 ``(P,)``; what reaches a threshold counts as positive, or is predicted.
        area: AUROC, average precision or AURC (lower is better), with its 95 % interval.
        n: samples.
        positives: among them positive ones, or errors.
    """

    shape: Shape
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    area: Estimate
    n: int
    positives: int


def curve(
    shape: Shape,
    positive: NDArray[np.bool_],
    scores: NDArray[np.floating[Any]],
    groups: NDArray[Any],
    *,
    has_band: bool = True,
) -> Curve:
    """Return a curve of N samples.

    Args:
        shape: which curve.
        positive: bool ``(N,)``, positive samples; of the risk-coverage curve the errors. At least one is and one is
            not, except for the risk-coverage curve.
        scores: ``(N,)``, the higher the more likely positive; of the risk-coverage curve confidences.
        groups: ``(N,)``, the group of each sample.
        has_band: compute the interval at each threshold; otherwise its ends are NaN.
    """
    everything, index = np.ones(len(positive), dtype=bool), np.unique(groups, return_inverse=True)[1]
    thresholds = np.unique(scores)[::-1]
    if len(thresholds) > POINTS:
        thresholds = thresholds[np.linspace(0, len(thresholds) - 1, POINTS).round().astype(int)]
    x, y, ends = [], [], []
    for threshold in thresholds:
        marked = scores >= threshold
        below = {"roc": ~positive, "precision_recall": positive, "risk_coverage": everything}[shape]
        among, hit = (positive, marked) if shape == "roc" else (marked, positive)
        own = hit[among].astype(np.float64)
        x.append(marked[below].mean())
        y.append(own.mean())
        ends.append(share_interval(own, index[among]) if has_band else (np.nan, np.nan))
    statistics: dict[Shape, Statistic] = {
        "roc": auroc_statistic(positive[:, None], scores[:, None]),
        "precision_recall": precision_statistic(positive[:, None], scores[:, None]),
        "risk_coverage": aurc_statistic(positive, scores.astype(np.float64)),
    }
    low, high = np.array(ends).T
    area = estimate(statistics[shape], groups)
    found = np.array(x), np.array(y), low, high, thresholds.astype(np.float64)
    return Curve(shape, *found, area, len(positive), int(positive.sum()))


def curves_of(predictions: Predictions, task: str, shape: Shape) -> dict[str, Curve]:
    """Return a curve for each class (against the others) or label, by name; of risk and coverage one, by task.

    Classes without positive or without negative samples have none.

    Args:
        predictions: of one split; calibrated ones for calibrated thresholds (``Run.calibrated``).
        task: single-label, ordinal or, except for risk and coverage, multi-label.
        shape: which curve.

    Raises:
        UserError: the task is of another kind.
    """
    if shape == "risk_coverage":
        refuse_kinds({task: predictions.kind(task)}, "risk-coverage curve")
        own = predictions.take(predictions.known(task))
        wrong = own.predicted(task) != own.targets[task]
        return {task: curve(shape, wrong, own.probabilities(task).max(axis=1), own.groups)} if len(own) else {}
    found = {}
    for name, (positive, scores, groups) in sides_of(predictions, task).items():
        if positive.any() and not positive.all():
            found[name] = curve(shape, positive, scores, groups)
    return found


class Side(NamedTuple):
    """One class against the others, or one label, on the N samples with a known target of it.

    Attributes:
        positive: bool ``(N,)``.
        scores: float64 ``(N,)``, its probability.
        groups: object ``(N,)``.
    """

    positive: NDArray[np.bool_]
    scores: NDArray[np.float64]
    groups: NDArray[np.object_]


def sides_of(predictions: Predictions, task: str) -> dict[str, Side]:
    """Return each class or label of a task by name (UserError for a task of numbers)."""
    kind = predictions.kind(task)
    refuse_kinds({task: kind}, "curves over thresholds", handles=(*CLASS_KINDS, "multi_label"))
    own = predictions.take(predictions.known(task))
    targets, names = own.targets[task], map(str, own.tasks[task])
    if kind == "multi_label":
        scores = own.label_probabilities(task)
        rows = [targets[:, place] != UNKNOWN for place in range(targets.shape[1])]
        return {
            name: Side(targets[kept, place] == 1, scores[kept, place], own.groups[kept])
            for place, (name, kept) in enumerate(zip(names, rows, strict=True))
        }
    scores = own.probabilities(task)
    return {name: Side(targets == place, scores[:, place], own.groups) for place, name in enumerate(names)}


class Goal(NamedTuple):
    """What an operating point is to reach, such as ``recall>=.95``.

    Attributes:
        rate: ``recall``, ``precision``, ``fpr`` (false-positive rate) or ``specificity`` of one class or label;
            ``risk``, ``accuracy`` or ``coverage`` of a model that may abstain.
        bound: between 0 and 1; the lowest value, of ``fpr`` and ``risk`` the highest.
    """

    rate: str
    bound: float

    def __str__(self) -> str:
        return f"{self.rate}{'<=' if self.rate in _AT_MOST else '>='}{self.bound:g}"

    @property
    def abstains(self) -> bool:
        """Whether what is below the threshold is not predicted at all."""
        return self.rate in ("risk", "accuracy", "coverage")


_AT_MOST = ("fpr", "risk")
_RATES = ("recall", "precision", "fpr", "specificity", "risk", "accuracy", "coverage")


def parsed_goal(text: str) -> Goal:
    """Read a goal such as ``recall>=.95`` or ``fpr<=.01``.

    Raises:
        UserError: it is none.

    Example:
        >>> from evaluation.report.thresholds import parsed_goal
        >>> parsed_goal("recall >= .95")
        Goal(rate='recall', bound=0.95)
    """
    found = re.fullmatch(r"\s*(\w+)\s*(>=|<=)\s*(\d*\.?\d+)\s*", text)
    if found and found[1] in _RATES and (found[2] == "<=") == (found[1] in _AT_MOST) and 0 < float(found[3]) < 1:
        return Goal(found[1], float(found[3]))
    shown = ", ".join(f"{rate}{'<=' if rate in _AT_MOST else '>='}X" for rate in _RATES)
    raise UserError(f"--operating-point {text}: must be one of {shown}, X between 0 and 1")


def choose_threshold(goal: Goal, positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> float | None:
    """Return the threshold that reaches a goal at the least cost; None where there is none.

    Of recall and coverage it is the highest that reaches them, otherwise the lowest. To be chosen on validation: on
    other data it may miss the goal.

    Args:
        goal: what to reach.
        positive: bool ``(N,)``; of a goal that abstains the right predictions.
        scores: ``(N,)``; of a goal that abstains confidences.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    hits, marked = positive[order].cumsum()[ends], ends + 1
    n_positive = max(int(positive.sum()), 1)
    rates = {
        "recall": hits / n_positive,
        "precision": hits / marked,
        "fpr": (marked - hits) / max(len(scores) - n_positive, 1),
        "coverage": marked / len(scores),
    }
    rates |= {"specificity": 1 - rates["fpr"], "accuracy": rates["precision"], "risk": 1 - rates["precision"]}
    own = rates[goal.rate]
    reached = np.flatnonzero(own <= goal.bound + 1e-12 if goal.rate in _AT_MOST else own >= goal.bound - 1e-12)
    if not len(reached):
        return None
    return float(scores[order][ends[reached[0 if goal.rate in ("recall", "coverage") else -1]]])


def rates(
    positive: NDArray[np.bool_], marked: NDArray[np.bool_], groups: NDArray[Any], *, abstains: bool = False
) -> dict[str, Estimate]:
    """Return what is reached at a threshold, with 95 % intervals by group; NaN where no sample shows it.

    Args:
        positive: bool ``(N,)``; where the model abstains the right predictions.
        marked: bool ``(N,)``, what reaches the threshold.
        groups: ``(N,)``, the group of each sample.
        abstains: return ``accuracy`` and ``coverage`` instead of ``recall``, ``precision`` and ``fpr``.
    """
    everything = np.ones(len(positive), dtype=bool)
    shares = {"recall": (marked, positive), "precision": (positive, marked), "fpr": (marked, ~positive)}
    if abstains:
        shares = {"accuracy": (positive, marked), "coverage": (marked, everything)}
    found = {}
    for name, (hit, among) in shares.items():
        own = hit[among].astype(np.float64)
        found[name] = Estimate(float(own.mean()) if len(own) else np.nan, share_interval(own, groups[among]))
    return found


Row = dict[str, Any]


def choose_point(validation: Predictions, goal: str, task: str = "", positive: str = "") -> dict[str, OperatingPoint]:
    """Choose the thresholds of one task.

    Args:
        validation: calibrated predictions.
        goal: such as ``recall>=.95``.
        task: its name, by default the first one with classes or labels.
        positive: class that the goal is about; by default the last of two classes, or every label.

    Returns:
        The point by task; labels that do not reach the goal on validation have no threshold.

    Raises:
        UserError: the goal is none, there is no such task or class, or no threshold reaches the goal.
    """
    wanted = parsed_goal(goal)
    having = [name for name in validation.tasks if validation.kind(name) in (*CLASS_KINDS, "multi_label")]
    task = task or next(iter(having), "")
    if task not in having:
        raise UserError(f"--task {task}: must be a task with classes or labels: {', '.join(having) or '(none)'}")
    names = [str(name) for name in validation.tasks[task]]
    one_class = validation.kind(task) in CLASS_KINDS
    if wanted.abstains:
        if not one_class:
            raise UserError(
                f"--operating-point {goal}: '{task}' has labels; give recall, precision, fpr or specificity"
            )
        thresholds = _reached(wanted, {"": _confidences(validation, task)})
    else:
        if one_class and not positive and len(names) > 2:
            raise UserError(
                f"--operating-point {goal}: '{task}' has {len(names)} classes; say which by --positive CLASS"
            )
        positives = [positive] if positive else names[-1:] if one_class else names
        if missing := [name for name in positives if name not in names]:
            raise UserError(f"--positive {missing[0]}: must be one of {', '.join(names)}")
        sides = sides_of(validation, task)
        thresholds = _reached(wanted, {name: sides[name] for name in positives})
    if not thresholds:
        raise UserError(f"--operating-point {goal}: no threshold of '{task}' reaches it on validation; ask for less")
    return {task: OperatingPoint(str(wanted), thresholds)}


def _reached(goal: Goal, sides: Mapping[str, Side]) -> dict[str, float]:
    found = {name: choose_threshold(goal, side.positive, side.scores) for name, side in sides.items() if len(side[0])}
    return {name: threshold for name, threshold in found.items() if threshold is not None}


def _confidences(predictions: Predictions, task: str) -> Side:
    own = predictions.take(predictions.known(task))
    right = own.predicted(task) == own.targets[task]
    return Side(right, own.probabilities(task).max(axis=1), own.groups)


def point_rows(points: Mapping[str, OperatingPoint], splits: Mapping[str, Predictions]) -> list[Row]:
    """Return what the points reach on each split of calibrated predictions, with intervals by group."""
    rows = []
    for task, point in points.items():
        for name, threshold in point.thresholds.items():
            for split, predictions in splits.items():
                side = sides_of(predictions, task)[name] if name else _confidences(predictions, task)
                found = rates(side.positive, side.scores >= threshold, side.groups, abstains=not name)
                fixed = {"task": task, "class": name, "point": point.goal, "threshold": threshold, "split": split}
                rows.append({**fixed, "n": len(side.scores), "positive": int(side.positive.sum()), **found})
    return rows


def point_tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table of points of classes and labels, and one of those below which nothing is predicted."""
    tables = []
    for shown in (("recall", "precision", "fpr"), ("accuracy", "coverage")):
        if own := [row for row in rows if shown[0] in row]:
            counted = "right" if "accuracy" in shown else "positive"
            columns = ("task", "class", "point", "threshold", "split", "n", counted)
            cells = [[*_texts(row), *(_cell(row[name]) for name in shown)] for row in own]
            headings = [f"{'FPR' if name == 'fpr' else name} [95 %]" for name in shown]
            tables.append(Table([*columns, *headings], cells, ("task", "class", "point", "split")))
    return tables


def _texts(row: Row) -> list[str]:
    fixed = [row["task"], row["class"] or "(confidence)", row["point"], f"{row['threshold']:.4g}", row["split"]]
    return [*fixed, str(row["n"]), str(row["positive"])]


def _cell(found: Estimate) -> str:
    return "–" if np.isnan(found.value) else with_interval(*found)


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
                "`evaluation.report.thresholds.curves_of` makes them."
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
