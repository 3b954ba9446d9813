"""The scores of each kind of task as functions of sample weights, and those of predicting the same for every image.

=============  =====================================================================================================
single_label   ``accuracy``, ``f1_macro``, ``f1_weighted``, ``top3_accuracy``
ordinal        ``accuracy``, ``f1_macro``, ``mae`` (in classes), ``quadratic_kappa`` (Cohen, Psychological Bulletin 70,
               1968)
multi_label    ``mAP``, ``f1_macro``, ``f1_micro`` and ``exact_match`` (both at the thresholds)
regression     ``mae``, ``rmse``, ``r2``, ``spearman``
=============  =====================================================================================================

The first of each kind is its main score. Values equal those of scikit-learn and SciPy, and what ``fit`` and ``test``
log under the same names (``lightning_modules.heads``). Further scores are computed where they are asked for
(``FURTHER``):

* ``auroc`` and ``average_precision``: each class against the others, the mean over classes (of labels over labels).
* ``balanced_accuracy``, ``mcc`` (Gorodkin, Computational Biology and Chemistry 28, 2004), ``kappa`` (Cohen, 1960).
* ``brier`` (Brier, Monthly Weather Review 78, 1950; 0 to 2, of labels the mean over labels, 0 to 1) and ``nll``, the
  mean negative log-likelihood in nats.
* ``aurc``, the area under the risk-coverage curve of predictions that are made in the order of their confidence, and
  ``excess_aurc``, how much that is above the best possible order (Geifman & El-Yaniv, Selective Classification for Deep
  Neural Networks, NeurIPS 2017; Geifman, Uziel & El-Yaniv, ICLR 2019).
* ``accuracy@C``: accuracy of the share C of the samples that the model is most confident of; ``coverage@R``: the
  largest such share that is wrong with a risk of R at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.intervals import (
    FEW_GROUPS,
    Estimate,
    Interval,
    Linearised,
    Mean,
    Share,
    Statistic,
    accuracy_statistic,
    estimate,
    f1_statistic,
    in_top_k,
    known,
    majority_baseline,
    share_interval,
    share_statistic,
)
from vitrail.errors import UserError
from vitrail.predictions import Predictions
from vitrail.types import UNKNOWN, TaskKind

HEADINGS = {
    "accuracy": "accuracy",
    "f1_macro": "macro F1",
    "f1_weighted": "weighted F1",
    "top3_accuracy": "top-3",
    "mAP": "mAP",
    "f1_micro": "micro F1",
    "exact_match": "exact match",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R²",
    "spearman": "Spearman",
    "quadratic_kappa": "quadratic kappa",
    "balanced_accuracy": "balanced accuracy",
    "mcc": "MCC",
    "kappa": "kappa",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "brier": "Brier",
    "nll": "NLL",
    "aurc": "AURC",
    "excess_aurc": "excess AURC",
}
"""How tables call the scores."""

NAMES: dict[TaskKind, tuple[str, ...]] = {
    "single_label": ("accuracy", "f1_macro", "f1_weighted", "top3_accuracy"),
    "ordinal": ("accuracy", "f1_macro", "mae", "quadratic_kappa"),
    "multi_label": ("mAP", "f1_macro", "f1_micro", "exact_match"),
    "regression": ("mae", "rmse", "r2", "spearman"),
}
"""Scores of each kind, in the order of ``scores_of``."""

MAIN: dict[TaskKind, str] = {kind: names[0] for kind, names in NAMES.items()}
"""The score by which models of each kind are compared."""

_OF_CLASSES = (
    *("balanced_accuracy", "mcc", "kappa", "auroc", "average_precision", "brier", "nll", "aurc", "excess_aurc"),
    *("accuracy@C", "coverage@R"),
)
FURTHER: dict[TaskKind, tuple[str, ...]] = {
    "single_label": ("quadratic_kappa", *_OF_CLASSES),
    "ordinal": ("f1_weighted", "top3_accuracy", *_OF_CLASSES),
    "multi_label": ("auroc", "brier", "nll"),
    "regression": (),
}
"""Scores of each kind that are computed where they are asked for; C and R stand for numbers between 0 and 1."""

_AT: dict[TaskKind, set[str]] = {kind: {name[:-1] for name in names if "@" in name} for kind, names in FURTHER.items()}

IN_UNITS = ("mae", "rmse")
"""Errors in the units of the data."""

LOWER_IS_BETTER = (*IN_UNITS, "brier", "nll", "aurc", "excess_aurc")

TESTED = ("accuracy", "top3_accuracy", "exact_match", "mae", "brier", "nll")
"""Means over samples, whose differences have a test by group; of the others the interval alone decides."""


@dataclass(frozen=True)
class Score:
    """One score of a task on its N samples with known targets.

    Attributes:
        name: see ``heading``.
        statistic: as a function of sample weights; NaN where the score is not defined. A ``Mean`` where it is a mean of
            what each sample scored.
        bounds: lowest and highest value that it can have.
    """

    name: str
    statistic: Statistic
    bounds: tuple[float, float] = (0.0, 1.0)

    def estimate(self, groups: NDArray[Any], n_resamples: int = 5_000, *, seed: int = 0) -> Estimate:
        """Return it with its 95 % interval by group; ``groups`` is ``(N,)``."""
        if isinstance(self.statistic, Coverage):
            return Estimate(float(self.statistic(np.ones((1, len(groups))))[0]), self.statistic.interval(groups))
        return estimate(self.statistic, groups, n_resamples, seed=seed, bounds=self.bounds)


def is_defined(name: str, kind: TaskKind) -> bool:
    """Return whether tasks of a kind have a score; ``accuracy@0.8`` stands for any share."""
    return name in (*NAMES[kind], *FURTHER[kind]) or (_at(name) > 0 and f"{name.partition('@')[0]}@" in _AT[kind])


def names_of(kind: TaskKind, names: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the scores that ``scores_of`` has of a kind: the usual ones, or the main one and those of ``names``."""
    return (
        tuple(dict.fromkeys([MAIN[kind], *(one for one in names if is_defined(one, kind))])) if names else NAMES[kind]
    )


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of scores that a user asked for, each once; ``all`` stands for those without a number.

    Raises:
        UserError: there is no such score.
    """
    known = dict.fromkeys(name for kind in NAMES for name in (*NAMES[kind], *FURTHER[kind]))
    found = []
    for name in names:
        if name == "all":
            found += [one for one in known if "@" not in one]
        elif (name in known and "@" not in name) or (_at(name) and any(is_defined(name, kind) for kind in NAMES)):
            found.append(name)
        else:
            near = get_close_matches(name.casefold(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"must be among {', '.join(known)}, all"
            raise UserError(f"--metrics: there is no score '{name}'; {hint} (C and R: numbers between 0 and 1)")
    return tuple(dict.fromkeys(found))


def heading(name: str) -> str:
    """Return how tables call a score."""
    kind, _, number = name.partition("@")
    return f"{kind} at {'coverage' if kind == 'accuracy' else 'risk'} {number}" if number else HEADINGS[name]


def _at(name: str) -> float:
    """The share between 0 and 1 in a name such as ``accuracy@0.8``; 0 where there is none."""
    try:
        number = float(name.partition("@")[2])
    except ValueError:
        return 0.0
    return number if 0 < number < 1 else 0.0


def scores_of(predictions: Predictions, task: str, names: Sequence[str] = ()) -> dict[str, Score]:
    """Return the scores of a task over its samples with known targets (``Predictions.known``), at least one, by name.

    Args:
        predictions: of all tasks.
        task: its name.
        names: of the scores, those of other kinds of tasks are left out; by default ``NAMES``. The main score is
            always there and comes first.
    """
    own = predictions.take(predictions.known(task))
    targets, kind = own.targets[task], own.kind(task)
    match kind:
        case "multi_label":
            found = _multi_label(targets, own.label_probabilities(task), own.predicted_labels(task))
        case "regression":
            found = _regression(targets.astype(np.float64), own.values(task))
        case "ordinal":
            found = _ordinal(targets, own.predicted(task), len(own.tasks[task]))
        case _:
            found = [*_classes(targets, own.predicted(task)), *_of_names(own, task, ("f1_weighted", "top3_accuracy"))]
    usual = {score.name: score for score in found}
    wanted = names_of(kind, names)
    further = {one.name: one for one in _of_names(own, task, [name for name in wanted if name not in usual])}
    return {name: (usual | further)[name] for name in wanted}


def _of_names(own: Predictions, task: str, names: Sequence[str]) -> list[Score]:
    """Further scores of samples with known targets."""
    of_kind = _further_of_labels if own.kind(task) == "multi_label" else _further_of_classes
    return [of_kind(own, task, name) for name in names]


def _further_of_labels(own: Predictions, task: str, name: str) -> Score:
    targets, chance = own.targets[task], own.label_probabilities(task)
    is_known, positive = targets != UNKNOWN, targets == 1
    if name == "auroc":
        return Score(name, auroc_statistic(positive, own.logits[task], is_known))
    of_target = np.where(positive, chance, 1 - chance)
    losses = (1 - of_target) ** 2 if name == "brier" else -np.log(np.maximum(of_target, _LEAST))
    means = (losses * is_known).sum(axis=1) / is_known.sum(axis=1)
    return Score(name, Linearised(means), (0.0, 1.0 if name == "brier" else math.inf))


_BOUNDS = {"brier": (0.0, 2.0), "nll": (0.0, math.inf)} | dict.fromkeys(
    ("quadratic_kappa", "mcc", "kappa"), (-1.0, 1.0)
)


def _further_of_classes(own: Predictions, task: str, name: str) -> Score:
    targets, predicted, num_classes = own.targets[task], own.predicted(task), len(own.tasks[task])
    right, chances = predicted == targets, own.probabilities(task)
    confidence, at = chances.max(axis=1), _at(name)

    def of_target() -> NDArray[np.float64]:
        return np.take_along_axis(chances, targets[:, None], axis=1)[:, 0]

    made: dict[str, Callable[[], Statistic]] = {
        "f1_weighted": lambda: f1_statistic(targets, predicted, "weighted"),
        "top3_accuracy": lambda: share_statistic(in_top_k(targets, own.logits[task], 3)),
        "quadratic_kappa": lambda: kappa_statistic(targets, _placed(targets, predicted, num_classes), num_classes),
        "balanced_accuracy": lambda: balanced_accuracy_statistic(targets, predicted),
        "mcc": lambda: agreement_statistic(targets, predicted, num_classes, "mcc"),
        "kappa": lambda: agreement_statistic(targets, predicted, num_classes, "kappa"),
        # Probabilities: logits of different samples are not on one scale.
        "auroc": lambda: auroc_statistic(np.eye(num_classes, dtype=bool)[targets], chances),
        "average_precision": lambda: precision_statistic(np.eye(num_classes, dtype=bool)[targets], chances),
        "brier": lambda: Linearised((chances**2).sum(axis=1) - 2 * of_target() + 1),
        "nll": lambda: Linearised(-np.log(np.maximum(of_target(), _LEAST))),
        "aurc": lambda: aurc_statistic(~right, confidence),
        "excess_aurc": lambda: aurc_statistic(~right, confidence, excess=True),
        "accuracy@": lambda: selective_statistic(right, confidence, at),
        "coverage@": lambda: Coverage([(~right, confidence)], at),
    }
    statistic = made[f"{name.partition('@')[0]}@" if at else name]()
    return Score(name, statistic, _BOUNDS.get(name, (0.0, 1.0)))


_LEAST = 1e-300
"""Probabilities below would have an infinite logarithm."""


def _classes(targets: NDArray[np.int64], predicted: NDArray[np.int64]) -> list[Score]:
    return [
        Score("accuracy", accuracy_statistic(targets, predicted)),
        Score("f1_macro", f1_statistic(targets, predicted)),
    ]


def _ordinal(targets: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int) -> list[Score]:
    placed = _placed(targets, predicted, num_classes)
    return [
        *_classes(targets, predicted),
        Score("mae", Mean(np.abs(placed - targets).astype(np.float64)), (0.0, float(max(num_classes - 1, 1)))),
        Score("quadratic_kappa", kappa_statistic(targets, placed, num_classes), _BOUNDS["quadratic_kappa"]),
    ]


def _placed(targets: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Predicted classes, and where there is none the one that is furthest away."""
    last = num_classes - 1
    furthest = np.where(targets * 2 > last, 0, last)
    return np.where(predicted == UNKNOWN, furthest, predicted).astype(np.int64)


