"""Statistics of predictions with intervals that respect groups.

Images of one physical object are not independent, so an interval by image is too narrow. Four intervals, each checked
by simulation (``tests/evaluation/statistics/test_coverage.py``):

* Shares (accuracy, recall, a mean of scores from 0 to 1): ``share_interval``, in closed form. Wilson's interval (JASA
  22, 1927) of as many independent trials as the grouped sample is worth (Korn & Graubard, Survey Methodology 24, 1998).
  Likewise areas under ROC curves and balanced accuracy (``Linearised``), by the pseudo-value of each sample.
* Means of errors in the units of the data: ``mean_interval``, Student's with the same variance.
* Other statistics (macro F1, average precision, kappa, errors in the units of the data): Student's interval with the
  standard error of a bootstrap of whole groups (Efron & Tibshirani, An Introduction to the Bootstrap, 1993; Field &
  Welsh, JRSS B 69, 2007), cut to the range of the statistic.
* Ranks: percentiles of that bootstrap, moved outwards for few groups (Hesterberg, The American Statistician 69, 2015).

Targets equal to ``UNKNOWN`` are left out by ``known``; everything else expects known targets only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrail.predictions import known_rows, ranks_of

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Maps R weightings of the N samples, ``(R, N)``, to R values, ``(R,)``; a resample weights a sample by how often it
holds it."""

_CHUNK_ELEMENTS = 4_000_000
"""Weights computed at a time: 32 MB however large the split is."""


class Interval(NamedTuple):
    """A confidence interval, both ends included; NaN where there is nothing to compute it from."""

    low: float
    high: float


_NOTHING = Interval(math.nan, math.nan)

_TINY = 1e-12
"""Rounding of a share and of its variance."""


class Estimate(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    interval: Interval


class Baseline(NamedTuple):
    """Accuracy of always predicting the majority class.

    Attributes:
        accuracy: share of the known targets that are the majority class, 0 to 1; higher is a harder baseline.
        label: index of the majority class.
        source: "train" where the class was taken from the train split; "split" where its counts are not known and the
            split's own majority stands in, which can only be higher.
    """

    accuracy: float
    label: int
    source: Literal["train", "split"]


def known(targets: NDArray[Any]) -> NDArray[np.int64]:
    """Return the rows whose target, of any kind, is known, int64."""
    return np.flatnonzero(known_rows(targets))


def accuracy(targets: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Return the share of right predictions, 0 to 1, higher is better; NaN for no samples."""
    return float((targets == predicted).mean()) if len(targets) else math.nan


def in_top_k(targets: NDArray[np.int64], logits: NDArray[np.float32], k: int) -> NDArray[np.bool_]:
    """Return whether each target, int64 ``(N,)``, is among the k largest logits, float32 ``(N, C)``.

    Of equal logits the target's comes last, so that k = 1 equals a comparison with ``predicted_classes``.
    """
    within: NDArray[np.bool_] = ranks_of(logits, targets) < k
    return within


@dataclass(frozen=True)
class Mean:
    """The weighted mean of a number of each sample, as a function of sample weights (a ``Statistic``).

    Attributes:
        scores: float64 ``(N,)``.
    """

    scores: NDArray[np.float64]

    def __call__(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the means for weights ``(R, N)``, float64 ``(R,)``."""
        values: NDArray[np.float64] = weights @ self.scores / weights.sum(axis=1)
        return values


@dataclass(frozen=True)
class Share(Mean):
    """A ``Mean`` of scores that are each from 0 to 1."""


@dataclass(frozen=True)
class Linearised(Mean):
    """A bounded statistic as the ``Mean`` of what each sample adds to it to first order, its pseudo-values.

    Its interval is that of a share of the range, with as many degrees of freedom as the limiting samples allow
    (``score_interval``). As a function of weights it is exact for equal ones only.

    Attributes:
        limiting: bool ``(N,)``, the samples whose number limits what is known, such as those of the rarer class; all of
            them where it is empty.
    """

    limiting: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))


def accuracy_statistic(targets: NDArray[np.int64], predicted: NDArray[np.int64]) -> Share:
    """Return accuracy as a function of sample weights."""
    return share_statistic(targets == predicted)


