from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from evaluation.report.images import mistakes_section
from evaluation.report.labels import (
    NOTHING,
    label_mistakes,
    label_table,
    labels_section,
    numbers_section,
    outputs_calibration_section,
)
from evaluation.statistics.calibration import fit_labels, fit_scale, standard_width
from tests.evaluation.commands.test_calibrate import of_labels_and_numbers
from tests.evaluation.predictions_fixture import make_predictions_of_every_kind
from tests.evaluation.report.test_charts import dots
from vitrail.predictions import OutputCalibration, Predictions


def mixed() -> Predictions:
    return make_predictions_of_every_kind()


def test_scores_of_each_label_equal_scikit_learn() -> None:
    predictions = mixed()
    table = label_table(predictions, "tags", [60, 20, 10]).set_index("label")
    assert table["train"].tolist() == [60, 20, 10]
    for column, name in enumerate(predictions.tasks["tags"]):
        known = predictions.targets["tags"][:, column] >= 0
        applies = predictions.targets["tags"][known, column]
        scores = predictions.label_probabilities("tags")[known, column]
        marked = scores >= predictions.thresholds["tags"][column]
        row = table.loc[name]
        assert (row["samples"], row["support"]) == (known.sum(), applies.sum())
        assert row["prevalence"] == pytest.approx(applies.mean())
        assert row["AP"] == pytest.approx(metrics.average_precision_score(applies, scores))
        assert row["AUROC"] == pytest.approx(metrics.roc_auc_score(applies, scores))
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(applies, marked, average="binary")
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((precision, recall, f1))


def test_a_label_without_samples_has_no_scores() -> None:
    predictions = mixed()
    predictions.targets["tags"][:, 1] = 0
    table = label_table(predictions, "tags")
    assert table.loc[1, ["AP", "AUROC", "recall", "f1"]].isna().all()
    assert table.loc[1, "recall [95 %]"] == "–"
    section = labels_section(predictions.of_kinds("multi_label"), {}, "test")
    assert "tags: fewer than 5 samples, so their scores mean little: lid (0)." in section.paragraphs


def test_mistakes_in_the_same_image_are_counted() -> None:
    predictions = mixed().take(np.arange(4))
    predictions.targets["tags"][:] = [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, -1]]
    marked = np.array([[0, 1, 0], [0, 1, 1], [0, 0, 0], [1, 0, 1]])
    predictions.logits["tags"][:] = 8 * marked - 4
    counts = label_mistakes(predictions, "tags")
    assert list(counts.index) == ["dots", "lid", "red", NOTHING]
    # An unknown label is no mistake.
    assert counts.to_numpy().tolist() == [[0, 2, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert counts.to_numpy().sum() == 5


def test_numbers_are_drawn_against_the_truth() -> None:
    predictions = mixed()
    section = numbers_section(predictions.of_kinds("regression"), "test")
    rows = predictions.known("price")
    errors = predictions.values("price")[rows] - predictions.targets["price"][rows]
    drawn = dots(section.charts["numbers_test_price"])
    expected = np.column_stack([predictions.targets["price"][rows], predictions.values("price")[rows]])
    np.testing.assert_allclose(drawn, expected, atol=0.01 * np.ptp(expected))
    assert "errors_test_price" in section.charts
    assert f"mean of {errors.mean():+.4g}" in section.paragraphs[0]


def test_the_worst_of_every_kind_come_first() -> None:
    predictions = mixed()
    section = mistakes_section(predictions, {}, "test", 4, lambda name: np.zeros((8, 8, 3), np.uint8))
    grids = {grid.heading.split(":")[0]: grid for grid in section.grids}
    assert list(grids) == list(predictions.tasks)
    errors = section.files["mistakes_test_price"]["error"].abs()
    assert errors.is_monotonic_decreasing
    assert len(errors) == 59
    labels = section.files["mistakes_test_tags"]
    assert labels["cross-entropy"].is_monotonic_decreasing
    rows = predictions.known("tags")
    targets, marked = predictions.targets["tags"][rows], predictions.predicted_labels("tags")[rows]
    wrong = ((marked != (targets == 1)) & (targets >= 0)).any(axis=1)
    assert set(labels["name"]) == set(predictions.names[rows][wrong])
    card = grids["tags"].cards[0]
    assert card.lines[0].startswith("target: ")
    assert any(line.startswith(("missed: ", "wrongly predicted: ")) for line in card.lines)
    assert all(len(grid.images) == min(4, len(grid.rows)) for grid in grids.values())
    assert next(iter(grids["tags"].images)) == labels["name"][0]


def test_tasks_without_targets_are_named() -> None:
    predictions = mixed()
    predictions.targets["tags"][:] = -1
    predictions.targets["price"][:] = np.nan
    assert labels_section(predictions.of_kinds("multi_label"), {}, "test").missing == ["Of 'tags' no target is known."]
    assert numbers_section(predictions.of_kinds("regression"), "test").missing == ["Of 'price' no target is known."]


@pytest.mark.parametrize("with_deviation", [True, False])
def test_calibration_of_labels_and_numbers_before_and_after(with_deviation: bool) -> None:
    validation, predictions = (of_labels_and_numbers(400, seed, with_deviation=with_deviation) for seed in range(2))
    before = outputs_calibration_section(predictions, validation, OutputCalibration(), "test", "runs/a")
    assert before.tables["label_calibration_test"]["after [95 %]"].tolist() == ["–", "–"]
    assert before.missing == [
        "Not calibrated: tags, price. To fit on validation, run `python -m evaluation calibrate runs/a`."
    ]

    errors = validation.values("price") - validation.targets["price"]
    deviations = validation.deviations("price")
    fitted = OutputCalibration(
        labels={"tags": fit_labels(validation.logits["tags"], validation.targets["tags"])},
        **(
            {"deviations": {"price": standard_width(errors)}}
            if deviations is None
            else {"scales": {"price": fit_scale(errors, deviations)}}
        ),
    )
    after = outputs_calibration_section(predictions, validation, fitted, "test", "runs/a")
    assert after.missing == []
    labels, numbers = after.tables["label_calibration_test"], after.tables["number_calibration_test"]
    for row in labels.itertuples(index=False):
        assert float(row[-2].split()[0]) < 0.7 * float(row[-3].split()[0])
    assert numbers["level"].tolist() == ["50%", "80%", "95%"]
    covered = [float(text.split()[0]) for text in numbers["after [95 %]"]]
    assert covered == pytest.approx([0.5, 0.8, 0.95], abs=0.07)
    assert (numbers["coverage before [95 %]"] == "–").all() == (not with_deviation)
    assert [*after.charts] == ["reliability_test_tags"]


def test_numbers_without_deviation_or_validation_have_no_intervals() -> None:
    predictions = of_labels_and_numbers(50, 0, with_deviation=False).of_kinds("regression")
    section = outputs_calibration_section(predictions, None, OutputCalibration(), "test", "runs/a")
    assert not section.tables
    assert len(section.missing) == 1
