"""The scores of each kind of task as functions of sample weights, and those of predicting the same for every image.

=============  =====================================================================================================
single_label   ``accuracy``, ``f1_macro``, ``f1_weighted``, ``top3_accuracy``
ordinal        ``accuracy``, ``f1_macro``, ``mae`` (in classes), ``quadratic_kappa`` (Cohen, Psychological Bulletin 70,
               1968)
multi_label    ``mAP``, ``f1_macro``, ``f1_micro`` and ``exact_match`` (both at the thresholds)
regression     ``mae``, ``rmse``, ``r2``, ``spearman``
=============  =====================================================================================================

The first of each kind is its main score. Values equal those of scikit-learn and SciPy, and what ``fit`` and ``test``
log under the same names (``lightning_modules.heads``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.intervals import (
    FEW_GROUPS,
    Estimate,
    Mean,
    Share,
    Statistic,
    accuracy_statistic,
    estimate,
    f1_statistic,
    in_top_k,
    known,
    majority_baseline,
)
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

LOWER_IS_BETTER = ("mae", "rmse")

_WORK = 2e8
"""Weights of single labels that the resamples of one mean average precision may look at: a second or two."""


@dataclass(frozen=True)
class Score:
    """One score of a task on its N samples with known targets.

    Attributes:
        name: key of ``HEADINGS``.
        statistic: as a function of sample weights; NaN where the score is not defined. A ``Mean`` where it is a mean of
            what each sample scored.
        bounds: lowest and highest value that it can have.
        resamples: how many its interval needs at most; fewer where each takes long.
    """

    name: str
    statistic: Statistic
    bounds: tuple[float, float] = (0.0, 1.0)
    resamples: int = 5_000

    def estimate(self, groups: NDArray[Any], n_resamples: int = 5_000, *, seed: int = 0) -> Estimate:
        """Return it with its 95 % interval by group; ``groups`` is ``(N,)``."""
        return estimate(self.statistic, groups, min(n_resamples, self.resamples), seed=seed, bounds=self.bounds)


def scores_of(predictions: Predictions, task: str) -> dict[str, Score]:
    """Return the scores of a task over its samples with known targets (``Predictions.known``), at least one, by name.

    The main score comes first.
    """
    own = predictions.take(predictions.known(task))
    targets = own.targets[task]
    match own.kind(task):
        case "multi_label":
            found = _multi_label(targets, own.label_probabilities(task), own.predicted_labels(task))
        case "regression":
            found = _regression(targets.astype(np.float64), own.values(task))
        case "ordinal":
            found = _ordinal(targets, own.predicted(task), len(own.tasks[task]))
        case _:
            found = [
                *_classes(targets, own.predicted(task)),
                Score("f1_weighted", f1_statistic(targets, own.predicted(task), "weighted")),
                Score("top3_accuracy", Share(in_top_k(targets, own.logits[task], 3).astype(np.float64))),
            ]
    return {score.name: score for score in found}


def _classes(targets: NDArray[np.int64], predicted: NDArray[np.int64]) -> list[Score]:
    return [
        Score("accuracy", accuracy_statistic(targets, predicted)),
        Score("f1_macro", f1_statistic(targets, predicted)),
    ]


def _ordinal(targets: NDArray[np.int64], predicted: NDArray[np.int64], num_classes: int) -> list[Score]:
    last = num_classes - 1
    placed = np.where(predicted == UNKNOWN, np.where(targets * 2 > last, 0, last), predicted)
    return [
        *_classes(targets, predicted),
        Score("mae", Mean(np.abs(placed - targets).astype(np.float64)), (0.0, float(max(last, 1)))),
        Score("quadratic_kappa", kappa_statistic(targets, placed, num_classes), (-1.0, 1.0)),
    ]


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


def _multi_label(
    targets: NDArray[np.int8], probabilities: NDArray[np.float64], marked: NDArray[np.bool_]
) -> list[Score]:
    is_known = targets != UNKNOWN
    exact = ((marked == (targets == 1)) | ~is_known).all(axis=1)
    resamples = int(np.clip(_WORK / max(targets.size, 1), 200, 5_000))
    return [
        Score("mAP", average_precision_statistic(targets, probabilities), resamples=resamples),
        Score("f1_macro", label_f1_statistic(targets, marked, "macro")),
        Score("f1_micro", label_f1_statistic(targets, marked, "micro")),
        Score("exact_match", Share(exact.astype(np.float64))),
    ]


def average_precision_statistic(targets: NDArray[np.int8], scores: NDArray[np.float64]) -> Statistic:
    """Return the mean over labels of the average precision (mAP) as a function of sample weights; higher is better.

    As in scikit-learn's ``average_precision_score``, samples of equal score count together. Labels that apply to no
    sample, in a resample too, are left out.

    Args:
        targets: int8 ``(N, C)``, ``UNKNOWN`` where not known.
        scores: float64 ``(N, C)``.
    """
    labels = []
    for column in range(targets.shape[1]):
        rows = np.flatnonzero(targets[:, column] != UNKNOWN)
        order = rows[np.argsort(-scores[rows, column], kind="stable")]
        applies = (targets[order, column] == 1).astype(np.float64)
        if applies.any():
            ends = np.append(np.flatnonzero(np.diff(scores[order, column])), len(order) - 1)
            labels.append((order, applies, ends))

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total, count = np.zeros(len(weights)), np.zeros(len(weights))
        for order, applies, ends in labels:
            own = weights[:, order]
            retrieved = own.cumsum(axis=1)[:, ends]
            hits = (own * applies).cumsum(axis=1)[:, ends]
            gained = np.diff(hits, axis=1, prepend=0.0)
            sums = np.divide(gained * hits, retrieved, out=np.zeros_like(hits), where=retrieved > 0).sum(axis=1)
            positives = hits[:, -1]
            total += np.divide(sums, positives, out=np.zeros_like(sums), where=positives > 0)
            count += positives > 0
        return _ratio(total, count)

    return statistic


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
        "mAP": average_precision_statistic(targets, np.zeros(shape))(one),
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
