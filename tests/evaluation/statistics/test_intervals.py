from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray
from sklearn import metrics

from evaluation.statistics import intervals as statistics


def labels(n: int = 300, num_classes: int = 6, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    targets = rng.integers(num_classes - 1, size=n)  # the last class has no target
    predicted = np.where(rng.random(n) < 0.6, targets, rng.integers(num_classes, size=n))
    return targets, predicted


def f1(
    targets: NDArray[np.int64], predicted: NDArray[np.int64], average: Literal["macro", "weighted"] = "macro"
) -> float:
    return float(statistics.f1_statistic(targets, predicted, average)(np.ones((1, len(targets))))[0])


AVERAGES: list[Literal["macro", "weighted"]] = ["macro", "weighted"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [3, 40, 300])
def test_scores_equal_scikit_learn(n: int, seed: int) -> None:
    targets, predicted = labels(n, seed=seed)
    assert statistics.accuracy(targets, predicted) == pytest.approx(metrics.accuracy_score(targets, predicted))
    for average in AVERAGES:
        expected = metrics.f1_score(targets, predicted, average=average, zero_division=0)
        assert f1(targets, predicted, average) == pytest.approx(expected)


def test_equally_frequent_classes_make_the_hardest_baseline_in_any_order() -> None:
    targets = np.array([0, 1, 1, 2, 2, 2])
    for order in ([5, 3, 5], [5, 5, 5], [4, 5, 5]):
        assert statistics.majority_baseline(targets, order) == (3 / 6, 2, "train")
    assert statistics.majority_baseline(targets, [5, 4, 4]) == (1 / 6, 0, "train")
    assert statistics.majority_baseline(targets) == (3 / 6, 2, "split")


def test_samples_without_a_prediction_are_wrong_in_f1() -> None:
    targets, predicted = np.array([0, 0, 1, 2]), np.array([0, -1, 1, -1])
    # As scikit-learn counts a prediction of no class, which itself is no class of the mean.
    expected = metrics.f1_score(targets, np.where(predicted < 0, 3, predicted), labels=[0, 1, 2], average="macro")
    assert f1(targets, predicted) == pytest.approx(expected)
    assert statistics.accuracy(targets, predicted) == 1 / 2


def test_nothing_known_gives_nan() -> None:
    none = np.empty(0, dtype=np.int64)
    assert math.isnan(statistics.accuracy(none, none))
    interval = statistics.group_interval(lambda weights: weights.sum(axis=1), none)
    assert math.isnan(interval.low)
    assert math.isnan(statistics.share_interval(none.astype(np.float64), none).low)
    assert statistics.small_classes(none, none) == (0, 0)
    assert math.isnan(statistics.wilson(0.5, 0).high)


def test_weights_of_a_statistic_mean_repetition() -> None:
    targets, predicted = labels(60)
    predicted = np.where(predicted == 5, 0, predicted)  # a class without targets counts differently: see below
    rng = np.random.default_rng(1)
    weights = rng.integers(0, 4, size=(5, 60))
    accuracy = statistics.accuracy_statistic(targets, predicted)(weights.astype(np.float64))
    macro = statistics.f1_statistic(targets, predicted)(weights.astype(np.float64))
    for row, counts in enumerate(weights):
        repeated = np.repeat(np.arange(60), counts)
        drawn = np.unique(targets[repeated])
        expected = metrics.f1_score(targets[repeated], predicted[repeated], labels=drawn, average="macro")
        assert macro[row] == pytest.approx(expected)
        assert accuracy[row] == pytest.approx(np.mean(targets[repeated] == predicted[repeated]))


def test_predictions_of_a_class_without_targets_count_against_macro_f1() -> None:
    targets, predicted = np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1])
    expected = metrics.f1_score(targets, predicted, average="macro", zero_division=0)
    assert statistics.f1_statistic(targets, predicted)(np.ones((1, 4)))[0] == pytest.approx(expected)
    # A resample without class 0 shows nothing of class 0, and nothing was predicted 2.
    assert statistics.f1_statistic(targets, predicted)(np.array([[0.0, 0.0, 1.0, 1.0]]))[0] == 1.0


def test_macro_f1_interval_is_not_pulled_down_by_classes_that_were_not_sampled() -> None:
    # One object a class; one prediction in sixty is wrong.
    targets = np.repeat(np.arange(12), 5)
    predicted = targets.copy()
    predicted[0] = 11
    interval = statistics.group_interval(statistics.f1_statistic(targets, predicted), targets)
    assert interval.low > 0.9


def test_variance_of_a_mean_is_that_of_the_means_of_equal_groups() -> None:
    rng = np.random.default_rng(0)
    scores = (rng.random((40, 5)) < rng.beta(2, 1, 40)[:, None]).astype(np.float64)
    names = np.array([f"object {index}" for index in np.repeat(np.arange(40), 5)], dtype=object)
    expected = scipy.stats.sem(scores.mean(axis=1)) ** 2
    assert statistics.variance_of_mean(scores.ravel(), names) == pytest.approx(expected, rel=1e-3)


def test_small_groups_show_what_may_happen_in_large_ones() -> None:
    # Ten of forty small objects are all wrong; two large ones, right by chance, hold half of the images.
    groups = np.concatenate([np.repeat(np.arange(40), 5), np.repeat([40, 41], 100)])
    scores = np.where(groups < 10, 0.0, 1.0)
    independent = scores.mean() * (1 - scores.mean()) / 400
    assert statistics.variance_of_mean(scores, groups) == pytest.approx(independent * (groups_squared(groups) / 400))


