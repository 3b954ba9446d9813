"""Calibration: how far confidences are from accuracy, reliability bins, and temperatures.

* Expected calibration error (ECE) in bins of equal width, reliability diagram, temperature scaling: Guo et al., On
  Calibration of Modern Neural Networks, ICML 2017. Bins of equal mass: Nguyen & O'Connor, EMNLP 2015.
* With few samples, or few groups, even a perfect model has an ECE above 0, because shares in bins scatter:
  ``chance_errors`` show how much (Bröcker & Smith, Weather and Forecasting 22, 2007; Vaicenavicius et al., AISTATS
  2019). An ECE near it is no sign of bad calibration.

Confidence is the largest probability. All errors are 0 to 1, lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.intervals import (
    Estimate,
    Interval,
    Statistic,
    effective_groups,
    known,
    resamples,
    share_interval,
)
from evaluation.statistics.pooled import repetitions
from vitrail.errors import UserError
from vitrail.predictions import Predictions
from vitrail.types import UNKNOWN

Binning = Literal["width", "mass"]

BINS = 15
"""As in Guo et al."""

LOWEST, HIGHEST = 0.01, 100.0
"""Range of temperatures; at an end of it there is none that is best (see ``fit_temperature``)."""


class Calibration(NamedTuple):
    """Calibration of one task on the N samples with a known target; NaN for none.

    Attributes:
        confidence: float64 ``(N,)``.
        correct: bool ``(N,)``.
        ece: expected calibration error in bins of equal width.
        ece_mass: the same in bins of equal mass.
        by_chance: ECE that a perfectly calibrated model would have on samples like these on average.
        nll: mean negative log-likelihood in nats, lower is better.
    """

    confidence: NDArray[np.float64]
    correct: NDArray[np.bool_]
    ece: Estimate
    ece_mass: float
    by_chance: float
    nll: float


def calibration_of(predictions: Predictions, task: str, temperature: float = 1.0) -> Calibration:
    """Measure the calibration of a task's confidences at a temperature."""
    rows = known(predictions.targets[task])
    targets, logits = predictions.targets[task][rows], predictions.logits[task][rows]
    correct = predictions.predicted(task)[rows] == targets
    confidence = predictions.probabilities(task, temperature)[rows].max(axis=1)
    return Calibration(
        confidence,
        correct,
        calibration_error(confidence, correct, predictions.groups[rows]),
        expected_calibration_error(confidence, correct, binning="mass"),
        float(chance_errors(confidence, correct, predictions.groups[rows]).mean()),
        negative_log_likelihood(logits, targets, temperature),
    )


@dataclass(frozen=True)
class ReliabilityBins:
    """What a reliability diagram shows; B bins, those without samples included.

    Attributes:
        edges: float64 ``(B + 1,)``, confidences between which the bins lie.
        count: int64 ``(B,)``, samples.
        confidence: float64 ``(B,)``, mean confidence; NaN for no samples.
        accuracy: float64 ``(B,)``, share of right predictions; NaN for no samples.
    """

    edges: NDArray[np.float64]
    count: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]


def reliability_bins(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_], n_bins: int = BINS, binning: Binning = "width"
) -> ReliabilityBins:
    """Sort samples into bins by their confidence.

    Args:
        confidence: float64 ``(N,)``, 0 to 1, N at least 1.
        correct: bool ``(N,)``.
        n_bins: number of bins; of equal mass there are fewer where confidences repeat.
        binning: bins of equal width from 0 to 1, or of as equal numbers of samples as there can be.
    """
    edges = _edges(confidence, n_bins, binning)
    index = _bin_of(confidence, edges)
    size = len(edges) - 1
    count = np.bincount(index, minlength=size)
    sums = [np.bincount(index, weights=values.astype(np.float64), minlength=size) for values in (confidence, correct)]
    nothing = np.full(size, math.nan)
    mean_confidence, accuracy = (np.divide(total, count, out=nothing.copy(), where=count > 0) for total in sums)
    return ReliabilityBins(edges, count.astype(np.int64), mean_confidence, accuracy)


