from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from evaluation.report.thresholds import Shape, choose_threshold, curve, curves_of, parsed_goal, rates
from evaluation.statistics.intervals import share_interval
from tests.evaluation.predictions_fixture import make_predictions_of_every_kind
from vitrail.errors import UserError

RNG = np.random.default_rng(0)
POSITIVE = RNG.random(300) < 0.3
SCORES = np.round(RNG.normal(size=300) + 1.5 * POSITIVE, 1).astype(np.float64)
GROUPS = np.arange(300) // 3


def test_points_are_those_of_scikit_learn() -> None:
    found = curve("roc", POSITIVE, SCORES, GROUPS)
    fpr, tpr, thresholds = metrics.roc_curve(POSITIVE, SCORES, drop_intermediate=False)
    np.testing.assert_allclose([found.x, found.y, found.thresholds], [fpr[1:], tpr[1:], thresholds[1:]])
    assert found.area.value == pytest.approx(metrics.roc_auc_score(POSITIVE, SCORES))
    found = curve("precision_recall", POSITIVE, SCORES, GROUPS)
    precision, recall, thresholds = metrics.precision_recall_curve(POSITIVE, SCORES)
    np.testing.assert_allclose(found.x[::-1], recall[:-1])
    np.testing.assert_allclose(found.y[::-1], precision[:-1])
    assert found.area.value == pytest.approx(metrics.average_precision_score(POSITIVE, SCORES))


def test_bands_are_the_intervals_at_the_threshold() -> None:
    found = curve("risk_coverage", POSITIVE, SCORES, GROUPS)
    place = len(found.x) // 2
    covered = found.thresholds[place] <= SCORES
    assert found.x[place] == covered.mean()
    assert found.y[place] == POSITIVE[covered].mean()
    expected = share_interval(POSITIVE[covered].astype(float), GROUPS[covered])
    assert (found.low[place], found.high[place]) == pytest.approx(expected)
    assert found.area.interval.low < found.area.value < found.area.interval.high


@pytest.mark.parametrize(("task", "shapes"), [("class", 3), ("tags", 2)])
def test_curves_of_a_task(task: str, shapes: int) -> None:
    predictions = make_predictions_of_every_kind()
    names: list[Shape] = ["roc", "precision_recall", "risk_coverage"]
    for shape in names[:shapes]:
        found = curves_of(predictions, task, shape)
        assert list(found) == ([task] if shape == "risk_coverage" else list(predictions.tasks[task]))
        for one in found.values():
            assert (one.low <= one.y).all()
            assert (one.y <= one.high).all()
            assert (np.diff(one.x) >= 0).all()
    with pytest.raises(UserError, match="task 'price' is regression"):
        curves_of(predictions, "price", "roc")


def test_long_curves_show_some_thresholds_only() -> None:
    scores = RNG.normal(size=2_000)
    found = curve("roc", scores > 0.3, scores + RNG.normal(size=2_000), np.arange(2_000))
    assert len(found.x) == 100
    assert found.x[-1] == found.y[-1] == 1.0


def test_operating_points() -> None:
    def at(goal: str) -> dict[str, float]:
        threshold = choose_threshold(parsed_goal(goal), POSITIVE, SCORES)
        assert threshold is not None
        return {name: one.value for name, one in rates(POSITIVE, threshold <= SCORES, GROUPS).items()}

    def after(goal: str) -> dict[str, float]:
        threshold = choose_threshold(parsed_goal(goal), POSITIVE, SCORES)
        assert threshold is not None
        return {name: one.value for name, one in rates(POSITIVE, threshold < SCORES, GROUPS).items()}

    assert at("recall>=.9")["recall"] >= 0.9 > after("recall>=.9")["recall"]  # and no lower than it needs to be
    assert at("fpr <= 0.05")["fpr"] <= 0.05
    threshold = choose_threshold(parsed_goal("fpr<=.05"), POSITIVE, SCORES)
    assert threshold is not None
    lower = SCORES[threshold > SCORES].max() <= SCORES
    assert rates(POSITIVE, lower, GROUPS)["fpr"].value > 0.05
    assert at("specificity>=.95") == at("fpr<=.05")
    assert at("precision>=.6")["precision"] >= 0.6
    threshold = choose_threshold(parsed_goal("accuracy>=.5"), POSITIVE, SCORES)
    assert threshold is not None
    own = rates(POSITIVE, threshold <= SCORES, GROUPS, abstains=True)
    assert own["accuracy"].value >= 0.5
    assert own["coverage"].value == (threshold <= SCORES).mean()
    assert choose_threshold(parsed_goal("precision>=.99"), POSITIVE, np.zeros(300)) is None


@pytest.mark.parametrize("goal", ["recall<=.9", "recall>=2", "auroc>=.9", "recall", "fpr>=.1"])
def test_goals_that_are_none(goal: str) -> None:
    with pytest.raises(UserError, match=r"--operating-point .*must be one of recall>=X"):
        parsed_goal(goal)
