from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray
from sklearn import metrics

from evaluation.statistics.intervals import Estimate
from evaluation.statistics.scores import (
    NAMES,
    TrainTargets,
    average_precision_statistic,
    constant_prediction,
    few_large_errors,
    kappa_statistic,
    label_f1_statistic,
    scores_of,
    small_labels,
    spearman_statistic,
)
from lightning_modules.heads.multi_label import MultiLabelScores
from lightning_modules.heads.ordinal import OrdinalScores
from lightning_modules.heads.regression import RegressionScores
from tests.evaluation.predictions_fixture import make_predictions_of_every_kind
from vitrail.predictions import Predictions

TASKS = ["class", "grade", "tags", "price"]


def values_of(predictions: Predictions, task: str) -> dict[str, float]:
    one = np.ones((1, len(predictions.known(task))))
    return {name: float(score.statistic(one)[0]) for name, score in scores_of(predictions, task).items()}


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_that_the_tasks_log(seed: int) -> None:
    predictions = make_predictions_of_every_kind(seed=seed)
    logged = {
        "grade": OrdinalScores(4),
        "tags": MultiLabelScores(3),
        "price": RegressionScores(),
    }
    logged["tags"].thresholds = torch.tensor(predictions.thresholds["tags"], dtype=torch.float64)
    for task, metric in logged.items():
        metric.update(torch.from_numpy(predictions.logits[task]), torch.from_numpy(predictions.targets[task]))
        expected = {name: float(value) for name, value in metric.compute().items()}
        own = values_of(predictions, task)
        assert tuple(own) == NAMES[predictions.kind(task)]
        assert own == pytest.approx({name: expected[name] for name in own}, rel=1e-5)