def expected_calibration_error(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_], n_bins: int = BINS, binning: Binning = "width"
) -> float:
    """Return the mean distance of a bin's accuracy from its mean confidence over samples; NaN for no samples.

    Arguments are as in ``reliability_bins``.
    """
    if not len(confidence):
        return math.nan
    return float(calibration_statistic(confidence, correct, n_bins, binning)(np.ones((1, len(confidence))))[0])


def calibration_statistic(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_], n_bins: int = BINS, binning: Binning = "width"
) -> Statistic:
    """Return the ECE as a function of sample weights; the bins are those of all samples."""
    from scipy.sparse import csr_matrix

    edges = _edges(confidence, n_bins, binning)
    gap = correct.astype(np.float64) - confidence
    place = (np.arange(len(gap)), _bin_of(confidence, edges))
    gaps = csr_matrix((gap, place), shape=(len(gap), len(edges) - 1))

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        values: NDArray[np.float64] = np.abs(weights @ gaps).sum(axis=1) / weights.sum(axis=1)
        return values

    return statistic


def calibration_error(
    confidence: NDArray[np.float64],
    correct: NDArray[np.bool_],
    groups: NDArray[Any],
    *,
    n_bins: int = BINS,
    binning: Binning = "width",
    n_resamples: int = 5_000,
    seed: int = 0,
) -> Estimate:
    """Return the ECE with its 95 % interval by group; ``groups`` is ``(N,)``.

    Scatter only adds to an ECE: a resample scatters around the sample as the sample does around the truth, so that
    percentiles of a bootstrap lie too high. The interval reaches from the ECE without that bias, less Student's
    quantile times the standard error of the bootstrap of groups, to the ECE itself plus as much; and it begins at 0
    where a perfectly calibrated model could well have this ECE (``chance_errors``).

    Simulated coverage (20 to 500 groups of equal and very unequal size, correlation 0 to .9): .92 to .98 for a true ECE
    of 0, .93 to .99 for .05, .88 to .97 for .15.
    """
    from scipy.special import stdtrit

    value = expected_calibration_error(confidence, correct, n_bins, binning)
    if math.isnan(value):
        return Estimate(value, Interval(value, value))
    sizes = np.unique(groups, return_counts=True)[1].astype(np.float64)
    if len(sizes) < 2:
        return Estimate(value, Interval(0.0, 1.0))
    resampled = resamples(calibration_statistic(confidence, correct, n_bins, binning), groups, n_resamples, seed=seed)
    half = float(stdtrit(max(effective_groups(sizes) - 1, 1), 0.975) * resampled.std(ddof=1))
    by_chance = float(np.quantile(chance_errors(confidence, correct, groups, n_bins, binning, seed=seed), 0.975))
    unbiased = 2 * value - float(resampled.mean())
    return Estimate(value, Interval(0.0 if value <= by_chance else max(0.0, unbiased - half), min(1.0, value + half)))