def share_statistic(right: NDArray[Any]) -> Share:
    """Return the mean of what each sample scored, ``(N,)`` from 0 to 1, as a function of sample weights."""
    return Share(right.astype(np.float64))


def f1_statistic(
    targets: NDArray[np.int64], predicted: NDArray[np.int64], average: Literal["macro", "weighted"] = "macro"
) -> Statistic:
    """Return F1 averaged over classes as a function of sample weights; higher is better.

    Macro is the plain mean over the classes that occur in targets or predictions (as scikit-learn and torchmetrics
    have it), weighted the mean by the classes' support. A class whose targets a resample lacks is left out of its macro
    mean, even where it is predicted: otherwise every rare class would count as 0 whenever it was not sampled, and the
    interval would lie too low.
    """
    num_classes = int(max(targets.max(), predicted.max())) + 1
    of_target, of_predicted = one_hot(targets, num_classes), one_hot(predicted, num_classes)
    of_both = of_target.multiply(of_predicted).tocsr()
    is_target = np.bincount(targets, minlength=num_classes) > 0

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        support, answers, hits = weights @ of_target, weights @ of_predicted, weights @ of_both
        total = support + answers
        scores = np.divide(2 * hits, total, out=np.zeros_like(total), where=total > 0)
        counts = np.where(is_target, support, answers) > 0
        shares = support if average == "weighted" else counts.astype(np.float64)
        values: NDArray[np.float64] = (scores * shares).sum(axis=1) / shares.sum(axis=1)
        return values

    return statistic