def kappa_statistic(targets: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int) -> Statistic:
    """Return Cohen's kappa with quadratic weights, -1 to 1, higher is better, as a function of sample weights.

    NaN where chance agrees entirely: all targets and predictions are one class.

    Args:
        targets: int64 ``(N,)``, all known.
        predicted: int64 ``(N,)``, a class each.
        num_classes: C.
    """
    distance = (targets - predicted).astype(np.float64) ** 2
    numbers = np.arange(num_classes, dtype=np.float64)
    # The mean squared distance of independent targets and predictions follows from their moments.
    moments = np.stack([numbers[targets], numbers[targets] ** 2, numbers[predicted], numbers[predicted] ** 2], axis=1)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = weights.sum(axis=1)
        target, target_square, output, output_square = (weights @ moments / total[:, None]).T
        by_chance = target_square + output_square - 2 * target * output
        observed = weights @ distance / total
        return _ratio(by_chance - observed, by_chance, tiny=1e-9)

    return statistic


def agreement_statistic(
    targets: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int, name: Literal["mcc", "kappa"]
) -> Statistic:
    """Return the correlation coefficient of Matthews, or Cohen's kappa; -1 to 1, higher is better, 0 for chance.

    Samples without a prediction are a class of their own. NaN where targets and predictions are one class.
    """
    places = [np.where(one == UNKNOWN, num_classes, one) for one in (targets, predicted)]
    target, output = (np.bincount(one, minlength=num_classes + 1) / len(targets) for one in places)
    right = (targets == predicted).astype(np.float64)
    observed, chance = right.mean(), float(target @ output)
    squares = float(target @ target), float(output @ output)
    # What a sample changes: the observed agreement, that by chance, and the squared shares of the classes.
    of_right = right - observed
    of_chance = output[places[0]] + target[places[1]] - 2 * chance
    if name == "kappa":
        if chance > 1 - 1e-12:
            return lambda weights: np.full(len(weights), math.nan)
        value = (observed - chance) / (1 - chance)
        return Linearised(value + (of_right - of_chance * (1 - value)) / (1 - chance))
    spread = math.sqrt(max((1 - squares[0]) * (1 - squares[1]), 0.0))
    if spread < 1e-9:
        return lambda weights: np.full(len(weights), math.nan)
    value = (observed - chance) / spread
    of_squares = (squares[0] - target[places[0]]) / (1 - squares[0]) + (squares[1] - output[places[1]]) / (
        1 - squares[1]
    )
    return Linearised(value + (of_right - of_chance) / spread - value * of_squares)


