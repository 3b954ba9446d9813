from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import entropy

from evaluation.dataset.active_learning import (
    STRATEGIES,
    UNCERTAINTIES,
    checked_probabilities,
    k_centre_greedy,
    most_uncertain,
    uncertainty,
    unit,
)
from vitrail.errors import UserError


def test_uncertainties_are_those_of_the_definitions() -> None:
    probability = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(uncertainty(probability, "entropy"), entropy(probability, axis=1))
    np.testing.assert_allclose(uncertainty(probability, "margin"), [1, 0, 0.8, 1])
    np.testing.assert_allclose(uncertainty(probability, "confidence"), [0.5, 0, 0.5, 2 / 3])
    assert not np.signbit(uncertainty(probability, "entropy")).any()


def test_measures_differ_in_what_they_ask_for() -> None:
    # Torn between two classes, or in doubt about all of three.
    probability = np.array([[0.49, 0.49, 0.02], [0.45, 0.28, 0.27], [0.9, 0.05, 0.05]])
    assert most_uncertain(probability, "margin", 1).rows.tolist() == [0]
    assert most_uncertain(probability, "entropy", 1).rows.tolist() == [1]


def test_of_equal_ones_the_earlier_comes_first_and_n_may_be_too_large() -> None:
    probability = np.array([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5], [0.6, 0.4]])
    for by in UNCERTAINTIES:
        ranked = most_uncertain(probability, by, 9)
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


def test_k_centre_greedy_is_at_most_twice_as_far_as_the_best() -> None:
    for seed in range(10):
        points = np.random.default_rng(seed).normal(size=(9, 2))
        distance = np.linalg.norm(points[:, None] - points[None], axis=2)
        best = min(distance[:, list(centres)].min(axis=1).max() for centres in itertools.combinations(range(9), 3))
        chosen = k_centre_greedy(points, 3).rows
        assert distance[:, chosen].min(axis=1).max() <= 2 * best + 1e-9


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


def test_large_covered_sets_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    points, covered = rng.normal(size=(20, 4)), rng.normal(size=(33, 4))
    whole = k_centre_greedy(points, 5, covered)
    monkeypatch.setattr("evaluation.dataset.active_learning._BLOCK_ELEMENTS", 60)
    blocks = k_centre_greedy(points, 5, covered)
    assert whole.rows.tolist() == blocks.rows.tolist()
    assert whole.scores.tolist() == pytest.approx(blocks.scores.tolist())


def test_directions_have_unit_length_and_nothing_stays_nothing() -> None:
    directions = unit(np.array([[3.0, 4.0], [0.0, 0.0]]))
    assert directions.ravel().tolist() == pytest.approx([0.6, 0.8, 0, 0])


def test_logits_become_probabilities_or_are_refused() -> None:
    said = checked_probabilities(np.array([[1000.0, 0.0], [0.0, 0.0]]), "runs/a")
    assert said.ravel().tolist() == pytest.approx([1, 0, 0.5, 0.5])
    with pytest.raises(UserError, match="runs/a: logits of 1 of 2 images are not finite"):
        checked_probabilities(np.array([[np.nan, 0.0], [0.0, 0.0]]), "runs/a")
    with pytest.raises(UserError, match="runs/a: knows one class only"):
        checked_probabilities(np.zeros((2, 1)), "runs/a")


def test_all_strategies_are_named() -> None:
    assert (*UNCERTAINTIES, "coreset") == STRATEGIES
