"""Labels that a classifier's out-of-sample predictions disagree with.

Labels are suspected by confident learning, Northcutt, Jiang & Chuang, JAIR 70 (2021), from predictions of images that
the classifier was not trained on. A class's threshold is the mean probability that images labelled with it get for it.
An image that reaches the threshold of another class, and of no class more clearly, is counted in the confident joint at
(its label, that class); all off its diagonal are suspected. Classes that the classifier finds hard have low thresholds
and others high ones, so a timid or a bold classifier does no harm. Where features are poor, most suspected labels are
right. Of multi-label tasks each label is a task of two classes (Thyagarajan et al., arXiv:2211.13895); of numbers those
are suspected whose residual is far from the others'.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.dataset.features import Reduction, fitted, probabilities
from vitrail.errors import UserError
from vitrail.predictions import LABEL_SEPARATOR, Predictions, predicted_classes
from vitrail.types import UNKNOWN

FOLDS = 5

FAR = 3.5
"""Robust standard deviations from which a residual is far (Iglewicz and Hoaglin, 1993)."""


@dataclass(frozen=True)
class LabelIssues:
    """What is suspected of N labelled samples and C classes.

    Attributes:
        rows: int64 ``(S,)``, the suspected ones, the most suspicious first.
        suggested: int64 ``(S,)``, the class that the classifier is confident of.
        margin: float64 ``(S,)``, probability of the label less that of the best other class, -1 to 1; lower is more
            suspicious.
        joint: int64 ``(C, C)``, the confident joint: row the label, column the confident class.
        noise: estimated share of wrong labels, 0 to 1; the joint's off-diagonal after each class is scaled to its size.
        evaluated: samples that could be evaluated.
        accuracy: share of these that the classifier gives their label.
    """

    rows: NDArray[np.int64]
    suggested: NDArray[np.int64]
    margin: NDArray[np.float64]
    joint: NDArray[np.int64]
    noise: float
    evaluated: int
    accuracy: float


def out_of_fold(
    features: NDArray[Any],
    labels: NDArray[np.int64],
    groups: NDArray[Any],
    num_classes: int,
    *,
    folds: int = FOLDS,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Return probabilities from a linear probe that saw neither the sample nor any other sample of its group.

    Args:
        features: ``(N, D)``.
        labels: int64 ``(N,)``, all known.
        groups: ``(N,)``, the physical object of each.
        num_classes: C.
        folds: at most; fewer where there are fewer groups, or fewer samples of every class.
        seed: of the division.

    Returns:
        float64 ``(N, C)``; NaN in the rows whose label the other folds do not have, which cannot be evaluated.

    Raises:
        UserError: for fewer than two classes or groups, classes of one sample only, or features that are not finite.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    _check(features, labels, groups)
    folds = min(folds, len(np.unique(groups)), int(np.bincount(labels).max()))
    result = np.full((len(labels), num_classes), np.nan)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, held_out in _divisions(splitter, labels, groups):
        present = np.unique(labels[train])
        if len(present) < 2:
            continue
        reduction = Reduction(features[train])
        classifier = fitted(reduction(features[train]), labels[train])
        rows = held_out[np.isin(labels[held_out], present)]
        if len(rows):
            result[rows] = probabilities(classifier, reduction(features[rows]), num_classes)
    return result


def find_label_issues(probability: NDArray[np.float64], labels: NDArray[np.int64]) -> LabelIssues:
    """Apply confident learning to out-of-fold probabilities ``(N, C)``, with NaN rows for samples to leave out."""
    num_classes = probability.shape[1]
    evaluated = np.flatnonzero(np.isfinite(probability).all(axis=1))
    probability, given = probability[evaluated], labels[evaluated]
    counts = np.bincount(given, minlength=num_classes)
    own = np.take_along_axis(probability, given[:, None], axis=1)[:, 0] if len(evaluated) else np.zeros(0)
    sums = np.bincount(given, weights=own, minlength=num_classes)
    # A class without samples has no threshold that could be reached.
    threshold = np.divide(sums, counts, out=np.full(num_classes, np.inf), where=counts > 0)
    reached = np.where(probability >= threshold, probability, -np.inf)
    is_confident = np.isfinite(reached).any(axis=1)
    confident = reached.argmax(axis=1) if len(evaluated) else np.zeros(0, np.int64)
    joint = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(joint, (given[is_confident], confident[is_confident]), 1)
    others = probability.copy()
    np.put_along_axis(others, given[:, None], -np.inf, axis=1)
    margin = own - (others.max(axis=1) if len(evaluated) else own)
    places = np.flatnonzero(is_confident & (confident != given))
    places = places[np.argsort(margin[places], kind="stable")]
    right = float((predicted_classes(probability) == given).mean()) if len(evaluated) else float("nan")
    return LabelIssues(
        evaluated[places], confident[places], margin[places], joint, _noise(joint, counts), len(evaluated), right
    )


def _noise(joint: NDArray[np.int64], counts: NDArray[np.int64]) -> float:
    """Share off the diagonal, once each label's row is scaled to as many samples as have the label."""
    totals = joint.sum(axis=1)
    rows = totals > 0
    if not rows.any():
        return float("nan")
    right = np.diag(joint)[rows] / totals[rows] * counts[rows]
    return float(1 - right.sum() / counts[rows].sum())


