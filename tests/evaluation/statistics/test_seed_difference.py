from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluation.statistics.paired import compare_joined, seed_interval
from evaluation.statistics.pooled import join_runs
from tests.evaluation.statistics.test_comparison import predictions_of
from vitrail.predictions import Predictions

# Student's t at 97.5 %, from printed tables, by degrees of freedom.
T = {1: 12.706, 2: 4.303, 4: 2.776}


def test_single_runs_say_nothing_of_seeds() -> None:
    assert all(math.isnan(end) for end in seed_interval([0.9], [0.5]))


def test_equal_spreads_are_students_interval() -> None:
    """Where both sides have as many runs and the same spread, Welch's degrees of freedom are n + m - 2."""
    first, second = [0.50, 0.52, 0.54], [0.40, 0.42, 0.44]
    half = T[4] * 0.02 * math.sqrt(2 / 3)
    assert seed_interval(first, second) == pytest.approx((0.1 - half, 0.1 + half), abs=1e-5)


def test_a_single_run_is_as_uncertain_as_the_others() -> None:
    half = T[2] * 0.02 * math.sqrt(1 + 1 / 3)
    assert seed_interval([0.7], [0.50, 0.52, 0.54]) == pytest.approx((0.18 - half, 0.18 + half), abs=1e-5)
    half = T[1] * float(np.std([0.5, 0.6], ddof=1)) * math.sqrt(1 + 1 / 2)
    assert seed_interval([0.5, 0.6], [0.5]) == pytest.approx((0.05 - half, 0.05 + half), abs=1e-4)


def test_seeds_that_change_nothing_leave_the_difference() -> None:
    assert seed_interval([0.75, 0.75], [0.5]) == (0.25, 0.25)


def test_equal_scores_of_other_answers_are_no_interval_of_width_zero() -> None:
    targets, groups = np.zeros(8, np.int64), np.arange(8)
    answers = [np.array([1, 0, 0, 0, 0, 0, 0, 0]), np.array([0, 1, 0, 0, 0, 0, 0, 0])]
    seeds = [predictions_of(targets, answer, groups) for answer in answers]
    other = predictions_of(targets, np.ones(8, np.int64), groups)
    assert all(math.isnan(end) for end in compare_joined(seeds, [other], "class", n_resamples=10).over_seeds)
    assert compare_joined(seeds[:1] * 2, [other], "class", n_resamples=10).over_seeds == (7 / 8, 7 / 8)
    assert all(math.isnan(end) for end in join_runs(seeds, "class", n_resamples=10).accuracy.interval)
    assert join_runs(seeds[:1] * 2, "class", n_resamples=10).accuracy.interval == (7 / 8, 7 / 8)


def seeds_of(
    rng: np.random.Generator, targets: NDArray[np.int64], mean: float, spread: float, k: int
) -> list[Predictions]:
    """Runs whose accuracy differs from seed to seed."""
    runs = []
    for chance in np.clip(rng.normal(mean, spread, k), 0, 1):
        right = rng.random(len(targets)) < chance
        runs.append(predictions_of(targets, np.where(right, targets, (targets + 1) % 3), np.arange(len(targets))))
    return runs


def told_apart(means: tuple[float, float], spread: float, trials: int = 100) -> tuple[float, float]:
    """How often experiments of three seeds each are told apart, with the seeds' interval and by the samples alone."""
    rng = np.random.default_rng(0)
    targets = rng.integers(3, size=1500)
    told = by_samples = 0
    for _ in range(trials):
        first, second = (seeds_of(rng, targets, mean, spread, 3) for mean in means)
        found = compare_joined(first, second, "class", n_resamples=100)
        told += found.told_apart()
        by_samples += found.p_value < 0.05
    return told / trials, by_samples / trials


def test_what_only_the_seeds_made_is_not_told_apart() -> None:
    told, by_samples = told_apart((0.6, 0.6), spread=0.03)
    assert told <= 0.08  # 100 trials of a 5 % test: its standard error is .022
    assert by_samples > 0.3  # what the samples alone would have claimed


def test_what_seeds_cannot_have_made_is_told_apart() -> None:
    assert told_apart((0.7, 0.6), spread=0.01)[0] > 0.9


def test_the_verdict_tells_the_interval_over_seeds() -> None:
    rng = np.random.default_rng(1)
    targets = rng.integers(3, size=1500)
    first, second = (seeds_of(rng, targets, mean, 0.05, 2) for mean in (0.7, 0.6))
    found = compare_joined(first, second, "class", ("A", "B"), n_resamples=100)
    low, high = found.over_seeds
    assert low < found.accuracy_difference.value < high
    assert f"over seeds [{low:+.3f}, {high:+.3f}], p = " in found.verdict()
    single = compare_joined(first[:1], second[:1], "class", ("A", "B"), n_resamples=100)
    assert "over seeds" not in single.verdict()
