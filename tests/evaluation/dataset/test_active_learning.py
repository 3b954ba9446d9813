from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import entropy, ttest_1samp
from sklearn.linear_model import BayesianRidge, LogisticRegression

from evaluation.dataset.active_learning import (
    Labelled,
    Pool,
    Schedule,
    checked_probabilities,
    curve_figure,
    k_centre_greedy,
    learning_curves,
    most_uncertain,
    ranking,
    summarised,
    to_label,
    uncertainty,
)
from evaluation.dataset.features import Reduction
from evaluation.statistics.scores import scores_of
from vitrail.errors import UserError
from vitrail.predictions import Predictions
from vitrail.types import UNKNOWN, TaskKind


def test_uncertainties_are_those_of_the_definitions() -> None:
    probability = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(uncertainty(probability, "entropy"), entropy(probability, axis=1))
    np.testing.assert_allclose(uncertainty(probability, "margin"), [1, 0, 0.8, 1])
    np.testing.assert_allclose(uncertainty(probability, "confidence"), [0.5, 0, 0.5, 2 / 3])
    assert not np.signbit(uncertainty(probability, "entropy")).any()


def test_uncertainties_of_labels_are_those_of_the_single_labels() -> None:
    probability = np.array([[0.5, 0.9, 0.0], [0.2, 0.8, 1.0]])
    expected = [sum(entropy([share, 1 - share]) for share in row) for row in probability]
    np.testing.assert_allclose(uncertainty(probability, "entropy", "multi_label"), expected)
    np.testing.assert_allclose(uncertainty(probability, "margin", "multi_label"), [1, 0.4])
    np.testing.assert_allclose(uncertainty(probability, "confidence", "multi_label"), [0.5, 0.2])


def test_numbers_are_ranked_by_their_variance() -> None:
    names = np.array(["a", "b", "c"], object)
    pool = Pool(
        names, names, np.eye(3, dtype=np.float32), None, names, None, np.zeros((0, 3), np.float32), "regression"
    )
    with pytest.raises(UserError, match="predicts no variance"):
        ranking(pool, "variance", 2)
    ranked = ranking(replace(pool, deviation=np.array([1.0, 3.0, 2.0])), "variance", 2)
    assert (ranked.rows.tolist(), ranked.scores.tolist()) == ([1, 2], [9.0, 4.0])
    with pytest.raises(UserError, match="--by margin: does not go with a regression task; use variance or coreset"):
        ranking(pool, "margin", 2)
    with pytest.raises(UserError, match="--by variance: does not go with a multi_label task; use entropy"):
        ranking(replace(pool, kind="multi_label"), "variance", 2)


def test_of_equal_ones_the_earlier_comes_first_and_n_may_be_too_large() -> None:
    probability = np.array([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5], [0.6, 0.4]])
    for by in ("entropy", "margin", "confidence"):
        ranked = most_uncertain(uncertainty(probability, by), 9)
        assert ranked.rows.tolist() == [1, 2, 3, 0]
        assert (np.diff(ranked.scores) <= 0).all()


def test_k_centre_greedy_takes_the_farthest_each_time() -> None:
    points = np.random.default_rng(0).normal(size=(40, 3))
    covered = points[:2] + 0.1
    ranked = k_centre_greedy(points, 10, covered)
    centres = list(covered)
    for row, score in zip(ranked.rows.tolist(), ranked.scores.tolist(), strict=True):
        nearest = np.min([np.linalg.norm(points - centre, axis=1) for centre in centres], axis=0)
        assert score == pytest.approx(nearest.max())
        assert nearest[row] == pytest.approx(nearest.max())
        centres.append(points[row])
    assert len(set(ranked.rows.tolist())) == 10


