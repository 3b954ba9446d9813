"""Curves over thresholds with bands by group, and operating points.

* ``roc``: true-positive rate over false-positive rate (Fawcett, Pattern Recognition Letters 27, 2006).
* ``precision_recall``: precision over recall (Davis & Goadrich, ICML 2006).
* ``risk_coverage``: share of errors among the samples that are predicted, over their share, the most confident ones
  first (El-Yaniv & Wiener, JMLR 11, 2010; Geifman & El-Yaniv, NeurIPS 2017).

A band is, at each of the thresholds that a curve shows, the 95 % interval of its height at that threshold
(``intervals.share_interval``): it holds for one threshold, not for the whole curve at once. Thresholds that are chosen
are chosen on validation (``choose_threshold``) and measured on test (``rates``).

Example:
    >>> from evaluation.statistics.curves import curves_of
    >>> curves = curves_of(run.predictions("test"), "class", "roc")
    >>> sorted(curves) == sorted(run.model.tasks["class"])
    True
    >>> curve = next(iter(curves.values()))
    >>> bool((curve.low <= curve.y).all() and (curve.y <= curve.high).all())
    True
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.intervals import Estimate, Statistic, estimate, share_interval
from evaluation.statistics.scores import aurc_statistic, auroc_statistic, precision_statistic
from vitrail.errors import UserError
from vitrail.predictions import Predictions, refuse_kinds
from vitrail.types import CLASS_KINDS, UNKNOWN

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
        >>> from evaluation.statistics.curves import parsed_goal
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
