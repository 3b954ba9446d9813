"""Experiment trackers other than W&B, with their real clients, in the run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from experiments.train.cli import main
from vitrail.runs import Run

TINY = {
    "test_best": True,
    "trackers": ["tensorboard", "mlflow"],
    "data": {
        "class_path": "datamodules.Wares",
        "init_args": {"n_samples": 60, "resolution": 32, "image": {"size": 32}, "loader": {"batch_size": 16}},
    },
    "model": {
        "class_path": "lightning_modules.ImageClassifier",
        "init_args": {"backbone": "test_resnet", "pretrained": False},
    },
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
    "wandb": {"mode": "offline"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    command = ["fit", "--config", str(folder / "tiny.yaml"), "--runs", str(folder / "runs")]
    assert main(command) == 0
    first = Run.latest("tiny", folder / "runs")
    resumed = ["--config", str(first.path / "config.yaml"), "--ckpt_path", "last", "--trainer.max_epochs", "2"]
    assert main(["fit", *resumed, "--test_best=false"]) == 0
    return first


def test_tensorboard_has_numbers_figures_tables_and_the_configuration(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    tags = events.Tags()

    assert {"val/loss", "train/loss_step"} <= {*tags["scalars"]}
    assert {"confusion/val/class", "confusion/test/class_normalised"} <= {*tags["images"]}
    assert {"config/text_summary", "report/test/class/text_summary"} <= {*tags["tensors"]}


def test_mlflow_has_numbers_figures_tables_and_the_configuration(run: Run) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run.path.resolve()}/mlflow/mlflow.db")
    tracked = client.get_run((run.path / "mlflow_id").read_text().strip())

    def files(folder: str = "") -> list[str]:
        found = client.list_artifacts(tracked.info.run_id, folder)
        return [name for one in found for name in (files(one.path) if one.is_dir else [one.path])]

    assert "val/loss" in tracked.data.metrics
    assert tracked.info.status == "FINISHED"
    assert {"config.yaml", "report/test/class.json", "confusion/test/confusion_test_class.png"} <= {*files()}
    assert [one.name for one in client.search_experiments() if one.name != "Default"] == ["tiny"]
    table = json.loads(Path(client.download_artifacts(tracked.info.run_id, "report/test/class.json")).read_text())
    assert table["columns"] == ["class", "precision", "recall", "f1", "support"]
    assert table["data"][-1][0] == "weighted avg"


def test_the_end_says_how_to_upload_the_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump({**TINY, "trackers": [], "test_best": False}))

    assert main(["fit", "--config", "tiny.yaml", "--runs", str(tmp_path / "runs")]) == 0

    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("W&B (offline): ")]
    folder = line.removeprefix("W&B (offline): ").partition(",")[0]
    assert line.endswith(f"wandb sync {folder}")
    assert list(Path(folder).glob("*.wandb"))
    assert not list(Path("runs").glob("*/*/tensorboard"))
