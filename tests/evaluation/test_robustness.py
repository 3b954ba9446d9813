from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from evaluation.commands.compare import add_compare_arguments
from evaluation.commands.compare import run_compare as compare
from evaluation.robustness import (
    CLEAN,
    IMAGENET_C,
    SEVERITIES,
    Robustness,
    compared_robustness,
    measure,
    normalised_error,
    read_results,
    write_results,
)
from evaluation.statistics.intervals import share_interval
from tests.support.runs import write_run
from vitrail.errors import UserError
from vitrail.predictions import Predictions
from vitrail.runs import Run

N, KEY = 60, {"version": 1, "checkpoint": "a", "images": "b", "seed": 0, "side": 256}
GROUPS = np.array([f"object {row // 3}" for row in range(N)], dtype=object)


def predictions(wrong: NDArray[np.bool_]) -> Predictions:
    """Of two classes; the first target is unknown."""
    targets = np.arange(N) % 2
    chosen = np.where(wrong, 1 - targets, targets)
    targets = np.where(np.arange(N) == 0, -1, targets)
    names = np.array([f"photo {row}" for row in range(N)], dtype=object)
    logits = {"class": np.eye(2, dtype=np.float32)[chosen]}
    return Predictions(np.arange(N), names, GROUPS, {"class": ["bag", "cap"]}, {"class": targets}, logits)


def write(run: Path, share: float, *, names: tuple[str, ...] = IMAGENET_C, key: dict[str, object] = KEY) -> Robustness:
    """Write results in which a share of the predictions, by the severity, is wrong."""
    rng = np.random.default_rng(int(share * 100))
    folder = run / "robustness" / "test"
    clean = predictions(np.zeros(N, dtype=bool))
    write_results(folder, CLEAN, measure(CLEAN, {0: ""}, {0: clean}, clean, key))
    for name in names:
        found = {one: predictions(rng.random(N) < share * one) for one in SEVERITIES}
        write_results(folder, name, measure(name, {one: str(one) for one in found}, found, clean, key))
    return Robustness(folder)


def test_the_mean_corruption_error_is_the_mean_of_the_errors_of_the_table(tmp_path: Path) -> None:
    found = write(tmp_path, 0.08)

    error = found.mean_error("class")

    assert error is not None
    frame = pd.DataFrame([vars(one) for one in found.conditions])
    corrupted = frame[frame.corruption != CLEAN]
    assert len(corrupted) == 75
    assert error.value == pytest.approx(1 - corrupted.groupby("corruption").value.mean().mean())
    assert (corrupted.n == N - 1).all()
    errors = found.errors("class")
    assert errors is not None
    assert error.interval == share_interval(errors.mean(axis=1), GROUPS[1:])
    assert any("mean corruption error" in sentence for sentence in found.sentences())
    [row] = [row for row in found.table("class").rows if row[0] == "fog"]
    fog = corrupted[corrupted.corruption == "fog"].value.mean()
    assert row[6].startswith(f"{fog:.3f} [")
    assert row[1:6] == [f"{value:.3f}" for value in corrupted[corrupted.corruption == "fog"].value]


def test_an_incomplete_set_has_no_mean(tmp_path: Path) -> None:
    assert write(tmp_path, 0.08, names=IMAGENET_C[:-1]).mean_error("class") is None


def test_the_normalised_error_is_the_mean_of_quotients() -> None:
    rng = np.random.default_rng(0)
    own, reference = (rng.random((N, 3)) < share for share in (0.2, 0.5))

    found = normalised_error(own.astype(float), reference.astype(float), GROUPS)

    assert found is not None
    assert found.value == pytest.approx(np.mean(own.sum(axis=0) / reference.sum(axis=0)))
    assert found.interval.low < found.value < found.interval.high
    assert normalised_error(own.astype(float), np.zeros((N, 3)), GROUPS) is None


def test_results_are_read_as_they_were_written_and_those_of_another_model_are_left_out(tmp_path: Path) -> None:
    found = write(tmp_path, 0.08, names=("fog",))
    folder = found.folder
    again = read_results(folder / "fog.parquet")
    assert again.conditions == found.results["fog"].conditions
    write_results(folder, "snow", replace(again, key={**KEY, "checkpoint": "c"}))

    assert set(Robustness(folder).results) == {CLEAN, "fog"}

    (folder / "fog.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"fog\.parquet: no results of corrupted images"):
        Robustness(folder)


def test_compare_has_the_corruption_error_next_to_the_clean_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path, name, seed=seed, gallery=False) for seed, name in enumerate(("shop", "stall"))]
    errors = [write(run, share).mean_error("class") for run, share in zip(runs, (0.04, 0.12), strict=True)]

    parser = argparse.ArgumentParser()
    add_compare_arguments(parser)
    compare(parser.parse_args([*map(str, runs), "--task", "class", "--markdown"]))

    assert errors[0] is not None
    assert errors[1] is not None
    printed = capsys.readouterr().out
    low = share_interval(np.ones(N - 1), GROUPS[1:]).low
    assert f"| 1.000 [{low:.3f}, 1.000] | {errors[1].value:.3f} [" in printed
    sides = {run.name: [Run(run)] for run in runs}
    frame, notes = compared_robustness(sides, ["class"], runs[0].name)
    assert frame is not None
    assert frame["divided by reference's [95 %]"][0] == "–"
    assert float(frame["divided by reference's [95 %]"][1].split()[0]) > 1
    assert len(notes) == 1
    write(runs[1], 0.12, key={**KEY, "seed": 1})
    frame, _ = compared_robustness(sides, ["class"], runs[0].name)
    assert frame is not None
    assert list(frame["divided by reference's [95 %]"]) == ["–", "–"]
