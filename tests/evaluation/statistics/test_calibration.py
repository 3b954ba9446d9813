from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, softmax
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from evaluation.statistics.calibration import (
    HIGHEST,
    LEVELS,
    LOWEST,
    calibration_error,
    calibration_statistic,
    chance_errors,
    conformal_width,
    coverages,
    expected_calibration_error,
    fit_labels,
    fit_scale,
    fit_temperature,
    is_at_end,
    joined_calibration_error,
    negative_log_likelihood,
    reliability_bins,
    standard_width,
)
from evaluation.statistics.intervals import Estimate
from tests.evaluation.predictions_fixture import make_predictions
from vitrail.errors import UserError
from vitrail.predictions import Predictions
from vitrail.types import UNKNOWN


def sample(n: int = 400, shift: float = 0.1, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Confidences, and answers that are right by ``shift`` less often."""
    rng = np.random.default_rng(seed)
    confidence = 0.2 + 0.8 * rng.beta(3, 2, n)
    return confidence, rng.random(n) < np.clip(confidence - shift, 0, 1)


def drawn(temperature: float, n: int = 6_000, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Logits whose targets were drawn with this temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(n, 5))
    chances = softmax(logits / temperature, axis=1)
    return logits, (rng.random((n, 1)) > chances.cumsum(axis=1)).sum(axis=1).clip(max=4)


def error_by_hand(confidence: NDArray[np.float64], correct: NDArray[np.bool_], edges: NDArray[np.float64]) -> float:
    total = 0.0
    for number, (low, high) in enumerate(itertools.pairwise(edges.tolist())):
        inside = [i for i, c in enumerate(confidence) if low < c <= high or (number == 0 and c == low)]
        if inside:
            gap = np.mean([correct[i] for i in inside]) - np.mean([confidence[i] for i in inside])
            total += abs(gap) * len(inside) / len(confidence)
    return total


@pytest.mark.parametrize("n_bins", [1, 10, 15])
@pytest.mark.parametrize("binning", ["width", "mass"])
def test_error_equals_that_by_hand(binning: str, n_bins: int) -> None:
    confidence, correct = sample(150)
    confidence[:4] = [1.0, 0.2, 0.4, 0.0]  # edges belong to the lower bin
    bins = reliability_bins(confidence, correct, n_bins, "mass" if binning == "mass" else "width")
    found = expected_calibration_error(confidence, correct, n_bins, "mass" if binning == "mass" else "width")
    assert found == pytest.approx(error_by_hand(confidence, correct, bins.edges))
    filled = bins.count > 0
    gaps = np.abs(bins.accuracy - bins.confidence)[filled]
    assert found == pytest.approx(float((gaps * bins.count[filled]).sum() / 150))


def test_bins_equal_scikit_learns_curve() -> None:
    confidence, correct = sample()
    bins = reliability_bins(confidence, correct, 10)
    accuracy, mean_confidence = calibration_curve(correct, confidence, n_bins=10)
    filled = bins.count > 0
    np.testing.assert_allclose(bins.accuracy[filled], accuracy)
    np.testing.assert_allclose(bins.confidence[filled], mean_confidence)
    assert bins.count.sum() == 400
    assert np.isnan(bins.accuracy[~filled]).all()


def test_bins_of_equal_mass_hold_as_many() -> None:
    confidence, correct = sample(300)
    assert reliability_bins(confidence, correct, 15, "mass").count.tolist() == [20] * 15
    # Equal confidences cannot be torn apart.
    same = reliability_bins(np.full(30, 0.7), correct[:30], 15, "mass")
    assert same.count.tolist() == [30]
    assert same.edges.tolist() == [0.0, 1.0]


def test_known_errors() -> None:
    always_sure = np.ones(10)
    assert expected_calibration_error(always_sure, np.ones(10, dtype=bool)) == 0
    assert expected_calibration_error(always_sure, np.zeros(10, dtype=bool)) == 1
    assert expected_calibration_error(always_sure, np.arange(10) < 7) == pytest.approx(0.3)
    assert math.isnan(expected_calibration_error(np.empty(0), np.empty(0, dtype=bool)))
    nothing = calibration_error(np.empty(0), np.empty(0, dtype=bool), np.empty(0))
    assert math.isnan(nothing.interval.high)


def test_weights_mean_repetition() -> None:
    confidence, correct = sample(80)
    weights = np.random.default_rng(0).integers(0, 4, size=(3, 80))
    found = calibration_statistic(confidence, correct)(weights.astype(np.float64))
    for counts, value in zip(weights, found, strict=True):
        rows = np.repeat(np.arange(80), counts)
        assert value == pytest.approx(expected_calibration_error(confidence[rows], correct[rows]))


def test_chance_is_what_a_perfect_model_shows() -> None:
    confidence, correct = sample(100)
    rng = np.random.default_rng(5)
    drawn_again = [expected_calibration_error(confidence, rng.random(100) < confidence) for _ in range(1_000)]
    by_chance = chance_errors(confidence, correct, np.arange(100))
    assert by_chance.mean() == pytest.approx(np.mean(drawn_again), rel=0.05)
    assert np.quantile(by_chance, 0.9) == pytest.approx(np.quantile(drawn_again, 0.9), rel=0.08)
    assert by_chance.mean() > 0.08
    assert chance_errors(*sample(10_000), np.arange(10_000), draws=50).mean() < 0.015


def test_interval_holds_its_estimate_and_is_wider_by_group() -> None:
    confidence, correct = sample(200, 0.2)
    groups = np.arange(200) // 20
    repeated = np.repeat(correct[::20], 20)
    by_group, by_sample = (calibration_error(confidence, repeated, rows) for rows in (groups, np.arange(200)))
    for estimate in (by_group, by_sample):
        assert estimate.interval.low <= estimate.value <= estimate.interval.high
    assert by_group.interval.high >= by_sample.interval.high


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_a_known_temperature_is_found(temperature: float) -> None:
    logits, targets = drawn(temperature)
    found = fit_temperature(logits.astype(np.float32), targets)
    assert found == pytest.approx(temperature, rel=0.05)
    assert not is_at_end(found)
    best = negative_log_likelihood(logits, targets, found)
    for other in (found * 0.97, found * 1.03):
        assert negative_log_likelihood(logits, targets, other) > best


def test_a_fitted_temperature_mends_the_error_of_other_samples() -> None:
    logits, targets = drawn(2.5)
    temperature = fit_temperature(logits[:3_000], targets[:3_000])
    correct = logits[3_000:].argmax(axis=1) == targets[3_000:]
    errors = [
        expected_calibration_error(softmax(logits[3_000:] / value, axis=1).max(axis=1), correct)
        for value in (1.0, temperature)
    ]
    assert errors[0] > 0.15
    assert errors[1] < 0.03


def test_likelihood_equals_scikit_learn() -> None:
    logits, targets = drawn(1.0, 200)
    expected = log_loss(targets, softmax(logits / 1.7, axis=1), labels=range(5))
    assert negative_log_likelihood(logits, targets, 1.7) == pytest.approx(expected)
    assert math.isnan(negative_log_likelihood(np.empty((0, 5)), np.empty(0, dtype=np.int64)))


def test_without_a_best_temperature_it_is_an_end() -> None:
    logits, _ = drawn(1.0, 200)
    all_right = fit_temperature(logits, logits.argmax(axis=1))
    assert all_right == pytest.approx(LOWEST)
    assert is_at_end(all_right)
    always_wrong = fit_temperature(logits, logits.argmin(axis=1))
    assert always_wrong == pytest.approx(HIGHEST)
    assert is_at_end(always_wrong)


def test_nothing_to_fit_is_refused() -> None:
    with pytest.raises(UserError, match="no sample has a known target"):
        fit_temperature(np.empty((0, 5)), np.empty(0, dtype=np.int64))
    with pytest.raises(UserError, match="logits are not finite"):
        fit_temperature(np.array([[1.0, math.nan]]), np.array([0]))


def test_probabilities_are_the_softmax_with_the_temperature() -> None:
    predictions = make_predictions(30)
    expected = softmax(predictions.logits["class"].astype(np.float64) / 2, axis=1)
    np.testing.assert_allclose(predictions.probabilities("class", 2.0), expected)
    np.testing.assert_allclose(predictions.probabilities("class").sum(axis=1), 1)


def of_one(run: Predictions, temperature: float = 1.0) -> Estimate:
    rows = np.flatnonzero(run.targets["class"] != UNKNOWN)
    confidence = run.probabilities("class", temperature)[rows].max(axis=1)
    correct = run.predicted("class")[rows] == run.targets["class"][rows]
    return calibration_error(confidence, correct, run.groups[rows], n_resamples=200)


def matches(found: Estimate, expected: Estimate) -> None:
    assert found.value == pytest.approx(expected.value, abs=1e-6)
    assert tuple(found.interval) == pytest.approx(tuple(expected.interval), abs=1e-6)


@pytest.fixture
def run() -> Predictions:
    return make_predictions(60)


@pytest.mark.parametrize("temperature", [None, 0.4, 3.0])
def test_one_run_has_its_error_and_interval(run: Predictions, temperature: float | None) -> None:
    given = None if temperature is None else [temperature]
    matches(joined_calibration_error([run], "class", ["a"], given, 200), of_one(run, temperature or 1.0))


def test_folds_count_as_one_test_set_each_with_its_temperature(run: Predictions) -> None:
    folds = [run.take(np.arange(start, start + 20)) for start in (40, 0, 20)]
    order = np.concatenate([np.arange(40, 60), np.arange(40)])
    matches(joined_calibration_error(folds, "class", list("abc"), None, 200), of_one(run.take(order)))
    sharper = replace(folds[0], logits={**folds[0].logits, "class": folds[0].logits["class"] * 2})
    found = joined_calibration_error([sharper, *folds[1:]], "class", list("abc"), [2.0, 1.0, 1.0], 200)
    matches(found, of_one(run.take(order)))


def test_of_seeds_the_mean_is_taken_without_an_interval(run: Predictions) -> None:
    sharper = replace(run, logits={task: values * 5 for task, values in run.logits.items()})
    found = joined_calibration_error([run, sharper], "class", ["a", "b"])
    assert found.value == pytest.approx((of_one(run).value + of_one(sharper).value) / 2)
    assert math.isnan(found.interval.low)


def test_without_a_known_target_there_is_none(run: Predictions) -> None:
    unknown = replace(run, targets={task: np.full(len(run), UNKNOWN) for task in run.tasks})
    assert math.isnan(joined_calibration_error([unknown], "class", ["a"]).value)


def test_a_known_temperature_and_biases_of_labels_are_found() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(6_000, 3))
    truth = expit(logits / 2.5 + (0.0, -1.0, 2.0))
    targets = (rng.random(truth.shape) < truth).astype(np.int8)
    temperature, *biases = fit_labels(logits, targets)
    assert temperature == pytest.approx(2.5, rel=0.05)
    assert biases == pytest.approx([0.0, -1.0, 2.0], abs=0.15)
    # One label is a logistic regression without a penalty; of many samples Platt's targets are the targets.
    slope = LogisticRegression(C=np.inf).fit(logits[:, :1], targets[:, 0])
    found = fit_labels(logits[:, :1], targets[:, :1])
    assert found == pytest.approx([1 / slope.coef_[0, 0], slope.intercept_[0]], rel=1e-2, abs=1e-2)
    unknown = targets.copy()
    unknown[:, 2] = UNKNOWN
    assert fit_labels(logits, unknown)[3] == 0.0
    alone = fit_labels(logits[:, :2], targets[:, :2])
    assert fit_labels(logits, unknown)[:3] == pytest.approx(alone, rel=1e-3, abs=1e-3)
    assert np.isfinite(fit_labels(logits, np.zeros_like(targets))).all()


def test_intervals_of_numbers_hold_their_level() -> None:
    rng = np.random.default_rng(0)
    deviations = rng.uniform(1, 4, 4_000)
    errors = 1.7 * deviations * rng.normal(size=4_000)
    assert fit_scale(errors[:2_000], deviations[:2_000]) == pytest.approx(1.7, rel=0.05)
    widths = [conformal_width(errors[:2_000], level) for level in LEVELS]
    found = coverages(errors[2_000:], widths, np.arange(2_000))
    assert [one.value for one in found] == pytest.approx(list(LEVELS), abs=0.05)
    assert all(one.interval.low < one.value < one.interval.high for one in found)
    # Of nine errors the largest is the first that holds 90 %; of fewer, nothing holds as much.
    nine = np.arange(1.0, 10.0)
    assert conformal_width(nine, 0.9) == 9.0
    assert conformal_width(nine[:8], 0.9) == math.inf
    assert standard_width(nine) == 7.0
    assert standard_width(nine[:1]) == 1.0