def random_labels(seed: int) -> tuple[NDArray[np.int8], NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    targets = (rng.random((50, 4)) < 0.4).astype(np.int8)
    scores = np.round(rng.random((50, 4)) + 0.4 * targets.astype(np.float64), 1)  # with ties
    return targets, scores, rng.integers(0, 4, (3, 50)).astype(np.float64)


@pytest.mark.parametrize("seed", range(3))
def test_weighted_scores_of_labels_equal_scikit_learn(seed: int) -> None:
    targets, scores, weights = random_labels(seed)
    precisions = average_precision_statistic(targets, scores)(weights)
    macro, micro = (label_f1_statistic(targets, scores > 0.6, average)(weights) for average in ("macro", "micro"))
    for row, own in enumerate(weights):
        expected = metrics.average_precision_score(targets, scores, sample_weight=own, average="macro")
        assert precisions[row] == pytest.approx(expected)
        for found, average in ((macro, "macro"), (micro, "micro")):
            expected = metrics.f1_score(targets, scores > 0.6, sample_weight=own, average=average, zero_division=0)
            assert found[row] == pytest.approx(expected)


def test_unknown_entries_and_labels_without_samples_do_not_count() -> None:
    targets, scores, _ = random_labels(0)
    one = np.ones((1, 50))
    without = targets.copy()
    without[:, 3] = 0
    expected = metrics.average_precision_score(targets[:, :3], scores[:, :3])
    assert average_precision_statistic(without, scores)(one) == pytest.approx(expected)
    unknown = targets.copy()
    unknown[:20] = -1
    expected = metrics.average_precision_score(targets[20:], scores[20:])
    assert average_precision_statistic(unknown, scores)(one) == pytest.approx(expected)
    assert math.isnan(average_precision_statistic(np.zeros((2, 1), np.int8), np.zeros((2, 1)))(np.ones((1, 2)))[0])


def test_weighted_kappa_and_rank_correlation_equal_the_libraries() -> None:
    rng = np.random.default_rng(0)
    targets, predicted = rng.integers(0, 4, (2, 60))
    weights = rng.integers(0, 4, (3, 60))
    first, second = np.round(rng.normal(size=60), 1), rng.normal(size=60)
    kappas = kappa_statistic(targets, predicted, 4)(weights.astype(np.float64))
    ranks = spearman_statistic(first, second)(weights.astype(np.float64))
    for row, own in enumerate(weights):
        expected = metrics.cohen_kappa_score(targets, predicted, weights="quadratic", sample_weight=own)
        assert kappas[row] == pytest.approx(expected)
        repeated = np.repeat(first, own), np.repeat(second, own)
        assert ranks[row] == pytest.approx(scipy.stats.spearmanr(*repeated).statistic)
    assert math.isnan(spearman_statistic(np.ones(5), np.arange(5.0))(np.ones((1, 5)))[0])
    assert math.isnan(kappa_statistic(np.ones(5, np.int64), np.ones(5, np.int64), 3)(np.ones((1, 5)))[0])


def test_regression_weights_are_repetitions() -> None:
    predictions = make_predictions_of_every_kind()
    own = predictions.take(predictions.known("price"))
    times = np.random.default_rng(0).integers(0, 3, len(own))
    repeated = own.take(np.repeat(np.arange(len(own)), times))
    expected = values_of(repeated, "price")
    targets, values = repeated.targets["price"], repeated.values("price")
    assert expected["r2"] == pytest.approx(metrics.r2_score(targets, values))
    for name, score in scores_of(own, "price").items():
        assert score.statistic(times[None].astype(np.float64))[0] == pytest.approx(expected[name])


@pytest.mark.parametrize("task", TASKS)
def test_intervals_hold_the_value_and_stay_in_bounds(task: str) -> None:
    predictions = make_predictions_of_every_kind()
    groups = predictions.groups[predictions.known(task)]
    for score in scores_of(predictions, task).values():
        found = score.estimate(groups, 300)
        assert score.bounds[0] <= found.interval.low < found.value <= found.interval.high <= score.bounds[1]


def test_perfect_predictions() -> None:
    predictions = make_predictions_of_every_kind(noise=0.0)
    found: dict[str, Estimate] = {}
    for task in ("tags", "price"):
        groups = predictions.groups[predictions.known(task)]
        found |= {name: score.estimate(groups, 100) for name, score in scores_of(predictions, task).items()}
    assert found["mAP"].value == found["r2"].value == found["spearman"].value == 1.0
    # As many trials as groups: all were right, of labels one group is unknown.
    assert 0.8 < found["mAP"].interval.low < 0.9
    assert found["mae"].value == pytest.approx(0.0, abs=1e-5)
    assert math.isnan(found["mae"].interval.low)  # without any error nothing is known of how large errors get


def test_constant_predictions_are_those_of_scikit_learn() -> None:
    predictions = make_predictions_of_every_kind()
    known = predictions.known("price")
    prices = predictions.targets["price"][known].astype(float)
    found = constant_prediction(predictions, "price", TrainTargets(mean=38.0, median=35.0))
    assert found.source == "train"
    assert found.prediction == "35"
    expected = {
        "mae": metrics.mean_absolute_error(prices, np.full(len(prices), 35.0)),
        "rmse": metrics.root_mean_squared_error(prices, np.full(len(prices), 38.0)),
        "r2": metrics.r2_score(prices, np.full(len(prices), 38.0)),
    }
    assert found.scores == pytest.approx(expected)
    assert constant_prediction(predictions, "price").source == "split"
    assert constant_prediction(predictions, "price").scores["r2"] == 0.0
    whole = replace(predictions, targets={**predictions.targets, "tags": np.maximum(predictions.targets["tags"], 0)})
    tags = whole.targets["tags"].astype(int)
    found = constant_prediction(whole, "tags", TrainTargets(counts=[60, 20, 10], samples=100))
    first = np.zeros_like(tags)
    first[:, 0] = 1
    assert found.scores == pytest.approx(
        {
            "mAP": metrics.average_precision_score(tags, np.full(tags.shape, 0.3)),
            "f1_macro": metrics.f1_score(tags, np.ones_like(tags), average="macro"),
            # 2·60 / (100 + 90) is more than 2·80 / (200 + 90).
            "f1_micro": metrics.f1_score(tags, first, average="micro"),
            "exact_match": metrics.accuracy_score(tags, first),
        }
    )
    grades = predictions.targets["grade"][predictions.known("grade")]
    found = constant_prediction(predictions, "grade", TrainTargets(counts=[5, 4, 3, 2]))
    assert found.prediction == "bad"
    assert found.scores["accuracy"] == (grades == 0).mean()
    assert found.scores["mae"] == np.abs(grades - 1).mean()


def test_what_makes_an_interval_doubtful() -> None:
    groups = np.repeat(np.arange(30), 2)
    errors = np.ones(60)
    assert few_large_errors(errors, groups) == 0
    errors[:3] = 30.0
    assert few_large_errors(errors, groups) == 1
    assert few_large_errors(errors[:20], groups[:20]) == 0  # of ten groups nothing of the kind can be known
    targets = np.zeros((60, 3), np.int8)
    targets[:20, 0] = 1
    targets[:4, 1] = 1
    assert small_labels(targets, groups) == (1, 2)
