"""Runs on shards through the command line: terminated and resumed, and on two processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from datamodules.streaming.pack import pack
from experiments.train.cli import main
from tests.datamodules.streaming.shard_sets import SIZES, source

YAML = Path(__file__).parents[2] / "experiments" / "streamed_images.yaml"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes the experiment small: 36 images for training, in six batches an epoch."""
    root = tmp_path_factory.mktemp("streamed")
    pack(source(root / "products"), root / "shards", "webdataset", shard_size=5)
    overlay = {
        "data": {
            "init_args": {
                "shards": str(root / "shards"),
                "shuffle_buffer": 12,
                "augment": {"preset": "reference", "mixup": 0.4},
                "image": {"size": 16},
                "loader": {"batch_size": 6},
            }
        },
        "model": {"init_args": {"task_weights": {"class": 1.0, "colour": 0.5, "material": 0.5, "condition": None}}},
        "trainer": {
            "max_epochs": 2,
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "callbacks": [{"class_path": "tests.experiments.killed_runs.KilledAt"}],
        },
        "wandb": {"mode": "disabled"},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    return root / "tiny.yaml"


def run(config: Path, runs: Path, *arguments: str, stage: str = "fit") -> tuple[int, Path]:
    """Exit code and run directory."""
    command = [stage, "--config", str(YAML), "--config", str(config), "--runs", str(runs), *arguments]
    try:
        code = main(command)
    except SystemExit as end:
        code = int(end.code or 0)
    return code, max(runs.glob("*/*"))


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    code, folder = run(config, config.parent / "whole")
    assert code == 0
    return folder


@pytest.fixture
def guarded() -> Iterator[None]:
    """A signal that comes too early or too late fails the test instead of ending all tests."""

    def undeferred(number: int, frame: object) -> None:
        raise AssertionError("the run has not taken the signal over")

    before = signal.signal(signal.SIGTERM, undeferred)
    yield
    signal.signal(signal.SIGTERM, before)


def state(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return found


def metrics(folder: Path) -> pd.DataFrame:
    frame = pd.read_csv(folder / "metrics.csv")
    return frame[[name for name in map(str, frame) if not name.startswith(("time", "speed"))]]


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_terminated_run_is_resumed_exactly(
    workers: int, config: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"--data.init_args.loader.num_workers={workers}"]
    # Four moments a batch: in the middle of the first epoch.
    monkeypatch.setenv("KILL_AT", "14")
    monkeypatch.setenv("KILL_BY", str(int(signal.SIGTERM)))
    code, folder = run(config, tmp_path, *options)
    assert code == 128 + signal.SIGTERM
    loader = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
    assert 0 < loader["epoch_loop.batch_progress"]["current"]["completed"] < 6
    monkeypatch.delenv("KILL_AT")
    code, again = run(config, tmp_path, *options, "--ckpt_path", "last")
    assert (code, again) == (0, folder)
    expected = state(whole)
    assert expected.keys() == state(folder).keys()
    for name, value in state(folder).items():
        assert value.equal(expected[name]), name
    assert metrics(whole)["train/loss_step"].count() == 12
    pd.testing.assert_frame_equal(metrics(folder), metrics(whole))


def test_two_processes_evaluate_as_one(config: Path, whole: Path, tmp_path: Path) -> None:
    checkpoint = ["--ckpt_path", str(whole / "checkpoints" / "last.ckpt")]
    tables = []
    for name, devices in (
        ("one", ["--trainer.devices=1"]),
        ("two", ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]),
    ):
        code, folder = run(config, tmp_path / name, *checkpoint, *devices, stage="test")
        assert code == 0
        tables.append(pd.read_parquet(folder / "predictions" / "test.parquet").sort_values("name", ignore_index=True))
    one, two = tables
    assert len(one) == SIZES["test"]
    assert one["name"].tolist() == two["name"].tolist()
    for first, second in zip(one["logits_class"], two["logits_class"], strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


def test_two_processes_train(config: Path, tmp_path: Path) -> None:
    arguments = ["--trainer.devices=2", "--trainer.strategy=ddp_fork", "--trainer.max_epochs=1"]
    code, folder = run(config, tmp_path, *arguments)
    assert code == 0
    progress = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert progress == SIZES["train"] // 2 // 6
    assert len(pd.read_parquet(folder / "predictions" / "test.parquet")) == SIZES["test"]
