from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray
from sklearn import metrics

from evaluation.statistics.intervals import Estimate, Linearised
from evaluation.statistics.pooled import mean_statistic
from evaluation.statistics.scores import (
    NAMES,
    Coverage,
    Score,
    TrainTargets,
    agreement_statistic,
    aurc_statistic,
    balanced_accuracy_statistic,
    checked_names,
    constant_prediction,
    few_large_errors,
    heading,
    kappa_statistic,
    label_f1_statistic,
    precision_statistic,
    scores_of,
    small_labels,
    spearman_statistic,
)
from lightning_modules.heads.multi_label import MultiLabelScores
from lightning_modules.heads.ordinal import OrdinalScores
from lightning_modules.heads.regression import RegressionScores
from tests.evaluation.predictions_fixture import make_predictions_of_every_kind
from vitrail.errors import UserError
from vitrail.predictions import Predictions

TASKS = ["class", "grade", "tags", "price"]


def values_of(predictions: Predictions, task: str, names: tuple[str, ...] = ()) -> dict[str, float]:
    one = np.ones((1, len(predictions.known(task))))
    return {name: float(score.statistic(one)[0]) for name, score in scores_of(predictions, task, names).items()}


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
    macro, micro = (label_f1_statistic(targets, scores > 0.6, average)(weights) for average in ("macro", "micro"))
    for row, own in enumerate(weights):
        for found, average in ((macro, "macro"), (micro, "micro")):
            expected = metrics.f1_score(targets, scores > 0.6, sample_weight=own, average=average, zero_division=0)
            assert found[row] == pytest.approx(expected)


def test_unknown_entries_and_labels_without_samples_do_not_count() -> None:
    targets, scores, _ = random_labels(0)
    one = np.ones((1, 50))
    without = targets.copy()
    without[:, 3] = 0
    expected = metrics.average_precision_score(targets[:, :3], scores[:, :3])
    assert precision_statistic(without == 1, scores)(one) == pytest.approx(expected)
    unknown = targets.copy()
    unknown[:20] = -1
    expected = metrics.average_precision_score(targets[20:], scores[20:])
    assert precision_statistic(unknown == 1, scores, unknown >= 0)(one) == pytest.approx(expected)
    assert math.isnan(precision_statistic(np.zeros((2, 1), dtype=bool), np.zeros((2, 1)))(np.ones((1, 2)))[0])


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


@pytest.mark.parametrize("task", ["class", "grade"])
def test_further_scores_of_classes_equal_scikit_learn(task: str) -> None:
    predictions = make_predictions_of_every_kind(noise=1.5)
    own = predictions.take(predictions.known(task))
    targets, predicted, chances = own.targets[task], own.predicted(task), own.probabilities(task)
    found = values_of(predictions, task, checked_names(["all"]))
    hot = np.eye(chances.shape[1])[targets]
    expected = {
        "accuracy": metrics.accuracy_score(targets, predicted),
        "balanced_accuracy": metrics.balanced_accuracy_score(targets, predicted),
        "mcc": metrics.matthews_corrcoef(targets, predicted),
        "kappa": metrics.cohen_kappa_score(targets, predicted),
        "quadratic_kappa": metrics.cohen_kappa_score(targets, predicted, weights="quadratic"),
        "auroc": metrics.roc_auc_score(targets, chances, multi_class="ovr"),
        "average_precision": metrics.average_precision_score(hot, chances),
        "brier": metrics.brier_score_loss(targets, chances, scale_by_half=False),
        "nll": metrics.log_loss(targets, chances),
        "f1_weighted": metrics.f1_score(targets, predicted, average="weighted"),
        "top3_accuracy": metrics.top_k_accuracy_score(targets, chances, k=3) if task == "grade" else 1.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_further_scores_of_labels_equal_scikit_learn() -> None:
    predictions = make_predictions_of_every_kind()
    found = values_of(predictions, "tags", ("auroc", "brier", "nll", "mcc"))
    assert list(found) == ["mAP", "auroc", "brier", "nll"]  # the main score always, nothing of other kinds
    own = predictions.take(predictions.known("tags"))
    targets, chances = own.targets["tags"], own.label_probabilities("tags")
    known = targets >= 0
    columns = [(targets[known[:, place], place], chances[known[:, place], place]) for place in range(3)]
    assert found["auroc"] == pytest.approx(np.mean([metrics.roc_auc_score(*column) for column in columns]))
    rows = [row for row in range(len(targets)) if known[row].any()]
    losses = [metrics.log_loss(targets[row][known[row]], chances[row][known[row]], labels=[0, 1]) for row in rows]
    assert found["nll"] == pytest.approx(np.mean(losses))
    squares = np.where(known, (targets - chances) ** 2, 0).sum(axis=1) / known.sum(axis=1)
    assert found["brier"] == pytest.approx(squares.mean())


def test_pseudo_values_are_derivatives_by_the_weights() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 80)
    predicted = np.where(rng.random(80) < 0.6, targets, rng.integers(0, 3, 80))
    positive, scores = targets == 1, np.round(rng.normal(size=80) + (targets == 1), 1)
    statistics = [
        (agreement_statistic(targets, predicted, 3, "mcc"), metrics.matthews_corrcoef, (targets, predicted)),
        (agreement_statistic(targets, predicted, 3, "kappa"), metrics.cohen_kappa_score, (targets, predicted)),
        (balanced_accuracy_statistic(targets, predicted), metrics.balanced_accuracy_score, (targets, predicted)),
        (precision_statistic(positive[:, None], scores[:, None]), metrics.average_precision_score, (positive, scores)),
    ]
    for statistic, oracle, arguments in statistics:
        assert isinstance(statistic, Linearised)
        value = oracle(*arguments)
        for row in range(5):
            weights = np.ones(80)
            weights[row] += 1e-5
            slope = 80 * (oracle(*arguments, sample_weight=weights) - value) / 1e-5
            assert statistic.scores[row] - value == pytest.approx(slope, abs=1e-3)


