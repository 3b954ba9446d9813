from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from tests.evaluation.predictions_fixture import make_predictions_of_every_kind
from vitrail.predictions import write_predictions
from vitrail.programs import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Confident validation predictions with one wrong class and one wrong number."""
    found = make_predictions_of_every_kind(60, noise=0.2)
    targets = {task: values.copy() for task, values in found.targets.items()}
    row = int(found.known("class")[3])
    targets["class"][row] = (targets["class"][row] + 1) % 3
    logits = {**found.logits, "class": found.logits["class"].copy()}
    logits["class"][row] *= 3
    targets["price"][20] = 5_000
    write_predictions(tmp_path / "run" / "predictions" / "val.parquet", replace(found, targets=targets, logits=logits))
    return tmp_path / "run"


def test_suspects_are_printed_and_written_as_corrections(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("evaluation", ["label-issues", str(run), "--to", str(tmp_path / "fix.csv")]) == 0
    frame = pd.read_csv(tmp_path / "fix.csv", dtype={"old": str, "label": str})
    assert frame.columns.tolist() == ["image", "split", "task", "old", "label", "score", "note"]
    price = frame[frame["task"] == "price"].iloc[0]
    assert (price["image"], price["old"], price["split"]) == ("photo 20", "5000", "val")
    classes = frame[frame["task"] == "class"]
    assert set(classes["old"]) | set(classes["label"]) <= {"bag", "cap", "mug"}
    assert (classes["old"] != classes["label"]).all()
    out = capsys.readouterr().out
    assert f"class: {len(classes)} suspected labels" in out
    assert "photo 20" in out
    assert main("evaluation", ["label-issues", str(run), "--task", "class"]) == 0
    assert "price" not in capsys.readouterr().out


def test_in_sample_predictions_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("evaluation", ["label-issues", str(run), "--split", "train"]) == 2
    assert "--split train: the run was trained on these images" in capsys.readouterr().err
    (run / "predictions" / "val.parquet").rename(run / "predictions" / "train.parquet")
    assert main("evaluation", ["label-issues", str(run)]) == 2
    assert "has no predictions of val or test" in capsys.readouterr().err
    (run / "predictions" / "train.parquet").rename(run / "predictions" / "test.parquet")
    (run / "run.json").write_text(json.dumps({"evaluation": {"in_training": 4}}))
    assert main("evaluation", ["label-issues", str(run)]) == 0
    assert "Warning: 4 of the images are in the training split" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "shape"], "--task shape: must be one of class, grade, tags, price"),
        (["--split", "test"], "there are no predictions of test; splits are val"),
        (["--to", "fix.xlsx"], "--to fix.xlsx: must end in .csv"),
    ],
)
def test_mistakes_are_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main("evaluation", ["label-issues", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err