def chance_errors(
    confidence: NDArray[np.float64],
    correct: NDArray[np.bool_],
    groups: NDArray[Any],
    n_bins: int = BINS,
    binning: Binning = "width",
    *,
    draws: int = 1_000,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Sample ECEs that a perfectly calibrated model would have on samples like these.

    For such a model the mean gap between being right and the confidence is 0, so the gaps of a whole group could as
    well have the other sign (the wild cluster bootstrap under the null hypothesis; Cameron, Gelbach & Miller, Review of
    Economics and Statistics 90, 2008). Samples of one group, which are right or wrong together, stay together.

    Args:
        confidence: float64 ``(N,)``, 0 to 1.
        correct: bool ``(N,)``.
        groups: ``(N,)``, the group of each sample.
        n_bins: number of bins.
        binning: bins of equal width or of equal mass.
        draws: number of ECEs.
        seed: of the signs.

    Returns:
        float64 ``(draws,)``; NaN for no samples.
    """
    if not len(confidence):
        return np.full(draws, math.nan)
    place = _bin_of(confidence, _edges(confidence, n_bins, binning))
    index = np.unique(groups, return_inverse=True)[1]
    num_groups = int(index.max()) + 1
    gaps = np.zeros((num_groups, n_bins))
    np.add.at(gaps, (index, place), correct - confidence)
    rng = np.random.default_rng(seed)
    sums = (np.abs(rng.choice((-1.0, 1.0), num_groups) @ gaps).sum() for _ in range(draws))
    # A sample of G groups spreads by (G - 1) / G of the variance.
    return np.array([*sums]) / len(confidence) * math.sqrt(num_groups / max(num_groups - 1, 1))


def negative_log_likelihood(
    logits: NDArray[np.floating[Any]], targets: NDArray[np.int64], temperature: float = 1.0
) -> float:
    """Return the mean of −log p(target), in nats, lower is better; NaN for no samples.

    Args:
        logits: ``(N, C)``.
        targets: int64 ``(N,)``, all known.
        temperature: that the logits are divided by.
    """
    from scipy.special import log_softmax

    if not len(targets):
        return math.nan
    scaled = log_softmax(logits.astype(np.float64) / temperature, axis=1)
    return float(-np.take_along_axis(scaled, targets[:, None], axis=1).mean())


def fit_temperature(logits: NDArray[np.floating[Any]], targets: NDArray[np.int64]) -> float:
    """Return the temperature with the lowest negative log-likelihood, which is convex in its inverse.

    To be fitted on validation. Where none changes anything, as with equal logits, it is 1. Where every prediction is
    right there is no best one, the colder the better; where the logits show nothing of the targets, the hotter the
    better. Then the end of the range is returned (``is_at_end``).

    Args:
        logits: ``(N, C)``.
        targets: int64 ``(N,)``, all known.

    Raises:
        UserError: there are no samples, or logits are not finite.
    """
    from scipy.optimize import minimize_scalar

    if not len(targets):
        raise UserError("temperature: no sample has a known target; predict a split with targets")
    if not np.isfinite(logits).all():
        raise UserError("temperature: logits are not finite; the model has diverged: train again")
    bounds = (math.log(LOWEST), math.log(HIGHEST))
    found = minimize_scalar(
        lambda exponent: negative_log_likelihood(logits, targets, math.exp(exponent)),
        bounds=bounds,
        method="bounded",
        options={"xatol": 1e-6},
    )
    # Flat towards an end, as where all is right and the likelihood has long been 1, means no inner best either.
    exponents = [*bounds, float(found.x)]
    losses = [negative_log_likelihood(logits, targets, math.exp(exponent)) for exponent in exponents]
    if max(losses) - min(losses) < 1e-9:
        return 1.0
    return math.exp(exponents[int(np.argmin(losses))])


def fit_labels(logits: NDArray[np.floating[Any]], targets: NDArray[np.int8]) -> list[float]:
    """Return a temperature for all labels of a task and a bias for each, with the lowest binary cross-entropy.

    Platt scaling (Advances in Large Margin Classifiers, 1999) with one slope for all, so that of a rare label only the
    bias is fitted; as there, targets are (n + 1) / (n + 2) and 1 / (n' + 2) of a label's n positive and n' negative
    samples, by which biases stay finite. To be fitted on validation.

    Args:
        logits: ``(N, C)``.
        targets: int8 ``(N, C)``, ``UNKNOWN`` where not known.

    Returns:
        The temperature, ``LOWEST`` to ``HIGHEST``, and C biases; 0 of a label without a known entry.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    known, positive = targets != UNKNOWN, targets == 1
    n_positive, n_negative = positive.sum(axis=0), (known & ~positive).sum(axis=0)
    aim = np.where(positive, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))
    own = logits.astype(np.float64)

    def loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        moved = values[0] * own + values[1:]
        losses = np.where(known, np.logaddexp(0.0, moved) - aim * moved, 0.0)
        slope = np.where(known, expit(moved) - aim, 0.0)
        return float(losses.sum()), np.array([(slope * own).sum(), *slope.sum(axis=0)])

    bounds = [(1 / HIGHEST, 1 / LOWEST), *[(None, None)] * logits.shape[1]]
    found = minimize(loss, np.array([1.0, *np.zeros(logits.shape[1])]), jac=True, method="L-BFGS-B", bounds=bounds)
    return [float(1 / found.x[0]), *map(float, found.x[1:])]


LEVELS = (0.5, 0.8, 0.95)
"""Intervals of predicted numbers whose coverage is measured."""

_STANDARD = 0.6827
"""Share of a normal distribution that is within one standard deviation."""


def fit_scale(errors: NDArray[np.float64], deviations: NDArray[np.float64]) -> float:
    """Return the factor of predicted standard deviations with the highest normal likelihood.

    It is the root of the mean squared standardised error (Laves et al., Medical Imaging with Deep Learning, 2020).
    """
    return float(np.sqrt(np.mean((errors / deviations) ** 2)))


def conformal_width(errors: NDArray[np.float64], level: float) -> float:
    """Return the half-width of intervals that hold the truth of a further sample with a chance of ``level`` at least.

    Split conformal prediction (Lei et al., JASA 113, 2018), for samples that are exchangeable with these. Infinite
    where there are too few samples for the level.

    Args:
        errors: float64 ``(N,)``, of samples that the model was not trained on.
        level: between 0 and 1.
    """
    place = math.ceil((len(errors) + 1) * level)
    return float(np.sort(np.abs(errors))[place - 1]) if place <= len(errors) else math.inf


def standard_width(errors: NDArray[np.float64]) -> float:
    """Return the half-width that stands in for a standard deviation: 68 % of the errors are within it."""
    return min(conformal_width(errors, _STANDARD), float(np.abs(errors).max()))


def coverages(
    errors: NDArray[np.float64], widths: Sequence[NDArray[np.float64] | float], groups: NDArray[Any]
) -> list[Estimate]:
    """Return the share of errors within each of several half-widths, with 95 % intervals by group."""
    within = [(np.abs(errors) <= width).astype(np.float64) for width in widths]
    return [Estimate(float(one.mean()), share_interval(one, groups)) for one in within]


def is_at_end(temperature: float) -> bool:
    """Return whether a fitted temperature is only an end of the range."""
    return not LOWEST * 1.001 < temperature < HIGHEST / 1.001


def _edges(confidence: NDArray[np.float64], n_bins: int, binning: Binning) -> NDArray[np.float64]:
    if binning == "width":
        return np.linspace(0.0, 1.0, n_bins + 1)
    # Equal confidences stay in one bin.
    inner = np.unique(np.quantile(confidence, np.arange(1, n_bins) / n_bins, method="inverted_cdf"))
    return np.array([0.0, *inner[inner < confidence.max()], 1.0])


def _bin_of(confidence: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """Bin of each confidence; a bin holds its upper edge, as in Guo et al., and the first one 0 as well."""
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, len(edges) - 2).astype(np.int64)


def joined_calibration_error(
    runs: Sequence[Predictions],
    task: str,
    names: Sequence[str],
    temperatures: Sequence[float] | None = None,
    n_resamples: int = 5_000,
) -> Estimate:
    """Return the ECE over all samples: folds are put together, and of seeds the mean is taken.

    Args:
        runs: predictions of each run, at least one.
        task: whose confidences.
        names: of the runs, for messages.
        temperatures: above 0, by which each run's logits are divided; none by default.
        n_resamples: of the bootstrap.

    Returns:
        0 to 1, lower is better; NaN where no target is known. The interval is by group; for several seeds it is NaN,
        because what chance alone gives (see ``calibration_error``) is not known for predictions that depend on each
        other.

    Raises:
        UserError: the runs cannot be joined, as ``join_runs``.
    """
    if temperatures is not None:
        runs = [
            replace(run, logits={**run.logits, task: run.logits[task] / np.float32(temperature)})
            for run, temperature in zip(runs, temperatures, strict=True)
        ]
    whole = repetitions(runs, task, names)
    rows = known(whole[0].targets[task])
    confidence = [run.probabilities(task)[rows].max(axis=1) for run in whole]
    correct = [run.predicted(task)[rows] == run.targets[task][rows] for run in whole]
    if len(whole) == 1:
        return calibration_error(confidence[0], correct[0], whole[0].groups[rows], n_resamples=n_resamples)
    errors = [expected_calibration_error(*each) for each in zip(confidence, correct, strict=True)]
    return Estimate(float(np.mean(errors)), Interval(math.nan, math.nan))