def test_views_of_one_object_are_not_asked_for_twice() -> None:
    rng = np.random.default_rng(0)
    objects = rng.normal(size=(6, 8)) * 5
    views = np.repeat(objects, 5, axis=0) + rng.normal(size=(30, 8)) * 0.01
    assert sorted(set(k_centre_greedy(views, 6).rows // 5)) == [0, 1, 2, 3, 4, 5]
    assert sorted(k_centre_greedy(views, 4, views[[0, 7]]).rows // 5) == [2, 3, 4, 5]


def test_first_centre_is_the_one_nearest_to_the_mean() -> None:
    ranked = k_centre_greedy(np.array([[0.0], [1.0], [2.0], [9.0]]), 2)
    assert ranked.rows.tolist() == [2, 3]
    assert ranked.scores.tolist() == [np.inf, 7.0]


def test_equal_points_are_each_taken_once() -> None:
    assert sorted(k_centre_greedy(np.ones((5, 2)), 9).rows.tolist()) == [0, 1, 2, 3, 4]
    assert len(k_centre_greedy(np.ones((5, 2)), 0).rows) == 0


def test_logits_become_probabilities_or_are_refused() -> None:
    softmax = checked_probabilities(np.array([[1000.0, 0.0], [0.0, 0.0]]), "runs/a")
    assert softmax.ravel().tolist() == pytest.approx([1, 0, 0.5, 0.5])
    with pytest.raises(UserError, match="runs/a: logits of 1 of 2 images are not finite"):
        checked_probabilities(np.array([[np.nan, 0.0], [0.0, 0.0]]), "runs/a")
    with pytest.raises(UserError, match="runs/a: has one class only"):
        checked_probabilities(np.zeros((2, 1)), "runs/a")


def pool(**changes: Any) -> Pool:
    """Four images in a plane and a model of two classes."""
    probability = np.array([[0.9, 0.1], [0.45, 0.55], [0.7, 0.3], [0.2, 0.8]])
    fields: dict[str, Any] = {
        "names": np.array(["a", "b", "c", "d"], dtype=object),
        "paths": np.array(["/a.jpg", "/b.jpg", "", ""], dtype=object),
        "vectors": np.array([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]], np.float32),
        "probability": probability,
        "predicted": np.array(["cat", "dog", "cat", "dog"], dtype=object),
        "confidence": probability.max(axis=1),
        "covered": np.array([[1, 0]], np.float32),
    }
    return Pool(**{**fields, **changes})


def test_strategies_rank_by_their_score() -> None:
    assert ranking(pool(), "entropy", 4).rows.tolist() == [1, 2, 3, 0]
    assert ranking(pool(), "margin", 2).rows.tolist() == [1, 2]
    confident = ranking(pool(probability=None), "confidence", 4)
    assert confident.rows.tolist() == [1, 2, 3, 0]
    np.testing.assert_allclose(confident.scores, [0.45, 0.3, 0.2, 0.1])
    core = ranking(pool(), "coreset", 2)
    assert core.rows.tolist() == [3, 2]
    np.testing.assert_allclose(core.scores, [2, np.sqrt(2)])


def test_table_is_ready_to_be_filled_in() -> None:
    table = to_label(pool(), ranking(pool(), "margin", 3), "class")
    assert table.columns.tolist() == ["rank", "name", "path", "score", "predicted", "confidence", "class"]
    assert table["rank"].tolist() == [1, 2, 3]
    assert table["name"].tolist() == ["b", "c", "d"]
    assert table["predicted"].tolist() == ["dog", "cat", "dog"]
    assert (table["class"] == "").all()
    bare = pool(probability=None, predicted=None, confidence=None)
    columns = to_label(bare, ranking(bare, "coreset", 1), "class").columns.tolist()
    assert columns == ["rank", "name", "path", "score", "class"]


def test_what_a_pool_lacks_is_reported() -> None:
    with pytest.raises(UserError, match=r"best class's probability only; name the images .* use confidence or coreset"):
        ranking(pool(probability=None), "entropy", 2)
    with pytest.raises(UserError, match=r"this pool has no probabilities; .* or use coreset"):
        ranking(pool(probability=None, confidence=None), "confidence", 2)


CLASSES, DIM = 8, 16
SCHEDULE = Schedule(start=16, step=12, rounds=6)


def sampled(counts: list[int], seed: int) -> Labelled:
    """Samples of each class around its centre."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    centres = np.random.default_rng(0).normal(size=(CLASSES, DIM)) * 1.1
    return Labelled(centres[labels] + rng.normal(size=(len(labels), DIM)), labels)


@pytest.fixture(scope="module")
def curves() -> pd.DataFrame:
    pool = sampled([round(200 * 0.55**place) for place in range(CLASSES)], seed=1)
    test = sampled([40] * CLASSES, seed=2)
    return learning_curves(pool, test, ["entropy", "margin", "coreset"], range(5), SCHEDULE)


def by_strategy(curves: pd.DataFrame) -> dict[str, dict[str, Any]]:
    return {
        str(row["strategy"]): {str(key): value for key, value in row.items()}
        for row in summarised(curves).to_dict("records")
    }


def test_choosing_beats_chance_where_classes_are_rare(curves: pd.DataFrame) -> None:
    summary = by_strategy(curves)
    for strategy in ("entropy", "margin"):
        assert summary[strategy]["low"] > 0.02
        assert summary[strategy]["verdict"] == "ahead of random choice"
        assert summary[strategy]["last"] > summary["random"]["last"]
    assert summary["random"]["verdict"] == "the comparison"


def test_all_strategies_of_a_seed_begin_alike(curves: pd.DataFrame) -> None:
    assert sorted(curves["labels"].unique()) == [16, 28, 40, 52, 64, 76, 88]
    begin = curves[curves["labels"] == 16]
    assert len({*zip(begin["seed"], begin["accuracy"], strict=True)}) == 5
    assert len({*begin["accuracy"]}) > 1
    assert len(curves) == 4 * 5 * 7


def test_the_same_seed_gives_the_same_curve(curves: pd.DataFrame) -> None:
    pool = sampled([round(200 * 0.55**place) for place in range(CLASSES)], seed=1)
    again = learning_curves(pool, sampled([40] * CLASSES, seed=2), ["margin"], [3], SCHEDULE)
    expected = curves[(curves["seed"] == 3) & curves["strategy"].isin(["random", "margin"])]
    pd.testing.assert_frame_equal(again, expected.reset_index(drop=True))


def test_interval_is_students(curves: pd.DataFrame) -> None:
    row = by_strategy(curves)["margin"]
    after = curves[curves["labels"] > 16].pivot_table("accuracy", "seed", "strategy")
    interval = ttest_1samp(after["margin"] - after["random"], 0).confidence_interval()
    assert (row["low"], row["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))


@pytest.mark.parametrize(
    ("seeds", "verdict"),
    [([0], "one seed shows nothing about chance"), ([0, 9], "equal in all seeds, which shows nothing about chance")],
)
def test_without_spread_there_is_no_interval(curves: pd.DataFrame, seeds: list[int], verdict: str) -> None:
    one = curves[curves["seed"] == 0]
    row = by_strategy(pd.concat([one.assign(seed=seed) for seed in seeds]))["margin"]
    assert np.isnan(row["low"])
    assert row["verdict"] == verdict


def test_a_pool_that_is_used_up_ends_the_curve() -> None:
    pool = sampled([6, 5], seed=1)
    found = learning_curves(pool, sampled([5, 5], seed=2), ["coreset"], [0], Schedule(4, 5, 9))
    assert found[found["strategy"] == "coreset"]["labels"].tolist() == [4, 9, 11]
    assert len({*found[found["labels"] == 11]["accuracy"]}) == 1


def test_a_start_of_one_class_is_given_another_one() -> None:
    found = learning_curves(sampled([60, 1], seed=1), sampled([5, 5], seed=2), ["margin"], range(8), Schedule(2, 1, 1))
    assert len(found) == 8 * 2 * 2


def of_kind(kind: TaskKind, n: int, seed: int) -> Labelled:
    """Samples whose labels, some unknown, or number follow from their features."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 6))
    if kind == "regression":
        return Labelled(features, (features[:, 0] * 5 + rng.normal(size=n)).astype(np.float32), kind)
    labels = (features[:, :3] + 0.5 * rng.normal(size=(n, 3)) > [0, 0.5, 9]).astype(np.int8)  # the third never applies
    labels[rng.random((n, 3)) < 0.1] = UNKNOWN
    labels[0, 0], labels[1, 0] = 1, 0
    return Labelled(features, labels, kind)


@pytest.mark.parametrize(("kind", "metric"), [("multi_label", "mAP"), ("regression", "mae")])
def test_scores_of_other_kinds_are_their_main_score(kind: TaskKind, metric: str) -> None:
    pool, test = of_kind(kind, 60, 1), of_kind(kind, 50, 2)
    by = ["variance" if kind == "regression" else "margin", "coreset"]
    found = learning_curves(pool, test, by, [0], Schedule(10, 50, 1))
    reduction = Reduction(pool.features)
    train, new = reduction(pool.features), reduction(test.features)
    if kind == "regression":
        outputs = BayesianRidge().fit(train, pool.labels.astype(float)).predict(new)[:, None]
    else:
        outputs = np.full((50, 3), -9.0)
        for label in range(2):
            known = pool.labels[:, label] != UNKNOWN
            model = LogisticRegression().fit(train[known], pool.labels[known, label])
            outputs[:, label] = model.decision_function(new)
    names, tasks = np.arange(50).astype(str).astype(object), {"it": [] if kind == "regression" else ["a", "b", "c"]}
    predictions = Predictions(
        np.arange(50), names, names, tasks, {"it": test.labels}, {"it": outputs.astype(np.float32)}, {"it": kind}
    )
    expected = scores_of(predictions, "it")[metric].statistic(np.ones((1, 50)))[0]
    np.testing.assert_allclose(found[found["labels"] == 60][metric], [expected] * 3, rtol=1e-5)
    assert found.columns.tolist() == ["strategy", "seed", "labels", metric]


def test_where_lower_is_better_less_is_ahead() -> None:
    rows = [("random", 0, 3.0), ("random", 1, 3.2), ("variance", 0, 2.0), ("variance", 1, 2.1)]
    curves = pd.DataFrame(
        [{"strategy": who, "seed": seed, "labels": at, "mae": mae} for who, seed, mae in rows for at in (10, 20)]
    )
    row = by_strategy(curves)["variance"]
    assert row["mae"] == pytest.approx(2.05)
    assert row["high"] < 0
    assert row["verdict"] == "ahead of random choice"
    assert curve_figure(curves, "title").axes[0].get_ylabel() == "MAE on validation and test"


def test_strategies_and_labels_of_other_kinds_are_checked() -> None:
    labels, numbers = of_kind("multi_label", 30, 1), of_kind("regression", 30, 1)
    with pytest.raises(UserError, match="--by margin: does not go with a regression task"):
        learning_curves(numbers, numbers, ["margin"], [0], SCHEDULE)
    with pytest.raises(UserError, match="--by variance: does not go with a multi_label task"):
        learning_curves(labels, labels, ["variance"], [0], SCHEDULE)
    with pytest.raises(UserError, match="two different numbers"):
        learning_curves(numbers._replace(labels=np.ones(30)), numbers, [], [0], SCHEDULE)
    never = labels._replace(labels=np.zeros((30, 3), np.int8))
    for pool, test in ((never, labels), (labels, never)):
        with pytest.raises(UserError, match="a label that applies to some images only"):
            learning_curves(pool, test, [], [0], SCHEDULE)


@pytest.mark.parametrize(
    ("pool", "test", "schedule", "message"),
    [
        ([9], [5, 5], Schedule(2, 1, 1), "at least two classes"),
        ([5, 5], [], Schedule(2, 1, 1), "at least two classes and other images"),
        ([5, 5], [5, 5], Schedule(10, 1, 1), "less than the pool's 10 images"),
        ([5, 5], [5, 5], Schedule(1, 1, 1), "from 2"),
        ([5, 5], [5, 5], Schedule(2, 0, 1), "must be at least 1"),
    ],
)
def test_what_gives_no_curve_is_refused(pool: list[int], test: list[int], schedule: Schedule, message: str) -> None:
    with pytest.raises(UserError, match=message):
        learning_curves(sampled(pool, 1), sampled(test, 2), ["margin"], [0], schedule)


def test_figure_has_a_line_for_each_strategy(curves: pd.DataFrame) -> None:
    axes = curve_figure(curves, "title").axes[0]
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["random", "entropy", "margin", "coreset"]
    mean = curves[curves["strategy"] == "margin"].groupby("labels")["accuracy"].mean()
    drawn_at: Any = axes.lines[2].get_ydata()
    np.testing.assert_allclose(drawn_at, mean)
