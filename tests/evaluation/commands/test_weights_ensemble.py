from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from evaluation.__main__ import main
from experiments.train.cli import main as experiments
from tests.support.runs import TINY
from vitrail.predictions import Predictions, read_predictions


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two architectures trained on the same images, tested."""
    root = tmp_path_factory.mktemp("ensemble")
    config = root / "tiny.yaml"
    config.write_text(TINY)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VITRAIL_CACHE", str(root / "cache"))
        found: list[Path] = []
        for backbone in ("test_resnet", "test_vit"):
            flags = ["--name", backbone, "--runs", str(root / "runs"), "--model.backbone", backbone]
            assert experiments(["fit", "--config", str(config), *flags, "--test_best=true"]) == 0
            found += (root / "runs" / backbone).glob("*")
    return found


@pytest.fixture(scope="module")
def ensemble(runs: list[Path]) -> Path:
    """Both, tested and validated; the members were away meanwhile."""
    assert main(["ensemble", *map(str, runs)]) == 0
    [made] = (runs[0].parents[1] / "test_resnet_and_test_vit").glob("*")
    away = runs[0].parents[2] / "away"
    away.mkdir()
    kept = [shutil.move(run, away / run.parent.name) for run in runs]
    for stage in ("test", "validate"):
        assert experiments([stage, "--ckpt_path", str(made / "checkpoints" / "best.ckpt")]) == 0
    for place, run in zip(kept, runs, strict=True):
        shutil.move(place, run)
    return made


def predictions_of(run: Path) -> Predictions:
    return read_predictions(run / "predictions" / "test.parquet")


def test_it_predicts_the_mean_of_what_members_predicted(runs: list[Path], ensemble: Path) -> None:
    members, mean = [predictions_of(run) for run in runs], predictions_of(ensemble)
    assert [*mean.tasks] == [*members[0].tasks]
    assert np.array_equal(mean.names, members[0].names)
    for task in mean.tasks:
        assert np.array_equal(mean.targets[task], members[0].targets[task])
        expected = sum(member.probabilities(task) for member in members) / 2
        assert np.abs(mean.probabilities(task) - expected).max() < 1e-6
        assert np.abs(members[0].probabilities(task) - expected).max() > 1e-3


def test_it_leaves_the_records_of_a_run(ensemble: Path) -> None:
    config = yaml.safe_load((ensemble / "config.yaml").read_text(encoding="utf-8"))
    assert config["name"] == "test_resnet_and_test_vit"
    assert config["model"]["class_path"] == "lightning_modules.Ensemble"
    record = json.loads((ensemble / "run.json").read_text(encoding="utf-8"))
    assert [stage["stage"] for stage in record["stages"]] == ["test", "validate"]
    assert record["model"]["class"] == "Ensemble"
    assert (ensemble / "figures" / "confusion_test_class.png").is_file()
    assert list((ensemble / "reports").glob("*test*.csv"))
    assert sorted(path.stem for path in (ensemble / "predictions").glob("*")) == ["test", "val"]


def test_it_is_calibrated_reported_and_compared_with_its_members(
    runs: list[Path], ensemble: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", str(ensemble)]) == 0
    assert main(["summary", str(ensemble), "--markdown"]) == 0
    assert "test_resnet_and_test_vit/" in capsys.readouterr().out
    assert main(["report", str(ensemble)]) == 0
    assert (ensemble / "report.html").is_file()
    capsys.readouterr()
    assert main(["compare", str(ensemble), *map(str, runs), "--markdown", "--task", "class"]) == 0
    printed = capsys.readouterr().out
    right = [(one.predicted("class") == one.targets["class"]).mean() for one in map(predictions_of, [ensemble, *runs])]
    rows = [line for line in printed.splitlines() if line.startswith("| test_")]
    assert len(rows) == 3
    for row, score in zip(rows, right, strict=True):
        assert f"| {score:.3f} [" in row
    for row, score in zip(rows[1:], right[1:], strict=True):
        assert f"| {score - right[0]:+.3f} [" in row


def test_views_of_one_run_are_averaged_by_a_yaml_too(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(runs[0].parents[2] / "cache"))
    assert main(["ensemble", str(runs[0]), "--tta", "hflip", "--to", str(tmp_path / "runs")]) == 0
    [made] = (tmp_path / "runs" / "test_resnet_tta").iterdir()
    assert experiments(["test", "--ckpt_path", str(made / "checkpoints" / "best.ckpt")]) == 0
    config = {
        "data": yaml.safe_load((runs[0] / "config.yaml").read_text(encoding="utf-8"))["data"],
        "model": {
            "class_path": "lightning_modules.Ensemble",
            "init_args": {"members": [os.path.relpath(runs[0])], "tta_views": ["identity", "hflip"]},
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
        "wandb": {"mode": "disabled"},
    }
    (tmp_path / "views.yaml").write_text(yaml.safe_dump(config))
    flags = ["--config", str(tmp_path / "views.yaml"), "--runs", str(tmp_path / "runs")]
    assert experiments(["test", *flags]) == 0
    [by_yaml] = (tmp_path / "runs" / "views").glob("*")
    one, other, alone = predictions_of(made), predictions_of(by_yaml), predictions_of(runs[0])
    for task in one.tasks:
        assert np.array_equal(one.logits[task], other.logits[task])
        assert np.abs(one.probabilities(task) - alone.probabilities(task)).max() > 1e-6
    assert experiments(["fit", *flags]) == 2


def test_mistakes_are_one_line(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(runs[0])], "members: one run as it is needs no ensemble"),
        ([str(runs[0]), str(runs[0])], "is named twice"),
        ([str(runs[0]), "--tta", "sideways"], "tta_views: must be one of identity, hflip, vflip, zoom; got sideways"),
        (["nowhere"], "nowhere: no such run directory"),
    ):
        assert main(["ensemble", *arguments]) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert message in error
    assert not list(runs[0].parents[1].glob("*ensemble*"))
