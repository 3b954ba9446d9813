from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evaluation.tables.calibration import compared_calibration, label_rows, number_rows
from evaluation.tables.comparison import sides_of
from evaluation.tables.summary import with_interval
from tests.evaluation.predictions_fixture import make_predictions_of_every_kind
from vitrail.predictions import OutputCalibration, read_predictions, write_predictions
from vitrail.runs import write_temperatures

FITTED = OutputCalibration({"tags": [1.5, 0.25, -0.5, 0.0]}, {"price": 1.25})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of experiment a, both calibrated, and two of b, of which one is."""
    folder = tmp_path_factory.mktemp("calibrations")
    found = [folder / name / str(seed) for name in "ab" for seed in range(2)]
    for number, run in enumerate(found):
        write_predictions(
            run / "predictions" / "test.parquet", make_predictions_of_every_kind(40, noise=1.5 - 0.3 * number)
        )
        (run / "run.json").write_text("{}")
        if number < 3:
            write_temperatures(run, {}, {}, FITTED)
    return found


def test_single_runs_have_the_rows_of_the_report(runs: list[Path]) -> None:
    singles = [runs[0], runs[3]]
    frames, notes = compared_calibration(sides_of(singles, "test", join=False), ["class", "tags", "price"], "test")
    labels, numbers = (frames[f"{name}_calibration"].to_dict("records") for name in ("label", "number"))
    assert [(row["label"], row["run"]) for row in labels] == [
        (label, name) for label in ("dots", "lid", "red") for name in "ab"
    ]
    for run, fitted in zip(singles, (FITTED, OutputCalibration()), strict=True):
        test, name = read_predictions(run / "predictions" / "test.parquet"), run.parent.name
        for row, expected in zip(
            [row for row in labels if row["run"] == name], label_rows(test, "tags", fitted), strict=True
        ):
            assert (row["n"], row["support"]) == (str(expected["n"]), str(expected["support"]))
            assert row["ECE [95 %]"] == with_interval(*expected["ece_before"])
            after = expected["ece_after"]
            assert row["calibrated ECE [95 %]"] == ("–" if after is None else with_interval(*after))
        for row, expected in zip(
            [row for row in numbers if row["run"] == name], number_rows(test, None, "price", fitted), strict=True
        ):
            assert row["coverage [95 %]"] == with_interval(*expected["before"])
            assert row["intervals"] == expected["intervals"]
    assert len(notes) == 2


def test_of_several_runs_it_is_the_mean(runs: list[Path]) -> None:
    frames, notes = compared_calibration(sides_of(runs, "test", join=True), ["tags", "price"], "test")
    tests = [read_predictions(run / "predictions" / "test.parquet") for run in runs]
    rows = frames["label_calibration"].to_dict("records")[:2]
    own = [label_rows(test, "tags", FITTED)[0] for test in tests]
    for row, members in zip(rows, (own[:2], own[2:]), strict=True):
        assert row["ECE [95 %]"] == f"{np.mean([one['ece_before'].value for one in members]):.3f}"
    assert rows[0]["calibrated ECE [95 %]"] == f"{np.mean([one['ece_after'].value for one in own[:2]]):.3f}"
    assert rows[1]["calibrated ECE [95 %]"] == "–"  # one of its runs is not calibrated
    covered = [number_rows(test, None, "price", FITTED)[0]["after"].value for test in tests[:2]]
    first = frames["number_calibration"].to_dict("records")[0]
    assert first["calibrated coverage [95 %]"] == f"{np.mean(covered):.3f}"
    assert notes[-1] == "Of several runs the calibration of labels and numbers is the mean, without an interval."


def test_tasks_with_a_single_class_have_none_of_it(runs: list[Path]) -> None:
    assert compared_calibration(sides_of(runs[:2], "test", join=False), ["class", "grade"], "test") == ({}, [])
