from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from evaluation.statistics.calibration import calibration_error, joined_calibration_error
from evaluation.statistics.intervals import Estimate
from tests.evaluation.predictions_fixture import make_predictions
from vitrail.predictions import Predictions
from vitrail.types import UNKNOWN


def of_one(run: Predictions, temperature: float = 1.0) -> Estimate:
    rows = np.flatnonzero(run.targets["class"] != UNKNOWN)
    confidence = run.probabilities("class", temperature)[rows].max(axis=1)
    correct = run.predicted("class")[rows] == run.targets["class"][rows]
    return calibration_error(confidence, correct, run.groups[rows], n_resamples=200)


def matches(found: Estimate, expected: Estimate) -> None:
    assert found.value == pytest.approx(expected.value, abs=1e-6)
    assert tuple(found.interval) == pytest.approx(tuple(expected.interval), abs=1e-6)


@pytest.fixture
def run() -> Predictions:
    return make_predictions(60)


@pytest.mark.parametrize("temperature", [None, 0.4, 3.0])
def test_one_run_has_its_error_and_interval(run: Predictions, temperature: float | None) -> None:
    given = None if temperature is None else [temperature]
    matches(joined_calibration_error([run], "class", ["a"], given, 200), of_one(run, temperature or 1.0))


def test_folds_count_as_one_test_set_each_with_its_temperature(run: Predictions) -> None:
    folds = [run.take(np.arange(start, start + 20)) for start in (40, 0, 20)]
    order = np.concatenate([np.arange(40, 60), np.arange(40)])
    matches(joined_calibration_error(folds, "class", list("abc"), None, 200), of_one(run.take(order)))
    sharper = replace(folds[0], logits={**folds[0].logits, "class": folds[0].logits["class"] * 2})
    found = joined_calibration_error([sharper, *folds[1:]], "class", list("abc"), [2.0, 1.0, 1.0], 200)
    matches(found, of_one(run.take(order)))


def test_of_seeds_the_mean_is_taken_without_an_interval(run: Predictions) -> None:
    sharper = replace(run, logits={task: values * 5 for task, values in run.logits.items()})
    found = joined_calibration_error([run, sharper], "class", ["a", "b"])
    assert found.value == pytest.approx((of_one(run).value + of_one(sharper).value) / 2)
    assert math.isnan(found.interval.low)


def test_without_a_known_target_there_is_none(run: Predictions) -> None:
    unknown = replace(run, targets={task: np.full(len(run), UNKNOWN) for task in run.tasks})
    assert math.isnan(joined_calibration_error([unknown], "class", ["a"]).value)
