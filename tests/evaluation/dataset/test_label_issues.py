from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluation.dataset.label_issues import find_label_issues, out_of_fold
from vitrail.errors import UserError

NUM_CLASSES, DIM = 4, 12


def blobs(n: int = 320, spread: float = 0.5, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Features around a centre for each class; four samples in a row are one group."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(rng.integers(NUM_CLASSES, size=n // 4), 4)
    return np.eye(NUM_CLASSES, DIM)[labels] * 3 + rng.normal(size=(n, DIM)) * spread, labels


def by_hand(
    probability: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], set[tuple[int, int]]]:
    """Confident joint and suspects as Northcutt et al. write them (equation 1), sample by sample."""
    count = probability.shape[1]
    threshold = [
        probability[labels == code, code].mean() if (labels == code).any() else np.inf for code in range(count)
    ]
    joint, suspects = np.zeros((count, count), np.int64), set()
    for row, label in enumerate(labels.tolist()):
        able = [code for code in range(count) if probability[row, code] >= threshold[code]]
        if able:
            best = max(able, key=lambda code: probability[row, code])
            joint[label, best] += 1
            if best != label:
                suspects.add((row, best))
    return joint, suspects


@pytest.mark.parametrize("seed", range(5))
def test_joint_and_suspects_are_those_of_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    probability = rng.dirichlet(np.ones(5), size=120)
    labels = rng.integers(4, size=120)  # the fifth class has no sample
    issues = find_label_issues(probability, labels)
    joint, suspects = by_hand(probability, labels)
    np.testing.assert_array_equal(issues.joint, joint)
    assert set(zip(issues.rows.tolist(), issues.suggested.tolist(), strict=True)) == suspects
    assert (np.diff(issues.margin) >= 0).all()
    counts = np.bincount(labels, minlength=5)
    scaled = joint / np.maximum(joint.sum(axis=1, keepdims=True), 1) * counts[:, None]
    assert issues.noise == pytest.approx(1 - np.trace(scaled) / scaled.sum())
    own = probability[np.arange(120), labels]
    best_other = np.where(np.arange(5)[None] == labels[:, None], -1, probability).max(axis=1)
    np.testing.assert_allclose(issues.margin, (own - best_other)[issues.rows])


def test_flipped_labels_are_found() -> None:
    features, labels = blobs(640)
    rng = np.random.default_rng(1)
    flipped = rng.choice(len(labels), 64, replace=False)
    given = labels.copy()
    given[flipped] = (given[flipped] + rng.integers(1, NUM_CLASSES, 64)) % NUM_CLASSES
    groups = np.arange(len(labels)) // 4
    issues = find_label_issues(out_of_fold(features, given, groups, NUM_CLASSES), given)
    found = set(issues.rows.tolist())
    right = found & set(flipped.tolist())
    assert len(right) >= 0.7 * len(flipped)
    assert len(right) >= 0.95 * len(found)
    assert (issues.suggested == labels[issues.rows])[np.isin(issues.rows, flipped)].mean() > 0.95
    assert issues.noise == pytest.approx(0.1, abs=0.02)


def test_clean_labels_are_left_alone() -> None:
    features, labels = blobs()
    issues = find_label_issues(out_of_fold(features, labels, np.arange(len(labels)) // 4, NUM_CLASSES), labels)
    assert len(issues.rows) == 0
    assert issues.noise == 0
    assert issues.accuracy == 1
    assert issues.evaluated == len(labels)


def test_no_sample_is_evaluated_by_its_own_group() -> None:
    # A feature names the group and nothing else: a classifier that has seen the group knows its label, no other does.
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    labels = rng.integers(2, size=40)[groups]
    features = np.eye(40)[groups]
    accuracy = find_label_issues(out_of_fold(features, labels, groups, 2), labels).accuracy
    alone = find_label_issues(out_of_fold(features, labels, np.arange(200), 2), labels).accuracy
    assert alone == 1.0
    assert accuracy < 0.75


def test_a_class_of_one_group_is_not_evaluated() -> None:
    features, labels = blobs(80)
    labels[:4] = NUM_CLASSES  # one group of its own class
    said = out_of_fold(features, labels, np.arange(80) // 4, NUM_CLASSES + 1)
    assert np.isnan(said[:4]).all()
    assert np.isfinite(said[4:]).all()
    np.testing.assert_allclose(said[4:].sum(axis=1), 1)
    issues = find_label_issues(said, labels)
    assert issues.evaluated == 76
    assert not set(issues.rows.tolist()) & set(range(4))


def test_nothing_evaluated_is_nothing_suspected() -> None:
    issues = find_label_issues(np.full((3, 2), np.nan), np.array([0, 1, 0]))
    assert (len(issues.rows), issues.evaluated) == (0, 0)
    assert np.isnan(issues.noise)
    assert np.isnan(issues.accuracy)


@pytest.mark.parametrize(
    ("labels", "groups", "features", "message"),
    [
        ([0, 0, 0], [0, 1, 2], [[0.0], [1.0], [2.0]], "fewer than two classes"),
        ([0, 1, 2], [0, 1, 2], [[0.0], [1.0], [2.0]], "no class has two labelled samples"),
        ([0, 1, 0], [5, 5, 5], [[0.0], [1.0], [2.0]], "all samples are of one group"),
        ([0, 1, 0], [0, 1, 2], [[0.0], [np.inf], [2.0]], "features are not finite"),
    ],
)
def test_what_cannot_be_evaluated_is_reported(
    labels: list[int], groups: list[int], features: list[list[float]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        out_of_fold(np.array(features), np.array(labels), np.array(groups), 2)


def test_classes_of_fewer_samples_than_folds_are_evaluated_in_fewer() -> None:
    features = np.array([[0.0], [0.1], [1.0], [1.1]])
    said = out_of_fold(features, np.array([0, 0, 1, 1]), np.arange(4), 2)
    np.testing.assert_allclose(said.sum(axis=1), 1)