def balanced_accuracy_statistic(targets: NDArray[np.int64], predicted: NDArray[np.int64]) -> Linearised:
    """Return the mean recall of the classes that have targets; 0 to 1, higher is better."""
    right = (targets == predicted).astype(np.float64)
    counts = np.bincount(targets)
    recalls = np.bincount(targets, weights=right) / np.maximum(counts, 1)
    classes = int((counts > 0).sum())
    added = len(targets) / classes / counts[targets] * (right - recalls[targets])
    return Linearised(recalls.sum() / classes + added, _limiting(np.eye(len(counts), dtype=bool)[targets]))


def auroc_statistic(
    positive: NDArray[np.bool_], scores: NDArray[np.floating[Any]], is_known: NDArray[np.bool_] | None = None
) -> Statistic:
    """Return the mean over C classes or labels of the area under the ROC curve; 0 to 1, .5 for chance.

    Pseudo-values are the structural components of DeLong et al. (Biometrics 44, 1988), whose sums by group have the
    variance of Obuchowski (Biometrics 53, 1997). Classes without a positive or a negative sample are left out.

    Args:
        positive: bool ``(N, C)``.
        scores: ``(N, C)``, the higher the more likely positive.
        is_known: bool ``(N, C)``, entries that count; by default all.
    """
    return _mean_over_classes(_auroc, positive, scores, is_known)


