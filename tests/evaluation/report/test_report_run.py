from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from evaluation.report.sections import (
    configuration_section,
    data_section,
    environment_section,
    flattened,
    run_section,
    stage_minutes,
)
from tests.evaluation.small_run import write_run
from vitrail.runs import RunFiles


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path, gallery=False)


def changed(run: Path, **facts: Any) -> RunFiles:
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps({**record, **facts}), encoding="utf-8")
    return RunFiles(run)


def values(table: Any) -> dict[str, str]:
    return dict(zip(table.iloc[:, 0], table.iloc[:, 1], strict=True))


def test_keys_of_nested_values() -> None:
    nested = {"a": {"b": 1, "c": {}}, "d": [{"e": 2}, {"e": 3}], "f": [1, 2], "g": None}
    assert flattened(nested) == {"a.b": 1, "a.c": {}, "d.0.e": 2, "d.1.e": 3, "f": [1, 2], "g": None}


def test_minutes_of_a_stage() -> None:
    assert stage_minutes({"started": "2026-01-01T10:00:00", "ended": "2026-01-01T11:30:30"}) == 90.5
    for unknown in ({}, {"started": "2026-01-01T10:00:00"}, {"started": "soon", "ended": "later"}):
        assert math.isnan(stage_minutes(unknown))


def test_stages_and_commands(run: Path) -> None:
    section = run_section(RunFiles(run))
    table = section.tables["stages"]
    assert table["minutes"][0] == 3.5
    assert table["best on validation"].tolist() == ["val/class/accuracy 0.7000", ""]
    assert section.says == ["`python -m experiments fit --config shop.yaml`"]
    assert section.missing == []


def test_settings_and_the_whole_file(run: Path) -> None:
    section = configuration_section(RunFiles(run))
    settings = values(section.tables["settings"])
    assert settings["model"] == "lightning_modules.MultiTaskClassifier"
    assert settings["model.lr"] == "0.001"
    assert settings["trainer.callbacks.0.unfreeze_epoch"] == "4"
    assert section.texts == {"all of config.yaml": (run / "config.yaml").read_text(encoding="utf-8")}


def test_environment(run: Path) -> None:
    section = environment_section(RunFiles(run))
    told = values(section.tables["environment"])
    assert told["git revision"] == "a" * 40
    assert told["torch"] == "2.15.0"
    assert told["gpus"] == "none"
    assert told["model parameters"] == "1,000"
    assert section.missing == []


@pytest.mark.parametrize(
    ("git", "told"),
    [(None, "revision of the source is not known"), ({"revision": "b", "changed_files": 3}, "had 3 changed files")],
)
def test_source_that_does_not_reproduce_the_run_is_told(run: Path, git: Any, told: str) -> None:
    assert told in environment_section(changed(run, git=git)).missing[0]


def test_data_that_were_seen(run: Path) -> None:
    section = data_section(RunFiles(run))
    assert section.tables["data_splits"].to_dict("list") == {
        "split": ["train", "val", "test"],
        "samples": [36, 9, 9],
        "groups": [12, 3, 3],
    }
    assert "Values that training never saw, left out as unknown: colour 'gold' (5 samples)." in section.says
    assert "Images left out because they cannot be read: 0." in section.says


def test_skipped_images_are_listed(run: Path) -> None:
    skipped = [{"name": "a.jpg", "row": 3, "reason": "truncated"}]
    section = data_section(changed(run, data={"data": "Products", "skipped": skipped}))
    assert section.tables["skipped_images"].to_dict("records") == skipped


def test_nothing_is_called_none_that_is_not_recorded(run: Path) -> None:
    section = data_section(changed(run, data={"data": "Products"}))
    told = " ".join(section.says)
    assert "Every value of every label" not in told
    assert "cannot be read" not in told
    assert "fingerprint not recorded" in told
    assert section.missing == [
        "The run record does not say which values training never saw.",
        "The run record does not say whether images were left out.",
    ]


def test_missing_values_and_contradictions_are_shown(run: Path) -> None:
    identical = {"repeated": {"train": 6, "val": 0}, "conflicts": {"class": 2, "attribute colour": 1}}
    data = {"missing": {"attribute colour": {"NA": 3}}, "notes": ["no row has 'x'"], "identical": identical}
    says = data_section(changed(run, data={"data": "Products", **data})).says
    assert "Counted as unknown (checks.missing): attribute colour 'NA' (3 samples)." in says
    assert "Images that repeat another one of their split: train 6." in says
    assert "Identical images that the data contradict themselves about: class 2, attribute colour 1." in says
    assert "no row has 'x'" in says


def test_records_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("", encoding="utf-8")
    files = RunFiles(tmp_path)
    for make in (configuration_section, environment_section, data_section):
        section = make(files)
        assert section.missing
        assert not section.tables


@pytest.mark.parametrize(
    "data",
    ["text", {"samples": None, "unseen": [1], "skipped": None, "notes": 3, "missing": {"a": 1}, "identical": "x"}],
)
def test_odd_records_are_no_traceback(run: Path, data: Any) -> None:
    files = changed(run, data=data, packages=None, hardware="x", model=[], stages=[{"stage": "fit", "best": 3}])
    for make in (run_section, environment_section, data_section):
        assert make(files).title
