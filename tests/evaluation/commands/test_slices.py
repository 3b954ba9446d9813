from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.evaluation.predictions_fixture import make_predictions_of_every_kind
from vitrail.predictions import write_predictions
from vitrail.programs import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("sliced") / "run"
    predictions = make_predictions_of_every_kind(n=240)
    predictions.logits["class"][predictions.targets["class"] == 2] = [3.0, 0.0, 0.0]  # never a mug
    write_predictions(run / "predictions" / "test.parquet", predictions)
    return run


def test_named_slices_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["slices", str(run), "--by", "class", "--where", "confidence < .5 AND price * 2 > 50", "--json"]
    assert main("vitrail", arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["slice"] == "class = mug"
    assert {row["slice"] for row in rows} == {
        *(f"class = {name}" for name in ("bag", "cap", "mug")),
        "confidence < .5 AND price * 2 > 50",
    }
    assert rows[0]["value"] == 0.0
    assert rows[0]["p_value"] < 0.01
    assert rows[0]["interval"][1] < rows[0]["rest"]


def test_search_finds_the_worst_slice(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("vitrail", ["slices", str(run), "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "| class = mug" in printed.splitlines()[4]
    assert "permutations of whole groups, corrected for" in printed
    assert "Columns of the data are left out" in printed
    assert "The worst of many slices looks worse than it is" in printed
    assert main("vitrail", ["slices", str(run), "--task", "tags", "--by", "grade"]) == 0
    assert "mAP is no mean over samples, so without a test" in capsys.readouterr().out


def test_mistakes_are_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in {
        ("--by", "store"): "--by store: must be one of name, group, class",
        ("--where", "store = 'north'"): "there is no column 'store'",
        ("--task", "size"): "--task size: must be one of class, grade",
        ("--metric", "mae"): "--metric mae: 'class' is single_label",
        ("--where", "confidence > 2"): "no sample with a known target of 'class' is in any slice",
    }.items():
        assert main("vitrail", ["slices", str(run), *arguments]) == 2
        [error] = capsys.readouterr().err.splitlines()
        assert message in error