def auroc(positive: NDArray[np.bool_], scores: NDArray[np.floating[Any]]) -> float:
    """Return the area under the ROC curve, 0 to 1, of samples of which bool ``(N,)`` are positive, but not all."""
    return _auroc(positive, scores.astype(np.float64))[0]


def _auroc(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """The area, and what each sample adds to it times their number."""
    above, below = np.sort(scores[positive]), np.sort(scores[~positive])
    components = np.empty(len(scores))
    for rows, others in ((positive, below), (~positive, above)):
        ends = [np.searchsorted(others, scores[rows], side) for side in ("left", "right")]
        components[rows] = (ends[0] + ends[1]) / 2 / len(others)
    components[~positive] = 1 - components[~positive]
    area = float(components[positive].mean())
    # As n - 1 in a variance, for each side.
    sizes = np.where(positive, len(above), len(below)).astype(np.float64)
    return area, len(scores) / np.sqrt(sizes * np.maximum(sizes - 1, 1)) * (components - area)


def precision_statistic(
    positive: NDArray[np.bool_], scores: NDArray[np.floating[Any]], is_known: NDArray[np.bool_] | None = None
) -> Statistic:
    """Return the mean over C classes or labels of the average precision; 0 to 1, higher is better.

    As in scikit-learn's ``average_precision_score``, samples of equal score count together. Pseudo-values are its
    derivatives by the weight of each sample. Classes without a positive sample are left out.

    Args:
        positive: bool ``(N, C)``.
        scores: ``(N, C)``, the higher the more likely positive.
        is_known: bool ``(N, C)``, entries that count; by default all.
    """
    return _mean_over_classes(_average_precision, positive, scores, is_known)


def _average_precision(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """The average precision, and what each sample adds to it times their number."""
    order, block, ends = _ranked(scores)
    hits, retrieved = positive[order].cumsum()[ends], ends + 1
    gained, precision, total = np.diff(hits, prepend=0), hits / retrieved, int(hits[-1])
    area = float((gained * precision).sum()) / total
    # A sample changes the precision at its own place and at all that follow.
    following = [(gained * part / retrieved)[::-1].cumsum()[::-1] for part in (1 - precision, precision)]
    added = np.where(positive, precision[block] - area + following[0][block], -following[1][block])
    return area, len(scores) / total * added


def _ranked(scores: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Order from the highest score, the number of each sample's block of equal scores, and where the blocks end."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    block = np.empty(len(order), np.int64)
    block[order] = np.searchsorted(ends, np.arange(len(order)))
    return order, block, ends


def _mean_over_classes(
    area_of: Callable[[NDArray[np.bool_], NDArray[np.float64]], tuple[float, NDArray[np.float64]]],
    positive: NDArray[np.bool_],
    scores: NDArray[np.floating[Any]],
    is_known: NDArray[np.bool_] | None,
) -> Statistic:
    """Mean of the areas of all classes with both positive and negative samples; NaN without any such class."""
    n, sums, classes = len(positive), np.zeros(len(positive)), 0
    for column in range(positive.shape[1]):
        rows = np.arange(n) if is_known is None else np.flatnonzero(is_known[:, column])
        own = positive[rows, column]
        if own.any() and not own.all():
            area, added = area_of(own, scores[rows, column].astype(np.float64))
            sums += area
            sums[rows] += added * n / len(rows)
            classes += 1
    if not classes:
        return lambda weights: np.full(len(weights), math.nan)
    return Linearised(sums / classes, _limiting(positive))


def _limiting(positive: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Samples of the rarer of two classes, of one label those of the rarer side; otherwise all."""
    if positive.shape[1] > 2:
        return np.zeros(0, dtype=bool)
    rare = positive[:, -1]
    return rare if rare.sum() * 2 <= len(rare) else ~rare


def aurc_statistic(errors: NDArray[np.bool_], confidence: NDArray[np.float64], *, excess: bool = False) -> Statistic:
    """Return the area under the risk-coverage curve; 0 to 1, lower is better.

    It is the mean over the number of samples that are predicted, the most confident ones first, of their share of
    errors; among equally confident ones errors are spread evenly.

    Args:
        errors: bool ``(N,)``.
        confidence: ``(N,)``, the higher the more likely right.
        excess: subtract the area of the best possible order, all right predictions before all errors.
    """
    risk = _risk_area(errors.astype(np.float64), confidence)
    if not excess:
        return Linearised(risk)
    return Linearised(risk - _risk_area(errors.astype(np.float64), -errors.astype(np.float64)))


def _risk_area(errors: NDArray[np.float64], confidence: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pseudo-values of the area under the risk-coverage curve."""
    order, block, _ = _ranked(confidence)
    even = (np.bincount(block, weights=errors) / np.bincount(block))[block][order]
    numbers = np.arange(1, len(errors) + 1)
    risk = even.cumsum() / numbers
    area = risk.mean()
    # A sample changes the risk at its own place and at all that follow.
    following = [(part / numbers)[::-1].cumsum()[::-1] for part in (np.ones(len(errors)), risk)]
    values = np.empty(len(errors))
    values[order] = risk + errors[order] * following[0] - following[1]
    values += area - values.mean()
    return values


def selective_statistic(right: NDArray[np.bool_], confidence: NDArray[np.float64], coverage: float) -> Statistic:
    """Return the accuracy of the share ``coverage`` of the samples that are most confident; 0 to 1, higher is better.

    Equally confident samples count together. Pseudo-values take the confidence from which they are chosen for given.
    """
    n = len(right)
    threshold = np.sort(confidence)[::-1][max(math.ceil(coverage * n), 1) - 1]
    covered = confidence >= threshold
    accuracy = right[covered].mean()
    return Linearised(accuracy + n / covered.sum() * covered * (right - accuracy), covered)


@dataclass(frozen=True)
class Coverage:
    """The largest share of the samples, most confident first, whose share of errors is ``risk`` at most.

    As a function of sample weights; of several models the mean.

    Attributes:
        models: errors bool ``(N,)`` and confidences ``(N,)`` of each model.
        risk: between 0 and 1.
    """

    models: Sequence[tuple[NDArray[np.bool_], NDArray[np.float64]]]
    risk: float

    def __call__(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """See ``Statistic``."""
        values: NDArray[np.float64] = np.mean([self._of(*model, weights) for model in self.models], axis=0)
        return values

    def _of(
        self, errors: NDArray[np.bool_], confidence: NDArray[np.float64], weights: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        order, _, ends = _ranked(confidence)
        own = weights[:, order]
        covered, failed = own.cumsum(axis=1)[:, ends], (own * errors[order]).cumsum(axis=1)[:, ends]
        reached = np.where(failed <= self.risk * covered + 1e-9, covered, 0.0).max(axis=1)
        values: NDArray[np.float64] = reached / own.sum(axis=1)
        return values

    def interval(self, groups: NDArray[Any], level: float = 0.95) -> Interval:
        """Return its interval over other groups, by inversion; of several models the mean of theirs.

        Thresholds are compared with the risk by the interval of the share of errors above them (``share_interval``).
        The interval begins at the largest coverage whose risk is surely lower, and ends at the largest whose risk may
        be as low; to both is added how far the coverage of a threshold may be elsewhere. Percentiles of resamples,
        which choose the threshold by the same errors that they count, cover .77 to .84.

        Args:
            groups: ``(N,)``, the group of each sample.
            level: of the interval.
        """
        found = [self._interval(*model, groups, level) for model in self.models]
        return Interval(*np.mean(found, axis=0).tolist())

    def _interval(
        self, errors: NDArray[np.bool_], confidence: NDArray[np.float64], groups: NDArray[Any], level: float
    ) -> Interval:
        order, _, ends = _ranked(confidence)
        wrong, own = errors[order].astype(np.float64), np.unique(groups, return_inverse=True)[1][order]
        places = ends[np.unique(np.linspace(0, len(ends) - 1, min(len(ends), _THRESHOLDS)).round().astype(np.int64))]
        risks = [share_interval(wrong[: place + 1], own[: place + 1], level) for place in places.tolist()]
        surely = [number for number, risk in enumerate(risks) if risk.high < self.risk]
        maybe = [number for number, risk in enumerate(risks) if risk.low <= self.risk]

        def covered(number: int) -> Interval:
            if number == len(places) - 1:
                return Interval(1.0, 1.0)  # all of them, whatever they are
            return share_interval((np.arange(len(own)) <= places[number]).astype(np.float64), own, level)

        low = covered(surely[-1]).low if surely else 0.0
        # Between two thresholds that are compared, the risk may be as low up to the next one.
        return Interval(low, covered(min(maybe[-1] + 1, len(places) - 1)).high if maybe else covered(0).high)


_THRESHOLDS = 200
"""Thresholds that are compared with a risk, evenly over the samples."""


def _multi_label(
    targets: NDArray[np.int8], probabilities: NDArray[np.float64], marked: NDArray[np.bool_]
) -> list[Score]:
    is_known = targets != UNKNOWN
    exact = ((marked == (targets == 1)) | ~is_known).all(axis=1)
    return [
        Score("mAP", precision_statistic(targets == 1, probabilities, targets != UNKNOWN)),
        Score("f1_macro", label_f1_statistic(targets, marked, "macro")),
        Score("f1_micro", label_f1_statistic(targets, marked, "micro")),
        Score("exact_match", Share(exact.astype(np.float64))),
    ]


def label_f1_statistic(
    targets: NDArray[np.int8], marked: NDArray[np.bool_], average: Literal["macro", "micro"]
) -> Statistic:
    """Return F1 of labels as a function of sample weights; higher is better.

    Macro is the mean over labels, micro is that of all entries together, both as scikit-learn's ``f1_score``
    with ``zero_division=0``. A label that applies to samples, but to none of a resample, is left out of its macro mean,
    as in ``intervals.f1_statistic``.

    Args:
        targets: int8 ``(N, C)``, ``UNKNOWN`` where not known.
        marked: bool ``(N, C)``, the predicted labels.
        average: over labels.
    """
    applies = (targets == 1).astype(np.float64)
    predicted = (marked & (targets != UNKNOWN)).astype(np.float64)
    hits = applies * predicted
    if average == "micro":
        applies, predicted, hits = (each.sum(axis=1, keepdims=True) for each in (applies, predicted, hits))
    occurs = applies.any(axis=0)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        support = weights @ applies
        total = support + weights @ predicted
        scores = np.divide(2 * (weights @ hits), total, out=np.zeros_like(total), where=total > 0)
        counts = (support > 0) | ~occurs
        return _ratio((scores * counts).sum(axis=1), counts.sum(axis=1).astype(np.float64))

    return statistic


def _regression(targets: NDArray[np.float64], values: NDArray[np.float64]) -> list[Score]:
    errors = values - targets
    square = Mean(errors**2)

    def root(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.sqrt(square(weights))
        return found

    # Around the mean, so that the variance of large numbers does not cancel out.
    centred = targets - targets.mean()
    moments = np.stack([errors**2, centred, centred**2], axis=1)
    smallest = 1e-12 * float((centred**2).mean())

    def explained(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        error, mean, square = (weights @ moments / weights.sum(axis=1, keepdims=True)).T
        variance = square - mean**2
        return _ratio(variance - error, variance, tiny=smallest)

    return [
        Score("mae", Mean(np.abs(errors)), (0.0, math.inf)),
        Score("rmse", root, (0.0, math.inf)),
        Score("r2", explained, (-math.inf, 1.0)),
        Score("spearman", spearman_statistic(targets, values), (-1.0, 1.0)),
    ]


def spearman_statistic(first: NDArray[np.float64], second: NDArray[np.float64]) -> Statistic:
    """Return the rank correlation of two sets of numbers, float64 ``(N,)`` each, as a function of sample weights.

    Equal numbers have their mean rank; NaN where either set is constant.
    """
    blocks = [np.unique(values, return_inverse=True)[1] for values in (first, second)]
    orders = [np.argsort(block, kind="stable") for block in blocks]
    begins = [np.flatnonzero(np.diff(block[order], prepend=-1)) for block, order in zip(blocks, orders, strict=True)]

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = weights.sum(axis=1, keepdims=True)
        ranks = []
        for block, order, begin in zip(blocks, orders, begins, strict=True):
            sizes = np.add.reduceat(weights[:, order], begin, axis=1)
            middle = (sizes.cumsum(axis=1) - sizes / 2) / total - 0.5  # its weighted mean is 0
            ranks.append(middle[:, block])
        covariance = (weights * ranks[0] * ranks[1]).sum(axis=1)
        spreads = [(weights * rank**2).sum(axis=1) for rank in ranks]
        return _ratio(covariance, np.sqrt(spreads[0] * spreads[1]), tiny=1e-12)

    return statistic


def _ratio(top: NDArray[np.float64], below: NDArray[np.float64], tiny: float = 0.0) -> NDArray[np.float64]:
    """Quotients; NaN where the divisor is no larger than ``tiny``."""
    quotients: NDArray[np.float64] = np.divide(top, below, out=np.full(len(top), math.nan), where=below > tiny)
    return quotients


@dataclass(frozen=True)
class TrainTargets:
    """What is known of a task's targets in the train split.

    Attributes:
        counts: samples of each class or label; None where not known.
        samples: of the split, 0 where not known.
        mean: of the numbers of a regression task; NaN where not known.
        median: likewise.
    """

    counts: Sequence[int] | None = None
    samples: int = 0
    mean: float = math.nan
    median: float = math.nan


@dataclass(frozen=True)
class ConstantPrediction:
    """What always predicting the same scores, the same being chosen on the train split.

    Attributes:
        scores: by name, those for which there is such a prediction.
        source: "train", or "split" where the train split is not known and the split's own targets stand in, which can
            only be harder to beat.
        prediction: what is predicted for the main score.
    """

    scores: Mapping[str, float] = field(default_factory=dict)
    source: Literal["train", "split"] = "train"
    prediction: str = ""


def constant_prediction(
    predictions: Predictions, task: str, train: TrainTargets = TrainTargets()
) -> ConstantPrediction:
    """Return the scores of the best prediction that is the same for every image.

    - single_label, ordinal: the majority class; ``mae`` of the median class; ``quadratic_kappa`` is 0.
    - multi_label: all labels with their prevalence for ``mAP``, whose average precision then is the split's prevalence;
      for ``f1_macro`` always all labels, for ``f1_micro`` the k most frequent ones, k being the best in training, for
      ``exact_match`` those that apply to half of the training samples at least.
    - regression: the median for ``mae``, the mean for ``rmse`` and ``r2``.

    Args:
        predictions: whose targets; at least one is known.
        task: its name.
        train: of the train split.
    """
    targets = predictions.targets[task][known(predictions.targets[task])]
    match predictions.kind(task):
        case "multi_label":
            return _label_baseline(targets, train)
        case "regression":
            return _number_baseline(targets.astype(np.float64), train)
        case kind:
            majority = majority_baseline(targets, train.counts)
            scores = {"accuracy": majority.accuracy}
            if kind == "ordinal":
                counts = np.bincount(targets) if majority.source == "split" else np.asarray(train.counts)
                median = int(np.searchsorted(counts.cumsum(), counts.sum() / 2))
                scores |= {"mae": float(np.abs(targets - median).mean()), "quadratic_kappa": 0.0}
            return ConstantPrediction(scores, majority.source, str(predictions.tasks[task][majority.label]))


def _label_baseline(targets: NDArray[np.int8], train: TrainTargets) -> ConstantPrediction:
    is_known = targets != UNKNOWN
    source: Literal["train", "split"] = "train" if train.counts is not None and any(train.counts) else "split"
    counts, samples = np.asarray(train.counts if source == "train" else (targets == 1).sum(axis=0)), train.samples
    if source == "split" or not samples:
        samples, source = len(targets), "split"
        counts = (targets == 1).sum(axis=0)
    order = np.argsort(-counts, kind="stable")
    sums = counts[order].cumsum()
    most = int((sums / (np.arange(1, len(counts) + 1) * samples + counts.sum())).argmax()) + 1
    frequent = np.zeros(len(counts), dtype=bool)
    frequent[order[:most]] = True
    shape, one = targets.shape, np.ones((1, len(targets)))
    usual = (np.broadcast_to(counts * 2 >= samples, shape) == (targets == 1)) | ~is_known
    scores = {
        "mAP": precision_statistic(targets == 1, np.zeros(shape), is_known)(one),
        "f1_macro": label_f1_statistic(targets, np.ones(shape, dtype=bool), "macro")(one),
        "f1_micro": label_f1_statistic(targets, np.broadcast_to(frequent, shape), "micro")(one),
        "exact_match": usual.all(axis=1).mean(keepdims=True),
    }
    return ConstantPrediction(
        {name: float(value[0]) for name, value in scores.items()}, source, "each label's prevalence"
    )


def _number_baseline(targets: NDArray[np.float64], train: TrainTargets) -> ConstantPrediction:
    is_known = not (math.isnan(train.mean) or math.isnan(train.median))
    mean, median = (train.mean, train.median) if is_known else (float(targets.mean()), float(np.median(targets)))
    variance, error = float(targets.var()), float(((targets - mean) ** 2).mean())
    scores = {
        "mae": float(np.abs(targets - median).mean()),
        "rmse": math.sqrt(error),
        "r2": 1 - error / variance if variance else math.nan,
    }
    return ConstantPrediction(scores, "train" if is_known else "split", f"{median:.6g}")


def small_labels(targets: NDArray[np.int8], groups: NDArray[Any]) -> tuple[int, int]:
    """Return how many labels among the targets apply in fewer than ``FEW_GROUPS`` groups, and how many there are.

    Simulated coverage of the 95 % interval of mAP of three labels (20 and 100 groups of equal and unequal size,
    correlation 0 to .6): .87 to .97 where the rarest applies in four groups on average, .89 to .96 where in twenty.
    """
    counts = [len(set(groups[column == 1].tolist())) for column in targets.T]
    return sum(0 < count < FEW_GROUPS for count in counts), sum(count > 0 for count in counts)


def few_large_errors(errors: NDArray[np.float64], groups: NDArray[Any]) -> int:
    """Return how many groups make half of the squared error where they are fewer than ``FEW_GROUPS``, otherwise 0.

    Simulated coverage of the 95 % intervals of RMSE and R² (20 and 100 groups of equal and unequal size): .92 to 1.00
    with normal errors, .59 to .97 with lognormal ones, of which a few make the most. 0 also for fewer than four times
    as many groups, which show no such thing.
    """
    _, index = np.unique(groups, return_inverse=True)
    sums = np.sort(np.bincount(index, weights=errors**2))[::-1]
    if len(sums) < 4 * FEW_GROUPS or not sums.sum():
        return 0
    count = int(np.searchsorted(sums.cumsum(), sums.sum() / 2)) + 1
    return count if count < FEW_GROUPS else 0