def group_interval(
    statistic: Statistic,
    groups: NDArray[Any],
    n_resamples: int = 5_000,
    *,
    seed: int = 0,
    level: float = 0.95,
    percentiles: bool = False,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Interval:
    """Return the interval of a statistic over other groups.

    Args:
        statistic: from sample weights ``(R, N)`` to ``(R,)``. A ``Share`` has ``share_interval`` and a ``Mean``
            ``mean_interval``, without resampling.
        groups: ``(N,)``, the group of each sample.
        n_resamples: of the bootstrap; more give steadier ends.
        seed: of the resamples.
        level: of the interval, between 0 and 1.
        percentiles: take percentiles of the resamples, for statistics that follow ranks; by default Student's interval
            around the value with the standard deviation of the resamples. Its quantile has as many degrees of freedom
            as there are groups of equal size that would be worth as much (Kish), less one. Percentiles would shift the
            interval twice where a statistic is biased in small samples, as macro F1 of small classes is.
        bounds: lowest and highest value that the statistic can have; infinite where there is no limit.

    Returns:
        Where all resamples are equal, the data show nothing of their spread: Wilson's interval of as many trials as
        effective groups, stretched to finite bounds, and NaN without such bounds. NaN for no samples, and where the
        statistic, or that of half of the resamples, is not defined (NaN).
    """
    if isinstance(statistic, Mean):
        return _closed_interval(statistic, groups, level, bounds)
    if not len(groups):
        return Interval(math.nan, math.nan)
    index, sizes = _by_group(groups)
    resampled = resamples(statistic, index, n_resamples, seed=seed)
    value = float(statistic(np.ones((1, len(groups))))[0])
    resampled = resampled[~np.isnan(resampled)]
    if math.isnan(value) or len(resampled) < n_resamples / 2:
        return Interval(math.nan, math.nan)
    if np.ptp(resampled) <= 1e-12 * max(1.0, abs(value)):
        return _of_no_spread(value, sizes, level, bounds)
    if percentiles:
        tail = _expanded_tail((1 - level) / 2, len(sizes))
        low, high = np.quantile(resampled, [tail, 1 - tail])
        return Interval(float(low), float(high))
    # A resample of G groups spreads by (G - 1) / G of the variance.
    spread = float(resampled.std(ddof=1)) * math.sqrt(len(sizes) / (len(sizes) - 1))
    return _student(value, spread, sizes, level, bounds)


def _closed_interval(statistic: Mean, groups: NDArray[Any], level: float, bounds: tuple[float, float]) -> Interval:
    if isinstance(statistic, Linearised):
        return score_interval(statistic, groups, level, bounds)
    if isinstance(statistic, Share):
        return share_interval(statistic.scores, groups, level)
    return mean_interval(statistic.scores, groups, level, bounds)


def _student(
    value: float, spread: float, sizes: NDArray[np.float64], level: float, bounds: tuple[float, float]
) -> Interval:
    """Student's interval of a value with a standard error, from groups of these sizes."""
    from scipy.special import stdtrit

    half = float(stdtrit(max(effective_groups(sizes) - 1, 1), (1 + level) / 2)) * spread
    return Interval(max(bounds[0], value - half), min(bounds[1], value + half))


def _of_no_spread(value: float, sizes: NDArray[np.float64], level: float, bounds: tuple[float, float]) -> Interval:
    lowest, span = bounds[0], bounds[1] - bounds[0]
    if math.isinf(span):
        return Interval(math.nan, math.nan)
    low, high = wilson((value - lowest) / span, effective_groups(sizes), level)
    return Interval(lowest + span * low, lowest + span * high)


def resamples(statistic: Statistic, groups: NDArray[Any], n_resamples: int, *, seed: int = 0) -> NDArray[np.float64]:
    """Return a statistic of samples of as many whole groups, drawn with replacement, float64 ``(n_resamples,)``."""
    index, sizes = _by_group(groups)
    num_groups = len(sizes)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_ELEMENTS // len(groups))
    values = []
    for start in range(0, n_resamples, rows):
        size = min(rows, n_resamples - start)
        sampled = rng.integers(num_groups, size=(size, num_groups))
        sampled += np.arange(size)[:, None] * num_groups
        counts = np.bincount(sampled.ravel(), minlength=size * num_groups).reshape(size, num_groups)
        values.append(statistic(counts[:, index].astype(np.float64)))
    return np.concatenate(values)


def estimate(
    statistic: Statistic,
    groups: NDArray[Any],
    n_resamples: int = 5_000,
    *,
    seed: int = 0,
    percentiles: bool = False,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Estimate:
    """Return a statistic of all samples with its interval by ``group_interval``."""
    value = float(statistic(np.ones((1, len(groups))))[0])
    interval = group_interval(statistic, groups, n_resamples, seed=seed, percentiles=percentiles, bounds=bounds)
    return Estimate(value, interval)


def share_interval(
    scores: NDArray[np.float64], groups: NDArray[Any], level: float = 0.95, worth: float | None = None
) -> Interval:
    """Return the interval of a mean of scores over other groups: Wilson's with the effective number of trials.

    The variance of the mean (``variance_of_mean``) gives how many independent trials the sample is worth; the number
    shrinks further by the squared ratio of normal to Student quantiles. Where nothing varies, as where all are right,
    there are as many trials as effective groups.

    Simulated coverage of the 95 % interval of accuracy (11 to 500 groups of equal or very unequal size, a tenth of them
    with half of the images; accuracy .6 to .98, correlation within groups 0 to .9): .91 to 1.00.

    Args:
        scores: ``(N,)``, each from 0 to 1; pseudo-values may lie outside.
        groups: ``(N,)``, the group of each sample.
        level: of the interval.
        worth: groups of equal size that the sample is worth, at least 1; by default all count for the quantile, and
            ``effective_groups`` where nothing varies.

    Returns:
        NaN for no samples.
    """
    from scipy.special import ndtri, stdtrit

    if not len(scores):
        return Interval(math.nan, math.nan)
    index, sizes = _by_group(groups)
    share, variance = float(scores.mean()), variance_of_mean(scores, index)
    if variance <= _TINY**2 or not _TINY < share < 1 - _TINY:
        ends = round(share, 9) if abs(share - round(share)) < _TINY else share
        return wilson(min(max(ends, 0.0), 1.0), worth or effective_groups(sizes), level)
    upper = (1 + level) / 2
    shrink = float(ndtri(upper) / stdtrit(max((worth or len(sizes)) - 1, 1), upper))
    return wilson(share, max(1.0, share * (1 - share) / variance) * shrink * shrink, level)


def score_interval(
    statistic: Linearised, groups: NDArray[Any], level: float = 0.95, bounds: tuple[float, float] = (0.0, 1.0)
) -> Interval:
    """Return the interval of a linearised statistic over other groups: that of a share of the range.

    Without an upper bound the number of trials has no limit, and Wilson's interval is that of the mean of a Poisson
    variable with as many events as the sample is worth (Rao's score). The degrees of freedom are those of the groups
    that make the variance, at least 1: where a few groups make most of it, it is hardly known (Satterthwaite,
    Biometrics Bulletin 2, 1946).

    Simulated coverage (20 to 500 groups of equal and very unequal size, 2 to 10 classes, correlation 0 and .5): .93 to
    1.00; .73 to .94 for Brier score and NLL where fewer than five groups hold any error, .78 to .94 for areas and
    balanced accuracy where classes have two groups each (both are reported, ``few_large``, ``small_classes``).

    Args:
        statistic: of all samples.
        groups: ``(N,)``, the group of each sample.
        level: of the interval.
        bounds: lowest and highest value; the highest may be infinite.

    Returns:
        NaN for no samples.
    """
    from scipy.special import stdtrit

    own = groups[statistic.limiting] if len(statistic.limiting) else groups
    if not len(own):
        return _NOTHING
    shares = np.bincount(_by_group(groups)[0], weights=statistic.scores - statistic.scores.mean()) ** 2
    makers = float(shares.sum()) ** 2 / max(float((shares**2).sum()), 1e-300)
    # Where nothing varies the number of groups is what is known.
    worth = min(effective_groups(_by_group(own)[1]), max(makers, 2.0) if makers > 0.5 else math.inf)
    low, span = bounds[0], bounds[1] - bounds[0]
    if not math.isinf(span):
        found = share_interval((statistic.scores - low) / span, groups, level, worth)
        return Interval(low + span * found.low, low + span * found.high)
    mean, variance = float(statistic.scores.mean()) - low, variance_of_mean(statistic.scores, groups)
    if mean <= 0 or variance <= 0:
        return _NOTHING
    quantile = float(stdtrit(max(worth - 1, 1), (1 + level) / 2))
    centre, half = quantile**2 * variance / mean / 2, quantile * math.sqrt(variance)
    half = math.hypot(half, centre)
    return Interval(low + mean + centre - half, low + mean + centre + half)


def mean_interval(
    scores: NDArray[np.float64],
    groups: NDArray[Any],
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Return Student's interval of a mean of numbers over other groups, with ``variance_of_mean``.

    Args:
        scores: ``(N,)``, in any units.
        groups: ``(N,)``, the group of each sample.
        level: of the interval.
        bounds: of the mean.

    Returns:
        For fewer than two groups, and where the numbers do not vary, as ``group_interval`` where all resamples are
        equal.
    """
    if not len(scores):
        return Interval(math.nan, math.nan)
    index, sizes = _by_group(groups)
    mean, variance = float(scores.mean()), variance_of_mean(scores, index)
    return (
        _student(mean, math.sqrt(variance), sizes, level, bounds)
        if variance
        else _of_no_spread(mean, sizes, level, bounds)
    )


def variance_of_mean(scores: NDArray[np.float64], groups: NDArray[Any]) -> float:
    """Return the variance of the mean of grouped scores: the larger of two estimates.

    * The jackknife that leaves out one group each time, which assumes nothing, but knows nothing of large groups that
      happen to be all right in this sample.
    * The variance of independent samples times the design effect of one correlation within all groups, which the
      analysis of variance estimates (Donner, International Statistical Review 54, 1986). It lets small groups show what
      may happen in large ones.

    Args:
        scores: ``(N,)``.
        groups: ``(N,)``, the group of each sample.

    Returns:
        0 for a single group, of whose variance nothing is known.
    """
    index, sizes = _by_group(groups)
    n, num_groups, mean = len(scores), len(sizes), float(scores.mean())
    if num_groups < 2:
        return 0.0
    sums = np.bincount(index, weights=scores)
    left_out = (sums.sum() - sums) / (n - sizes)
    jackknife = (num_groups - 1) / num_groups * float(((left_out - left_out.mean()) ** 2).sum())
    total = float(((scores - mean) ** 2).sum())
    between = float((sizes * (sums / sizes - mean) ** 2).sum())
    correlation = 0.0
    if n > num_groups:
        within = max(total - between, 0.0) / (n - num_groups)
        between /= num_groups - 1
        typical = (n - float((sizes**2).sum()) / n) / (num_groups - 1)
        spread = between + (typical - 1) * within
        correlation = min(max((between - within) / spread, 0.0), 1.0) if spread > 0 else 0.0
    design_effect = 1 + correlation * (float((sizes**2).sum()) / n - 1)
    return max(jackknife, total / n / n * design_effect)


FEW_GROUPS = 5
"""Groups that a class needs for the interval of macro F1 to hold its level."""


THIN_GROUPS = 20
"""Groups that each of a few classes needs for the interval of balanced accuracy to hold its level: simulated coverage
.83 where the rarer of two has ten, .93 and more where it has fifty, and of ten classes of ten groups."""


def small_classes(targets: NDArray[np.int64], groups: NDArray[Any], few: int = FEW_GROUPS) -> tuple[int, int]:
    """Return how many classes among the targets have fewer than ``few`` groups, and how many there are.

    Simulated coverage of the 95 % interval of macro F1: .95 to .98 with 102 classes of 5 or 10 images or of 5 groups,
    .93 to .97 with 10 or 20 classes; .73 to .86 on long tails where many classes have one image or none.
    """
    pairs = np.unique(np.stack([targets, _by_group(groups)[0]]), axis=1)
    counts = np.unique(pairs[0], return_counts=True)[1]
    return int((counts < few).sum()), len(counts)


def wilson(share: float, trials: float, level: float = 0.95) -> Interval:
    """Return the Wilson score interval of a share observed in independent trials (a fraction of one is allowed)."""
    from scipy.special import ndtri

    if not trials or math.isnan(share):
        return Interval(math.nan, math.nan)
    z = float(ndtri((1 + level) / 2))
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # Exactly 0 or 1 at the ends of the range, where rounding would leave a remainder.
    return Interval(centre - half if share > 0 else 0.0, centre + half if share < 1 else 1.0)


def half_width(values: Sequence[float], level: float = 0.95) -> float:
    """Return half of Student's interval of the mean of independent runs; NaN for fewer than two."""
    low, high = student_interval(values, level, (-math.inf, math.inf))
    return (high - low) / 2


def student_interval(
    values: Sequence[float], level: float = 0.95, bounds: tuple[float, float] = (0.0, 1.0)
) -> Interval:
    """Return Student's interval of the mean score of independent runs, cut to ``bounds``; NaN for fewer than two."""
    from scipy.special import stdtrit

    if len(values) < 2:
        return Interval(math.nan, math.nan)
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * spread / math.sqrt(len(values))
    return Interval(max(bounds[0], mean - half), min(bounds[1], mean + half))


def majority_baseline(targets: NDArray[np.int64], train_counts: Sequence[int] | None = None) -> Baseline:
    """Return the accuracy on known targets of always predicting the majority class of the train split.

    Of classes that are equally frequent in training, the one that is most frequent among the targets is taken.

    Args:
        targets: int64 ``(N,)``, at least one.
        train_counts: samples of each class in the train split; None, or none of any class, takes the majority of
            ``targets`` itself.
    """
    if train_counts is not None and not any(train_counts):
        train_counts = None
    counts = np.bincount(targets) if train_counts is None else np.asarray(train_counts)
    occurring = np.bincount(targets, minlength=len(counts))[: len(counts)]
    label = int(np.where(counts == counts.max(), occurring, -1).argmax())
    return Baseline(float((targets == label).mean()), label, "split" if train_counts is None else "train")


def one_hot(labels: NDArray[np.int64], num_classes: int) -> Any:
    """Return sparse float64 ``(N, C)`` with a one in the column of each label, and none in the rows of ``UNKNOWN``."""
    from scipy.sparse import csr_matrix

    rows = known(labels)
    return csr_matrix((np.ones(len(rows)), (rows, labels[rows])), shape=(len(labels), num_classes))


def _by_group(groups: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Index of each sample's group, int64 ``(N,)``, and the sizes of the groups, float64 ``(G,)``."""
    _, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return index.astype(np.int64), counts.astype(np.float64)


def effective_groups(sizes: NDArray[np.float64]) -> float:
    """Number of groups of equal size that would be worth as much (Kish, Survey Sampling, 1965)."""
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def _expanded_tail(tail: float, num_groups: int) -> float:
    """Tail probability of Hesterberg's expanded percentile interval."""
    from scipy.special import ndtr, stdtrit

    return float(ndtr(math.sqrt(num_groups / (num_groups - 1)) * stdtrit(num_groups - 1, tail)))