def _check(features: NDArray[Any], labels: NDArray[np.int64], groups: NDArray[Any]) -> None:
    if len(np.unique(labels)) < 2:
        raise UserError("label issues: there are fewer than two classes with a labelled sample, so nothing to compare")
    if np.bincount(labels).max() < 2:
        raise UserError("label issues: no class has two labelled samples, so none can be evaluated by others")
    if len(np.unique(groups)) < 2:
        raise UserError("label issues: all samples are of one group, so none can be evaluated by others")
    if not np.isfinite(features).all():
        raise UserError("label issues: features are not finite; has the model diverged?")


def _divisions(splitter: Any, labels: NDArray[np.int64], groups: NDArray[Any]) -> list[tuple[Any, Any]]:
    with warnings.catch_warnings():
        # Classes with fewer samples than folds are in some folds only, and are reported as not evaluated.
        warnings.filterwarnings("ignore", message="The least populated class")
        return list(splitter.split(np.zeros(len(labels)), labels, groups))


@dataclass(frozen=True)
class Suspect:
    """One label of one sample that is suspected.

    Attributes:
        place: of the sample in the predictions.
        old: its label, as text; of multi-label tasks all its labels.
        new: what the model is confident of, in the same form.
        score: margin of the label, -1 to 1, or minus the residual in robust standard deviations; lower is worse.
    """

    place: int
    old: str
    new: str
    score: float


def suspects_of(predictions: Predictions, task: str) -> list[Suspect]:
    """Return the suspected labels of a task of any kind, the most suspicious first; predictions are out of sample."""
    kind, names = predictions.kind(task), predictions.tasks[task]
    if kind == "regression":
        return _suspected_numbers(predictions, task)
    if kind == "multi_label":
        return _suspected_sets(predictions, task)
    rows = predictions.known(task)
    issues = find_label_issues(predictions.probabilities(task)[rows], predictions.targets[task][rows])
    found = zip(rows[issues.rows].tolist(), issues.suggested.tolist(), issues.margin.tolist(), strict=True)
    targets = predictions.targets[task]
    return [Suspect(row, names[targets[row]], names[other], margin) for row, other, margin in found]


def find_multi_label_issues(probability: NDArray[np.float64], targets: NDArray[np.int8]) -> NDArray[np.float64]:
    """Return margins of suspected entries, float64 ``(N, C)``, NaN where an entry is not suspected.

    Args:
        probability: ``(N, C)``, of each label, out of sample.
        targets: int8 ``(N, C)``, 1, 0 or ``UNKNOWN``.
    """
    margins = np.full(probability.shape, np.nan)
    for label in range(probability.shape[1]):
        rows = np.flatnonzero(targets[:, label] != UNKNOWN)
        of_label = probability[rows, label]
        issues = find_label_issues(np.stack([1 - of_label, of_label], axis=1), targets[rows, label].astype(np.int64))
        # Of two classes the other one may be confident without being the more probable one.
        wrong = issues.margin < 0
        margins[rows[issues.rows[wrong]], label] = issues.margin[wrong]
    return margins


def _suspected_sets(predictions: Predictions, task: str) -> list[Suspect]:
    names, targets = predictions.tasks[task], predictions.targets[task]
    margins = find_multi_label_issues(predictions.label_probabilities(task), targets)

    def text(marked: NDArray[Any]) -> str:
        return LABEL_SEPARATOR.join(name for name, one in zip(names, marked, strict=True) if one == 1)

    rows = np.flatnonzero(np.isfinite(margins).any(axis=1))
    found = []
    for row in rows[np.argsort(np.nanmin(margins[rows], axis=1), kind="stable")].tolist() if len(rows) else []:
        flipped = np.where(np.isfinite(margins[row]), 1 - targets[row], targets[row])
        found.append(Suspect(row, text(targets[row]), text(flipped), float(np.nanmin(margins[row]))))
    return found


def _suspected_numbers(predictions: Predictions, task: str) -> list[Suspect]:
    rows = predictions.known(task)
    targets, values = predictions.targets[task][rows].astype(np.float64), predictions.values(task)[rows]
    residual = targets - values
    away = residual - np.median(residual) if len(rows) else residual
    spread = 1.4826 * float(np.median(np.abs(away))) if len(rows) else 0.0
    if not spread:
        return []
    far = np.abs(away) / spread
    places = np.flatnonzero(far > FAR)
    return [
        Suspect(int(rows[place]), f"{targets[place]:g}", f"{values[place]:.4g}", -float(far[place]))
        for place in places[np.argsort(-far[places], kind="stable")].tolist()
    ]
