"""Choosing beats chance on generated data with rare classes, over five seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from evaluation.dataset.active_learning import Labelled, Schedule, curve_figure, learning_curves, summarised
from vitrail.errors import UserError

CLASSES, DIM = 8, 16
SCHEDULE = Schedule(start=16, step=12, rounds=6)


def drawn(counts: list[int], seed: int) -> Labelled:
    """So many samples of each class around its centre."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    centres = np.random.default_rng(0).normal(size=(CLASSES, DIM)) * 1.1
    return Labelled(centres[labels] + rng.normal(size=(len(labels), DIM)), labels)


@pytest.fixture(scope="module")
def curves() -> pd.DataFrame:
    pool = drawn([round(200 * 0.55**place) for place in range(CLASSES)], seed=1)
    test = drawn([40] * CLASSES, seed=2)
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
    pool = drawn([round(200 * 0.55**place) for place in range(CLASSES)], seed=1)
    again = learning_curves(pool, drawn([40] * CLASSES, seed=2), ["margin"], [3], SCHEDULE)
    expected = curves[(curves["seed"] == 3) & curves["strategy"].isin(["random", "margin"])]
    pd.testing.assert_frame_equal(again, expected.reset_index(drop=True))


def test_interval_is_students(curves: pd.DataFrame) -> None:
    row = by_strategy(curves)["margin"]
    after = curves[curves["labels"] > 16].pivot_table("accuracy", "seed", "strategy")
    interval = ttest_1samp(after["margin"] - after["random"], 0).confidence_interval()
    assert (row["low"], row["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_one_seed_has_no_interval(curves: pd.DataFrame) -> None:
    row = by_strategy(curves[curves["seed"] == 0])["margin"]
    assert np.isnan(row["low"])
    assert row["verdict"] == "one seed says nothing of chance"


def test_equal_differences_have_no_interval_of_width_zero(curves: pd.DataFrame) -> None:
    one = curves[curves["seed"] == 0]
    row = by_strategy(pd.concat([one, one.assign(seed=9)]))["margin"]
    assert np.isnan(row["low"])
    assert row["verdict"] == "equal in all seeds, which says nothing of chance"


def test_a_pool_that_is_used_up_ends_the_curve() -> None:
    pool = drawn([6, 5], seed=1)
    found = learning_curves(pool, drawn([5, 5], seed=2), ["coreset"], [0], Schedule(4, 5, 9))
    assert found[found["strategy"] == "coreset"]["labels"].tolist() == [4, 9, 11]
    assert len({*found[found["labels"] == 11]["accuracy"]}) == 1


def test_a_start_of_one_class_is_given_another_one() -> None:
    found = learning_curves(drawn([60, 1], seed=1), drawn([5, 5], seed=2), ["margin"], range(8), Schedule(2, 1, 1))
    assert len(found) == 8 * 2 * 2


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
def test_what_gives_no_curve_is_told(pool: list[int], test: list[int], schedule: Schedule, message: str) -> None:
    with pytest.raises(UserError, match=message):
        learning_curves(drawn(pool, 1), drawn(test, 2), ["margin"], [0], schedule)


def test_figure_has_a_line_for_each_strategy(curves: pd.DataFrame) -> None:
    axes = curve_figure(curves, "title").axes[0]
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["random", "entropy", "margin", "coreset"]
    mean = curves[curves["strategy"] == "margin"].groupby("labels")["accuracy"].mean()
    drawn_at: Any = axes.lines[2].get_ydata()
    np.testing.assert_allclose(drawn_at, mean)