def groups_squared(groups: NDArray[np.int64]) -> float:
    return float((np.bincount(groups).astype(np.float64) ** 2).sum())


def test_images_of_one_object_widen_the_interval() -> None:
    correct = np.repeat(np.array([1, 1, 0, 1, 1, 0, 1, 1]), 10)
    statistic = statistics.accuracy_statistic(np.ones(80, dtype=np.int64), correct)
    by_object = statistics.group_interval(statistic, np.repeat(np.arange(8), 10))
    by_image = statistics.group_interval(statistic, np.arange(80))
    assert by_object.high - by_object.low > 2 * (by_image.high - by_image.low)


def test_standard_error_of_the_bootstrap_equals_scipys() -> None:
    targets, predicted = labels(240)
    statistic, groups = statistics.f1_statistic(targets, predicted), np.arange(240) // 4

    def of_groups(chosen: NDArray[np.int64]) -> float:
        return float(statistic(np.bincount(chosen, minlength=60)[None, groups].astype(np.float64))[0])

    expected = scipy.stats.bootstrap(
        (np.arange(60),), of_groups, vectorized=False, n_resamples=4_000, rng=np.random.default_rng(0)
    ).standard_error
    low, high = statistics.group_interval(statistic, groups, 4_000)
    half = scipy.stats.t.ppf(0.975, 59) * expected * math.sqrt(60 / 59)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert (high + low) / 2 == pytest.approx(f1(targets, predicted))


def test_percentiles_of_ranks_equal_scipys() -> None:
    values = np.random.default_rng(1).random(400)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval

    def mean(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = weights @ values / weights.sum(axis=1)
        return found

    interval = statistics.group_interval(mean, np.arange(400), 10_000, percentiles=True)
    assert interval == pytest.approx((expected.low, expected.high), abs=0.002)


def test_interval_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, predicted = labels(50)
    statistic, groups = statistics.f1_statistic(targets, predicted), np.arange(50) // 5
    first = statistics.group_interval(statistic, groups, 500, seed=3)
    assert first != statistics.group_interval(statistic, groups, 500, seed=4)
    monkeypatch.setattr(statistics, "_CHUNK_ELEMENTS", 50 * 7)
    assert first == statistics.group_interval(statistic, groups, 500, seed=3)


@pytest.mark.parametrize("right", [0, 1])
def test_no_spread_falls_back_to_one_trial_a_group(right: int) -> None:
    correct = np.full(55, right)
    statistic = statistics.accuracy_statistic(np.ones(55, dtype=np.int64), correct)
    groups = np.arange(55) // 5
    assert statistics.group_interval(statistic, groups) == statistics.wilson(float(right), 11)
    big = np.concatenate([groups, np.full(945, 11)])  # one object has nearly all images
    assert np.ptp(statistics.share_interval(np.full(1_000, float(right)), big)) > 0.6
    one_group = statistics.group_interval(statistic, np.zeros(55))
    assert one_group.high - one_group.low > 0.7


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (49, 53), (166, 200), (10, 10)])
def test_wilson_equals_scipy(hits: int, trials: int) -> None:
    expected = scipy.stats.binomtest(hits, trials).proportion_ci(method="wilson")
    interval = statistics.wilson(hits / trials, trials)
    assert interval == pytest.approx((expected.low, expected.high))


def test_share_of_single_images_is_wilson_with_student_quantiles() -> None:
    correct = np.arange(200) % 6 != 0
    interval = statistics.share_interval(correct.astype(np.float64), np.arange(200))
    assert interval == pytest.approx(statistics.wilson(float(correct.mean()), 200), abs=0.002)


def test_scores_that_vary_less_than_right_and_wrong_have_a_narrower_interval() -> None:
    scores = np.random.default_rng(0).uniform(0.45, 0.55, 400)
    low, high = statistics.share_interval(scores, np.arange(400))
    half = scipy.stats.t.ppf(0.975, 399) * scipy.stats.sem(scores)
    assert (high - low) / 2 == pytest.approx(half, rel=0.01)


def test_classes_of_few_groups_are_counted() -> None:
    targets = np.array([0] * 6 + [1] * 6 + [3] * 5)
    groups = np.array([*range(6), *[7] * 6, *range(8, 13)])
    assert statistics.small_classes(targets, groups) == (1, 3)


def test_top_k_can_be_resampled() -> None:
    rng = np.random.default_rng(2)
    logits, targets = rng.normal(size=(50, 6)).astype(np.float32), rng.integers(6, size=50)
    weights = rng.integers(0, 4, size=(4, 50))
    statistic = statistics.share_statistic(statistics.in_top_k(targets, logits, 3))
    for counts, value in zip(weights, statistic(weights.astype(np.float64)), strict=True):
        rows = np.repeat(np.arange(50), counts)
        expected = metrics.top_k_accuracy_score(targets[rows], logits[rows], k=3, labels=range(6))
        assert value == pytest.approx(expected)


def test_students_interval_equals_scipy() -> None:
    values = [0.51, 0.48, 0.55, 0.5]
    expected = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    assert statistics.student_interval(values) == pytest.approx(expected)
    assert statistics.student_interval([0.9, 1.0]) == pytest.approx((0.31469, 1.0), abs=1e-4)  # cut at 1
    assert math.isnan(statistics.student_interval([0.5]).low)
