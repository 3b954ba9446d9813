"""Labels of every kind are trained together on generated images, and the scores of all tables are scikit-learn's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn import metrics

from evaluation.tables.summary import summarise_run
from experiments.__main__ import main
from tests.experiments.conftest import only_run
from vitrail import Run
from vitrail.predictions import Predictions

pytestmark = pytest.mark.slow

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "quickstart_labels.yaml"


def of_classes(predictions: Predictions, task: str) -> dict[str, float]:
    true, predicted = predictions.targets[task], predictions.predicted(task)
    return {
        "accuracy": metrics.accuracy_score(true, predicted),
        "f1_macro": metrics.f1_score(true, predicted, average="macro"),
        "mae": float(np.abs(true - predicted).mean()),
        "quadratic_kappa": metrics.cohen_kappa_score(true, predicted, weights="quadratic"),
    }


def of_labels(predictions: Predictions, task: str) -> dict[str, float]:
    true, marked = predictions.targets[task], predictions.predicted_labels(task)
    return {
        "mAP": metrics.average_precision_score(true, predictions.label_probabilities(task), average="macro"),
        "f1_macro": metrics.f1_score(true, marked, average="macro"),
        "f1_micro": metrics.f1_score(true, marked, average="micro"),
        "exact_match": metrics.accuracy_score(true, marked),
    }


def of_numbers(predictions: Predictions, task: str) -> dict[str, float]:
    true, values = predictions.targets[task].astype(np.float64), predictions.values(task).astype(np.float64)
    return {
        "mae": metrics.mean_absolute_error(true, values),
        "rmse": metrics.root_mean_squared_error(true, values),
        "r2": metrics.r2_score(true, values),
        "spearman": float(spearmanr(true, values).statistic),
    }


ORACLES: dict[str, Callable[[Predictions, str], dict[str, float]]] = {
    "single_label": of_classes,
    "ordinal": of_classes,
    "multi_label": of_labels,
    "regression": of_numbers,
}


@pytest.mark.timeout(900)
def test_every_kind_beats_a_constant_prediction_and_has_the_scores_of_scikit_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert main(["fit", "--config", str(EXPERIMENT), "--runs", str(tmp_path)]) == 0
    run = Run(only_run(tmp_path))
    predictions = run.predictions("test")
    assert predictions is not None
    logged = run.metrics.ffill().iloc[-1].to_dict()
    assert {predictions.kind(task) for task in predictions.tasks} == {*ORACLES}
    for summary in summarise_run(run.path):
        kind = predictions.kind(summary.task)
        oracle = ORACLES[kind](predictions, summary.task)
        for name in {*summary.scores} & {*oracle}:
            assert summary.scores[name].value == pytest.approx(oracle[name], abs=1e-5), (summary.task, name)
            key = f"test/{summary.task}/{name}"
            assert key not in logged or logged[key] == pytest.approx(oracle[name], abs=1e-4), key
        assert {*oracle} & {*summary.scores}
        low, high = summary.main_score.interval
        constant = summary.constant[summary.main]
        assert high < constant if summary.main == "mae" else low > constant, (summary.task, summary.main_score)
