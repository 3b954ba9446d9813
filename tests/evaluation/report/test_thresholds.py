from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics

from evaluation.report.charts import Span
from evaluation.report.thresholds import MOST, thresholds_section
from tests.evaluation.predictions_fixture import make_predictions_of_every_kind
from tests.evaluation.report.test_charts import line
from vitrail.predictions import Predictions


def test_areas_and_curves_are_those_of_scikit_learn() -> None:
    predictions = make_predictions_of_every_kind().of_kinds("single_label", "multi_label")
    section = thresholds_section(predictions, "test")
    task = next(iter(predictions.of_kinds("single_label").tasks))
    own = predictions.take(predictions.known(task))
    table = section.tables[f"areas_test_{task}"].set_index("class")
    for place, name in enumerate(own.tasks[task]):
        positive, scores = own.targets[task] == place, own.probabilities(task)[:, place]
        for column, value in (
            ("AUROC [95 %]", metrics.roc_auc_score(positive, scores)),
            ("average precision [95 %]", metrics.average_precision_score(positive, scores)),
        ):
            cell = table.loc[name, column]
            assert isinstance(cell, Span)
            assert cell.value == pytest.approx(value)
        drawn = line(section.charts[f"roc_test_{task}"], name)
        x, y, _ = metrics.roc_curve(positive, scores, drop_intermediate=False)
        # With so few samples every threshold is shown.
        np.testing.assert_allclose(drawn, np.stack([x, y], axis=1), atol=2e-3)
    risk = line(section.charts[f"risk_coverage_test_{task}"], "risk")
    assert risk[-1].tolist() == pytest.approx([1, (own.predicted(task) != own.targets[task]).mean()], abs=0.01)
    assert "risk_coverage_test_tags" not in section.charts
    assert "roc_test_tags" in section.charts


def test_of_many_classes_the_worst_have_curves() -> None:
    rng = np.random.default_rng(0)
    n, classes = 300, 30
    targets = np.arange(n) % classes
    logits = rng.normal(size=(n, classes)).astype(np.float32)
    logits[np.arange(n), targets] += np.where(targets < MOST, 0.3, 5)
    names = np.array([f"photo {row}" for row in range(n)], dtype=object)
    predictions = Predictions(
        np.arange(n),
        names,
        names,
        {"class": [f"c{place}" for place in range(classes)]},
        {"class": targets},
        {"class": logits},
    )
    section = thresholds_section(predictions, "test")
    assert section.tables["areas_test_class"]["class"].tolist() == [f"c{place}" for place in range(MOST)]
    assert f"class: curves of the {MOST} of {classes} with the lowest AUROC." in section.paragraphs


def test_without_targets_nothing_is_drawn() -> None:
    predictions = make_predictions_of_every_kind().of_kinds("single_label")
    task = next(iter(predictions.tasks))
    unknown = replace(predictions, targets={task: np.full(len(predictions), -1) for task in predictions.tasks})
    section = thresholds_section(unknown, "test")
    assert section.is_gap
    assert f"Of {task!r} no target is known." in section.missing
