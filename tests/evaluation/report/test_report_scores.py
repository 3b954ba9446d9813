from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from evaluation.report.sections import (
    calibration_section,
    class_table,
    classes_section,
    confusion_section,
    scores_section,
)
from evaluation.statistics.calibration import expected_calibration_error
from evaluation.statistics.intervals import clustered_wilson
from vitrail.predictions import Predictions
from vitrail.types import UNKNOWN

CLASSES = ["bag", "cap", "mug", "pen", "fan"]


def sample(n: int = 60) -> Predictions:
    """No sample is a pen, none is answered to be a fan, one is a fan, and some are not known."""
    rng = np.random.default_rng(0)
    targets = rng.choice([UNKNOWN, 0, 1, 2], n)
    targets[7] = 4
    logits = rng.normal(size=(n, 5)).astype(np.float32) + 2 * np.eye(5, dtype=np.float32)[targets]
    logits[:, 4] = -9
    return Predictions(
        sample_id=np.arange(n),
        names=np.array([f"photo {index}" for index in range(n)], dtype=object),
        groups=np.array([f"object {index // 3}" for index in range(n)], dtype=object),
        tasks={"class": CLASSES, "size": ["small", "large"]},
        targets={"class": targets, "size": np.full(n, UNKNOWN)},
        logits={"class": logits, "size": np.zeros((n, 2), np.float32)},
    )


def test_class_table_is_that_of_scikit_learn_without_numbers_of_nothing() -> None:
    found = sample()
    table = class_table(found, "class", [9, 8, 7, 6, 5])
    rows = found.targets["class"] != UNKNOWN
    targets, answers = found.targets["class"][rows], found.predicted("class")[rows]
    expected = metrics.precision_recall_fscore_support(targets, answers, labels=range(5), zero_division=np.nan)
    np.testing.assert_allclose(table["precision"], expected[0])
    np.testing.assert_allclose(table["recall"], expected[1])
    assert table["samples"].tolist() == expected[3].tolist()
    assert np.isnan(table["f1"][3])
    np.testing.assert_allclose(table["f1"][:3], expected[2][:3])
    assert np.isnan(table["precision"][4])
    assert table["answers"].sum() == rows.sum()
    assert table["train"].tolist() == [9, 8, 7, 6, 5]
    own = targets == 1
    low, high = clustered_wilson(answers[own] == 1, found.groups[rows][own])
    assert table["recall [95 %]"][1] == f"[{low:.3f}, {high:.3f}]"
    assert table["recall [95 %]"][3] == "–"


def test_classes_with_few_samples_or_none_are_named() -> None:
    section = classes_section(sample(), {}, "test")
    told = " ".join(section.says)
    assert "class: fewer than 5 samples, so next to nothing is known of: fan (1)." in told
    assert "class: without any sample in test, so without recall and F1: pen." in told
    assert section.missing == ["Of 'size' no target is known."]
    assert list(section.tables) == ["classes_test_class"]


def test_most_frequent_confusions_first() -> None:
    found = sample()
    section = confusion_section(found, "test")
    table = section.tables["confused_test_class"]
    rows = found.targets["class"] != UNKNOWN
    matrix = metrics.confusion_matrix(found.targets["class"][rows], found.predicted("class")[rows], labels=range(5))
    assert table["samples"].is_monotonic_decreasing
    for row in table.to_dict("records"):
        target, predicted = CLASSES.index(row["target"]), CLASSES.index(row["predicted"])
        assert row["samples"] == matrix[target, predicted]
        assert row["share of the target"] == pytest.approx(matrix[target, predicted] / matrix[target].sum())
    assert list(section.figures) == ["confusion_test_class"]
    assert section.missing == ["Of 'size' no target is known."]


def test_calibration_before_and_after() -> None:
    found = sample()
    section = calibration_section(found, {"class": 2.0}, "test", "runs/shop/1")
    table = section.tables["calibration_test"]
    rows = found.targets["class"] != UNKNOWN
    correct = found.predicted("class")[rows] == found.targets["class"][rows]
    for place, temperature in enumerate((1.0, 2.0)):
        confidence = found.probabilities("class", temperature)[rows].max(axis=1)
        row = table.iloc[place]
        assert row["T"] == temperature
        assert row["ECE [95 %]"].startswith(f"{expected_calibration_error(confidence, correct):.3f} [")
        assert row["NLL"] == pytest.approx(
            metrics.log_loss(
                found.targets["class"][rows], found.probabilities("class", temperature)[rows], labels=range(5)
            )
        )
    assert len(section.figures["reliability_test_class"].axes) == 4
    assert any("`python -m evaluation calibrate runs/shop/1`" in sentence for sentence in section.missing)
    assert not any("class" in sentence for sentence in section.missing)


def test_scores_of_a_task_without_targets_are_dashes() -> None:
    section = scores_section(sample(), {}, "shop/1", "test")
    row = section.tables["scores_test"].set_index("task").loc["size"]
    assert row["n"] == 0
    assert {row[name] for name in ("majority", "accuracy [95 %]", "macro F1 [95 %]", "Wilson")} == {"–"}
    assert row["note"] == "no known targets"


def test_top_three_of_three_classes_is_not_shown() -> None:
    table = scores_section(sample(), {}, "shop/1", "test").tables["scores_test"].set_index("task")
    assert table.loc["size", "top-3 [95 %]"] == "–"
    assert table.loc["class", "top-3 [95 %]"] != "–"


def test_what_is_not_above_the_majority_is_said() -> None:
    found = sample()
    guess = Predictions(
        found.sample_id,
        found.names,
        found.groups,
        {"class": CLASSES},
        {"class": found.targets["class"]},
        {"class": np.random.default_rng(1).normal(size=(60, 5)).astype(np.float32)},
    )
    told = "Not shown to be better than always answering the majority class: class."
    assert told in scores_section(guess, {}, "shop/1", "test").says
    assert told not in scores_section(found, {}, "shop/1", "test").says
