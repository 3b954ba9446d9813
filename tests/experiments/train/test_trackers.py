"""Experiment trackers with their real clients, in the run directory."""

from __future__ import annotations

import csv
import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.train.cli import main
from tests.support.wandb_store import history, records
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
    "wandb": {"mode": "offline", "project": "shop"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
        with redirect_stdout(StringIO()) as printed:
            assert main(["fit", "--config", "tiny.yaml", "--runs", str(folder / "runs")]) == 0
        (folder / "runs" / "printed").write_text(printed.getvalue())
        first = Run.latest("tiny", folder / "runs")
        resumed = ["--config", str(first.path / "config.yaml"), "--ckpt_path", "last", "--trainer.max_epochs", "2"]
        assert main(["fit", *resumed, "--test_best=false"]) == 0
    assert {path.name for path in folder.iterdir()} == {"tiny.yaml", "runs"}, "nothing outside of the run directory"
    return first


def last_values(run: Run) -> dict[str, float]:
    """Of each metric of the tasks the last value in ``metrics.csv``."""
    with (run.path / "metrics.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    found = {name: float(value) for row in rows for name, value in row.items() if "/" in name and value}
    assert {"train/loss", "val/loss", "test/loss", "test/class/accuracy"} <= {*found}
    return found


def test_wandb_has_numbers_figures_tables_and_the_configuration(run: Run) -> None:
    logged: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for folder in sorted(run.path.glob("wandb/offline-run-*")):
        logged |= history(folder)
        [store] = folder.glob("*.wandb")
        for record in records(store):
            if record.WhichOneof("record_type") == "run":
                assert record.run.project == "shop"
            config |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
    media = {str(path) for path in run.path.glob("wandb/offline-run-*/files/media/**/*.*")}

    assert {name: logged[name] for name in last_values(run)} == pytest.approx(last_values(run))
    assert config["experiment"]["data"] == run.config["data"]
    for name in ("images/confusion/val/class", "images/confusion/test/class_normalised", "table/report/test/class"):
        assert any(f"media/{name}_" in path for path in media), name


def test_tensorboard_has_numbers_figures_tables_and_the_configuration(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    tags = events.Tags()

    values = {name: events.Scalars(name)[-1].value for name in last_values(run)}
    assert values == pytest.approx(last_values(run))
    assert (
        run.config["model"]["class_path"]
        in events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    )
    assert {"confusion/val/class", "confusion/test/class_normalised"} <= {*tags["images"]}
    assert {"config/text_summary", "report/test/class/text_summary"} <= {*tags["tensors"]}


def test_mlflow_has_numbers_figures_tables_and_the_configuration(run: Run) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run.path.resolve()}/mlflow/mlflow.db")
    tracked = client.get_run((run.path / "mlflow_id").read_text().strip())

    def files(folder: str = "") -> list[str]:
        found = client.list_artifacts(tracked.info.run_id, folder)
        return [name for one in found for name in (files(one.path) if one.is_dir else [one.path])]

    assert {name: tracked.data.metrics[name] for name in last_values(run)} == pytest.approx(last_values(run))
    assert tracked.info.status == "FINISHED"
    assert {"config.yaml", "report/test/class.json", "confusion/test/confusion_test_class.png"} <= {*files()}
    text = Path(client.download_artifacts(tracked.info.run_id, "config.yaml")).read_text()
    assert yaml.safe_load(text)["data"] == run.config["data"]
    assert [one.name for one in client.search_experiments() if one.name != "Default"] == ["tiny"]
    table = json.loads(Path(client.download_artifacts(tracked.info.run_id, "report/test/class.json")).read_text())
    assert table["columns"] == ["class", "precision", "recall", "f1", "support"]
    assert table["data"][-1][0] == "weighted avg"


def test_the_end_says_how_to_upload_the_offline_run(run: Run) -> None:
    printed = (run.path.parents[1] / "printed").read_text()
    [line] = [line for line in printed.splitlines() if line.startswith("W&B (offline): ")]
    folder = line.removeprefix("W&B (offline): ").partition(",")[0]
    assert line.endswith(f"wandb sync {folder}")
    assert list(Path(folder).glob("*.wandb"))
