from __future__ import annotations

import math

import numpy as np

from evaluation.report.figures import on_the_front, pareto_figure
from evaluation.statistics.intervals import Estimate, Interval


def test_front_is_that_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    cost, score = rng.integers(5, size=30).astype(float), rng.integers(5, size=30) / 5
    cost[3], score[4] = math.nan, math.nan
    expected = [
        not math.isnan(cost[own])
        and not math.isnan(score[own])
        and not any(
            cost[other] <= cost[own]
            and score[other] >= score[own]
            and (cost[other] < cost[own] or score[other] > score[own])
            for other in range(30)
        )
        for own in range(30)
    ]
    assert on_the_front(cost, score).tolist() == expected
    assert 0 < sum(expected) < 28


def test_equal_models_are_both_on_the_front() -> None:
    assert on_the_front(np.array([1.0, 1.0]), np.array([0.5, 0.5])).tolist() == [True, True]


def test_every_known_model_is_drawn_with_its_interval() -> None:
    scores = [Estimate(0.5, Interval(0.4, 0.7)), Estimate(0.8, Interval(0.7, 0.9)), Estimate(0.6, Interval(0.5, 0.7))]
    figure = pareto_figure(["a", "b", "c"], scores, {"parameters": [1e6, 5e6, 9e6], "ms": [3, math.nan, 1]}, "accuracy")
    first, second = figure.axes
    assert [text.get_text() for text in first.texts] == ["1", "2", "3"]
    assert [text.get_text() for text in second.texts] == ["1", "3"]
    joined = first.lines[0]
    np.testing.assert_array_equal(joined.get_xdata(), [1e6, 5e6])
    np.testing.assert_array_equal(joined.get_ydata(), [0.5, 0.8])
    spans = [tuple(np.asarray(lines.get_paths()[0].vertices)[:, 1]) for lines in first.collections]
    assert spans == [score.interval for score in scores]
