from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray
from sklearn import metrics

from evaluation.statistics import intervals as statistics
from evaluation.statistics.intervals import Interval


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
    interval = statistics.group_bootstrap(lambda weights: weights.sum(axis=1), none)
    assert math.isnan(interval.low)
    assert math.isnan(statistics.clustered_wilson(none.astype(bool), none).low)
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
    interval = statistics.group_bootstrap(statistics.f1_statistic(targets, predicted), targets)
    assert interval.low > 0.9


@pytest.mark.parametrize("views", [1, 5])
def test_group_bootstrap_equals_scipy_on_equal_groups(views: int) -> None:
    # With groups of equal size, resampling groups is resampling the groups' means.
    rng = np.random.default_rng(0)
    groups = 120 // views
    correct = (rng.random((groups, views)) < rng.beta(2, 1, groups)[:, None]).astype(np.float64)
    expected = scipy.stats.bootstrap(
        (correct.mean(axis=1),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    names = np.array([f"object {index}" for index in np.repeat(np.arange(groups), views)], dtype=object)
    statistic = statistics.share_statistic(correct.ravel())
    plain = statistics.group_bootstrap(statistic, names, 20_000, few_groups=False)
    assert plain == pytest.approx((expected.low, expected.high), abs=0.009)  # neighbouring values lie 1/120 apart


def test_images_of_one_object_widen_the_interval() -> None:
    correct = np.repeat(np.array([1, 1, 0, 1, 1, 0, 1, 1]), 10)
    statistic = statistics.accuracy_statistic(np.ones(80, dtype=np.int64), correct)
    by_object = statistics.group_bootstrap(statistic, np.repeat(np.arange(8), 10))
    by_image = statistics.group_bootstrap(statistic, np.arange(80))
    assert by_object.high - by_object.low > 2 * (by_image.high - by_image.low)


def test_interval_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, predicted = labels(50)
    statistic, groups = statistics.f1_statistic(targets, predicted), np.arange(50) // 5
    first = statistics.group_bootstrap(statistic, groups, 500, seed=3)
    assert first != statistics.group_bootstrap(statistic, groups, 500, seed=4)
    monkeypatch.setattr(statistics, "_CHUNK_ELEMENTS", 50 * 7)
    assert first == statistics.group_bootstrap(statistic, groups, 500, seed=3)


@pytest.mark.parametrize("right", [0, 1])
def test_no_spread_falls_back_to_one_trial_a_group(right: int) -> None:
    correct = np.full(55, right)
    statistic = statistics.accuracy_statistic(np.ones(55, dtype=np.int64), correct)
    groups = np.arange(55) // 5
    assert statistics.group_bootstrap(statistic, groups) == statistics.wilson(float(right), 11)
    assert statistics.clustered_wilson(correct == 1, groups) == statistics.wilson(float(right), 11)
    one_group = statistics.group_bootstrap(statistic, np.zeros(55))
    assert one_group.high - one_group.low > 0.7


def test_many_groups_need_no_widening() -> None:
    targets, predicted = labels(2_000)
    statistic = statistics.accuracy_statistic(targets, predicted)
    wide = statistics.group_bootstrap(statistic, np.arange(2_000))
    plain = statistics.group_bootstrap(statistic, np.arange(2_000), few_groups=False)
    assert wide == pytest.approx(plain, abs=0.001)


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (49, 53), (166, 200), (10, 10)])
def test_wilson_equals_scipy(hits: int, trials: int) -> None:
    expected = scipy.stats.binomtest(hits, trials).proportion_ci(method="wilson")
    interval = statistics.wilson(hits / trials, trials)
    assert interval == pytest.approx((expected.low, expected.high))


def test_clustered_wilson_of_single_images_is_wilson_with_student_quantiles() -> None:
    correct = np.arange(200) % 6 != 0
    interval = statistics.clustered_wilson(correct, np.arange(200))
    assert interval == pytest.approx(statistics.wilson(float(correct.mean()), 200), abs=0.002)


def clustered_sample(
    rng: np.random.Generator, num_groups: int, share: float, correlation: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Right or wrong for 3 to 7 images of each object; the objects' own shares are beta distributed."""
    sizes = rng.integers(3, 8, num_groups)
    spread = (1 - correlation) / correlation
    own = rng.beta(share * spread, (1 - share) * spread, num_groups)
    groups = np.repeat(np.arange(num_groups), sizes)
    return (rng.random(len(groups)) < own[groups]).astype(np.int64), groups


def coverage(num_groups: int, share: float, correlation: float, trials: int = 1_000) -> dict[str, float]:
    """How often 95 % intervals of different kinds hold the true share."""
    rng = np.random.default_rng(1)
    covered = {"bootstrap": 0, "percentile": 0, "wilson": 0, "clustered wilson": 0}
    for _ in range(trials):
        correct, groups = clustered_sample(rng, num_groups, share, correlation)
        statistic = statistics.accuracy_statistic(np.ones_like(correct), correct)
        # Plain percentiles are one point where no resample differs.
        is_point = correct.min() == correct.max()
        plain = statistics.group_bootstrap(statistic, groups, 600, few_groups=False)
        intervals: dict[str, Interval] = {
            "bootstrap": statistics.group_bootstrap(statistic, groups, 600),
            "percentile": Interval(float(correct[0]), float(correct[0])) if is_point else plain,
            "wilson": statistics.wilson(float(correct.mean()), len(correct)),
            "clustered wilson": statistics.clustered_wilson(correct == 1, groups),
        }
        for name, interval in intervals.items():
            covered[name] += interval.low <= share <= interval.high
    return {name: count / trials for name, count in covered.items()}


@pytest.mark.parametrize(("share", "correlation"), [(0.35, 0.1), (0.35, 0.5), (0.93, 0.1), (0.93, 0.5)])
def test_coverage_with_eleven_groups(share: float, correlation: float) -> None:
    covered = coverage(11, share, correlation)
    assert 0.91 <= covered["bootstrap"] <= 0.96  # 1,000 splits: two standard errors are .015
    assert covered["percentile"] <= 0.92
    assert covered["wilson"] <= 0.92
    assert covered["clustered wilson"] >= 0.94


def test_coverage_stays_short_where_rare_mistakes_are_bunched() -> None:
    covered = coverage(20, 0.93, 0.5)
    assert 0.84 <= covered["bootstrap"] <= 0.91
    assert covered["percentile"] < covered["bootstrap"]
    assert covered["bootstrap"] < covered["clustered wilson"]


def test_coverage_of_macro_f1_with_eleven_groups() -> None:
    """Ten classes, so that almost every class is one object; wrong predictions for an object go to one other class."""

    def sample(rng: np.random.Generator, num_groups: int) -> list[NDArray[np.int64]]:
        groups = np.repeat(np.arange(num_groups), rng.integers(3, 8, num_groups))
        targets = groups % 10
        own = rng.beta(0.8, 0.2, num_groups)  # accuracy .8, correlation .5
        mistaken_for = (targets + rng.integers(1, 10, num_groups)[groups]) % 10
        return [targets, np.where(rng.random(len(groups)) < own[groups], targets, mistaken_for), groups]

    rng = np.random.default_rng(5)
    targets, predicted, _ = sample(rng, 20_000)
    truth = f1(targets, predicted)
    covered = 0
    for _ in range(500):
        targets, predicted, groups = sample(rng, 11)
        interval = statistics.group_bootstrap(statistics.f1_statistic(targets, predicted), groups, 600)
        covered += interval.low <= truth <= interval.high
    assert 0.84 <= covered / 500 <= 0.93


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
