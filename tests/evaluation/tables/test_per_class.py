from __future__ import annotations

import tracemalloc
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics

from evaluation.tables.per_class import (
    NO_PREDICTION,
    SparseConfusion,
    class_report,
    confusion_matrix,
    normalise_by_target,
)

NAMES = ["bag", "cap", "mug", "lamp"]


def answers(seed: int, n: int = 80) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = rng.integers(3, size=n)  # no one shows a lamp
    return targets, np.where(rng.random(n) < 0.5, targets, rng.integers(4, size=n))


@pytest.mark.parametrize("seed", range(3))
def test_confusion_matrix_equals_scikit_learn(seed: int) -> None:
    targets, predicted = answers(seed)
    matrix = confusion_matrix(targets, predicted, NAMES)
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(targets, predicted, labels=range(4)))
    assert matrix.index.tolist() == matrix.columns.tolist() == NAMES
    assert (matrix.index.name, matrix.columns.name) == ("target", "predicted")


def test_normalised_rows_are_shares_of_the_target() -> None:
    targets, predicted = answers(0)
    shares = normalise_by_target(confusion_matrix(targets, predicted, NAMES))
    expected = metrics.confusion_matrix(targets, predicted, labels=range(4), normalize="true")
    np.testing.assert_allclose(shares.iloc[:3], expected[:3])
    assert shares.loc["lamp"].isna().all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [2, 80])
def test_report_equals_scikit_learn(seed: int, n: int) -> None:
    targets, predicted = answers(seed, n)
    report = class_report(confusion_matrix(targets, predicted, NAMES))
    expected = metrics.classification_report(
        targets, predicted, labels=range(4), target_names=NAMES, output_dict=True, zero_division=0
    )
    for name in [*NAMES, "weighted avg"]:
        scores = [expected[name][key] for key in ("precision", "recall", "f1-score", "support")]
        assert list(report.loc[name]) == pytest.approx(scores)
    # Over the classes that occur, as scikit-learn does where it is not given labels.
    macro = metrics.f1_score(targets, predicted, average="macro", zero_division=0)
    assert report.loc["macro avg", "f1"] == pytest.approx(macro)
    precision = metrics.precision_score(targets, predicted, average="macro", zero_division=0)
    assert report.loc["macro avg", "precision"] == pytest.approx(precision)
    # Over the classes that have samples: a lamp that is predicted does not count against the others' recall.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that lamps have none
        balanced = metrics.balanced_accuracy_score(targets, predicted)
    assert report.loc["macro avg", "recall"] == pytest.approx(balanced)
    assert report.loc["accuracy", "f1"] == pytest.approx(metrics.accuracy_score(targets, predicted))
    assert report["support"].dtype == np.int64
    assert report.index.name == "class"


def test_samples_without_a_prediction_have_a_column_and_are_wrong() -> None:
    targets, predicted = np.array([0, 0, 1, 2]), np.array([0, -1, 1, -1])
    matrix = confusion_matrix(targets, predicted, NAMES)
    assert matrix.columns.tolist() == [*NAMES, NO_PREDICTION]
    assert matrix[NO_PREDICTION].tolist() == [1, 0, 1, 0]
    report = class_report(matrix)
    assert report.loc["accuracy", "recall"] == 1 / 2
    assert list(report.loc["bag"]) == [1, 1 / 2, pytest.approx(2 / 3), 2]
    assert report.loc["macro avg", "recall"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert list(normalise_by_target(matrix).loc["bag"]) == [1 / 2, 0, 0, 0, 1 / 2]


def test_report_of_nothing_has_no_averages() -> None:
    none = np.empty(0, dtype=np.int64)
    report = class_report(confusion_matrix(none, none, NAMES))
    np.testing.assert_array_equal(report.iloc[:-3], np.zeros((4, 4)))
    assert report.iloc[-3:][["precision", "recall", "f1"]].isna().all(axis=None)
    assert report["support"].tolist() == [0] * 7


def test_ten_thousand_classes_take_no_matrix() -> None:
    size = 10_000
    random = np.random.default_rng(0)
    pairs = np.unique(random.integers(0, size * (size + 1), 20_000))
    targets, predicted = np.divmod(pairs, size + 1)
    sparse = SparseConfusion(
        targets, predicted, random.integers(1, 5, len(pairs)), [f"c{code}" for code in range(size)]
    )
    tracemalloc.start()
    report, shown, found = sparse.report(), sparse.most_confused(50), sparse.pairs()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6
    assert len(report) == size + 3
    assert report.loc["accuracy", "support"] == sparse.counts.sum() == found["count"].sum()
    assert [part.shape for part in shown] == [(50, 50)] * 2


def test_sparse_counts_are_those_of_the_matrix() -> None:
    random, names = np.random.default_rng(0), list("abcdefgh")
    targets, predicted = random.integers(0, 7, 60), random.integers(-1, 8, 60)
    whole = confusion_matrix(targets, predicted, names)
    pairs, counts = np.unique(targets * 9 + np.where(predicted < 0, 8, predicted), return_counts=True)
    sparse = SparseConfusion(pairs // 9, pairs % 9, counts, names)
    pd.testing.assert_frame_equal(sparse.report(), class_report(whole))
    found, shares = sparse.most_confused(8)
    pd.testing.assert_frame_equal(found, whole[names])
    pd.testing.assert_frame_equal(shares, normalise_by_target(whole)[names])
    few, _ = sparse.most_confused(3)
    errors = whole[names].to_numpy().sum(0) + whole.to_numpy().sum(1) - 2 * np.diag(whole)
    # Samples without a prediction are errors of their target.
    assert few.index.tolist() == [names[row] for row in np.sort(np.argsort(-errors, kind="stable")[:3])]