def test_selective_prediction() -> None:
    rng = np.random.default_rng(0)
    confidence = np.round(rng.random(200), 2)
    errors = rng.random(200) > confidence
    one = np.ones((1, 200))
    orders = [np.lexsort((rng.random(200), -confidence)) for _ in range(300)]  # ties in any order
    areas = [np.mean(errors[order].cumsum() / np.arange(1, 201)) for order in orders]
    assert aurc_statistic(errors, confidence)(one)[0] == pytest.approx(np.mean(areas), abs=2e-4)
    best = np.sort(errors)
    least = np.mean(best.cumsum() / np.arange(1, 201))
    excess = aurc_statistic(errors, confidence, excess=True)(one)[0]
    assert excess == pytest.approx(np.mean(areas) - least, abs=2e-4)
    assert aurc_statistic(errors, (~errors).astype(np.float64), excess=True)(one)[0] == pytest.approx(0)
    predictions = make_predictions_of_every_kind(noise=2.0)
    found = values_of(predictions, "class", ("accuracy@0.5", "coverage@0.1"))
    own = predictions.take(predictions.known("class"))
    right = own.predicted("class") == own.targets["class"]
    first = np.argsort(-own.probabilities("class").max(axis=1))
    half = first[: math.ceil(len(own) / 2)]
    assert found["accuracy@0.5"] == pytest.approx(right[half].mean())
    shares = (~right[first]).cumsum() / np.arange(1, len(own) + 1)
    assert found["coverage@0.1"] == pytest.approx((np.flatnonzero(shares <= 0.1)[-1] + 1) / len(own))
    assert heading("accuracy@0.5") == "accuracy at coverage 0.5"


def test_coverage_at_a_risk_ends_where_the_risk_surely_differs() -> None:
    confidence = np.linspace(1, 0, 600)
    errors = np.arange(600) % 20 == 0  # 5 % wherever the threshold is
    errors[400:] = True
    groups = np.arange(600)
    for risk, low, high in ((0.05, 0.0, 0.75), (0.2, 0.6, 0.9), (0.5, 1.0, 1.0)):
        found = Score("coverage@R", Coverage([(errors, confidence)], risk)).estimate(groups)
        assert found.interval.low <= found.value <= found.interval.high
        assert (found.interval.low, found.interval.high) >= (low, 0)
        assert found.interval.high <= high
    none = Score("coverage@R", Coverage([(np.ones(600, bool), confidence)], 0.05)).estimate(groups)
    assert (none.value, none.interval.low) == (0, 0)
    assert none.interval.high < 0.1
    two = Coverage([(errors, confidence), (errors, confidence[::-1])], 0.2)
    parts = [Coverage([model], 0.2).interval(groups) for model in two.models]
    assert two.interval(groups) == pytest.approx(tuple(np.mean(parts, axis=0)))
    assert mean_statistic([Coverage([model], 0.2) for model in two.models]).models == two.models  # type: ignore[attr-defined]


def test_names_of_scores_that_do_not_exist() -> None:
    with pytest.raises(UserError, match="no score 'AUROC'; did you mean auroc"):
        checked_names(["nll", "AUROC"])
    with pytest.raises(UserError, match=r"no score 'accuracy@1\.5'"):
        checked_names(["accuracy@1.5"])
