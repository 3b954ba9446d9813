from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evaluation.dataset.label_issues import find_label_issues, find_multi_label_issues, suspects_of
from tests.evaluation.predictions_fixture import make_predictions_of_every_kind


@pytest.mark.parametrize("seed", range(4))
def test_the_suspects_are_those_of_cleanlab(seed: int) -> None:
    count = pytest.importorskip("cleanlab.count", reason="cleanlab (AGPL) is a peer of the tests only")
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(5), rng.integers(5, size=195)])
    logits = (
        rng.normal(0, 1, (200, 5)) + 1.5 * np.eye(5)[np.where(rng.random(200) < 0.2, rng.integers(5, size=200), labels)]
    )
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    joint, off_diagonal = count.compute_confident_joint(
        labels, probability, calibrate=False, return_indices_of_off_diagonals=True
    )
    issues = find_label_issues(probability, labels)
    np.testing.assert_array_equal(issues.joint, joint)
    assert sorted(issues.rows.tolist()) == sorted(off_diagonal)
    assert len(issues.rows) > 5


@pytest.mark.parametrize("seed", range(4))
def test_the_suspects_of_labels_are_those_of_cleanlab(seed: int) -> None:
    peer = pytest.importorskip(
        "cleanlab.multilabel_classification.filter", reason="cleanlab (AGPL) is a peer of the tests only"
    )
    rng = np.random.default_rng(seed)
    truth = (rng.random((200, 4)) < [0.5, 0.3, 0.6, 0.2]).astype(np.int8)
    probability = 1 / (1 + np.exp(-rng.normal(0, 1, truth.shape) - 3.0 * (truth - 0.5)))
    given = np.where(rng.random(truth.shape) < 0.1, 1 - truth, truth).astype(np.int8)
    theirs = peer.find_multilabel_issues_per_class(
        [np.flatnonzero(row).tolist() for row in given], probability, filter_by="confident_learning", n_jobs=1
    )
    ours = np.isfinite(find_multi_label_issues(probability, given))
    np.testing.assert_array_equal(ours, theirs)
    assert ours.sum() > 20
    # Entries that are not known are left out of thresholds and suspects.
    part = given.copy()
    part[:50, 0] = -1
    assert not np.isfinite(find_multi_label_issues(probability, part)[:50, 0]).any()
    rest = find_multi_label_issues(probability[50:], given[50:])
    np.testing.assert_array_equal(find_multi_label_issues(probability, part)[50:, 0], rest[:, 0])


def test_planted_mistakes_of_every_kind_come_first() -> None:
    predictions = make_predictions_of_every_kind(80, noise=0.2)
    for task in predictions.tasks:
        kind, targets = predictions.kind(task), predictions.targets[task].copy()
        row = int(predictions.known(task)[7])
        if kind == "regression":
            targets[row] += 1000
        elif kind == "multi_label":
            targets[row] = 1 - targets[row]
        else:
            targets[row] = (targets[row] + 1) % len(predictions.tasks[task])
        logits = predictions.logits[task].copy()
        logits[row] *= 1 if kind == "regression" else 3  # sure of the label that it was
        wrong = replace(
            predictions, targets={**predictions.targets, task: targets}, logits={**predictions.logits, task: logits}
        )
        first, *_ = found = suspects_of(wrong, task)
        assert first.place == row, task
        assert first.old != first.new
        assert [one.score for one in found] == sorted(one.score for one in found)
        assert len(found) < 20


def test_numbers_that_agree_are_not_suspected() -> None:
    predictions = make_predictions_of_every_kind(30)
    (task,) = (task for task in predictions.tasks if predictions.kind(task) == "regression")
    values = predictions.values(task).astype(np.float32)
    assert suspects_of(replace(predictions, targets={**predictions.targets, task: values}), task) == []
    unknown = np.full(30, np.nan, np.float32)
    assert suspects_of(replace(predictions, targets={**predictions.targets, task: unknown}), task) == []
