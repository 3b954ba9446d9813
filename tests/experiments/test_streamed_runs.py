"""Runs on shards through the command line: terminated and resumed, and on two processes."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from datamodules.base import ImageDataModule
from datamodules.streaming import StreamedImages
from datamodules.streaming.index import stamp_of
from datamodules.streaming.pack import PackFormat, pack
from datamodules.streaming.shards import find_shards
from experiments.train.cli import main
from tests.datamodules.streaming.shard_sets import SIZES, source
from tests.support.forks import run_program
from vitrail.errors import UserError
from vitrail.files import fetch, remote_names, upload

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
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
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


def interrupted_at(image: int, data: ImageDataModule) -> Callable[[Any, int], bytes]:
    encoded, count = data.encoded_image, itertools.count(1)

    def read(_: ImageDataModule, row: int) -> bytes:
        if next(count) == image:
            raise KeyboardInterrupt
        return encoded(row)

    return read


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_shards_on_s3_are_those_that_were_packed(
    kind: PackFormat, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = source(tmp_path / "products")
    assert pack(data, f"{bucket}/shards", kind, shard_size=10) == {"train": 4, "val": 1, "test": 1}
    far = StreamedImages(f"{bucket}/shards")
    assert {far.encoded_image(row) for row in range(54)} == {data.encoded_image(row) for row in range(54)}
    assert stamp_of(far._opened().urls[0])  # changes with the shard, so that what is kept of it can be used again
    with pytest.raises(UserError, match=r"--to s3://.*/shards: contains .* already; choose another folder"):
        pack(data, f"{bucket}/shards", kind, shard_size=10)
    with monkeypatch.context() as patch:
        patch.setattr(type(data), "encoded_image", interrupted_at(3, data))
        with pytest.raises(KeyboardInterrupt):
            pack(data, f"{bucket}/interrupted", kind, shard_size=1)
    assert len(remote_names(f"{bucket}/interrupted")) == 3
    pack(data, f"{bucket}/interrupted", kind, shard_size=1)
    far = StreamedImages(f"{bucket}/interrupted")
    assert {far.encoded_image(row) for row in range(54)} == {data.encoded_image(row) for row in range(54)}
    for there in ("s3://no-such-bucket/x", f"{bucket}/nothing"):
        with pytest.raises(UserError, match=r"no-such-bucket|nothing") as caught:
            find_shards(there)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"s3://no-such-bucket/x.*cannot be written.*check address, credentials"):
        pack(data, "s3://no-such-bucket/x", kind)


@pytest.mark.slow  # two more runs as programs
def test_a_run_on_s3_is_killed_and_goes_on_on_another_machine(
    config: Path, whole: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same shards as of the undisturbed run, and every checkpoint is copied.
    for shard in (config.parent / "shards").iterdir():
        upload(shard, f"{bucket}/shards/{shard.name}")
    address = f"{bucket}/runs/streamed"
    common = ["fit", "--config", str(YAML), "--config", str(config), f"--data.init_args.shards={bucket}/shards"]
    common += [f"--last.copy_to={address}", "--last.every_n_train_steps=2"]
    # In the second epoch, after a validation; the first machine is lost with its disk.
    run_program(
        "experiments", *common, "--runs", str(tmp_path / "one"), environment={"KILL_AT": "46"}, code=-signal.SIGKILL
    )
    assert remote_names(address) == ["best.ckpt", "config.yaml", "last.ckpt"]
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    run_program("experiments", *common, "--runs", str(tmp_path / "two"), "--ckpt_path", f"{address}/last.ckpt")
    (folder,) = (tmp_path / "two").glob("*/*")
    expected = state(whole)
    for name, value in state(folder).items():
        assert value.equal(expected[name]), name
    best, theirs = (torch.load(one / "checkpoints" / "best.ckpt", weights_only=True) for one in (folder, whole))
    assert best["global_step"] == theirs["global_step"]
    assert all(value.equal(theirs["state_dict"][name]) for name, value in best["state_dict"].items())
    fetched = torch.load(fetch(f"{address}/last.ckpt", tmp_path / "fetched"), weights_only=True)
    assert fetched["global_step"] == torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    # Neither credentials nor the endpoint are recorded.
    recorded = (folder / "config.yaml").read_text() + (folder / "run.json").read_text()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in recorded
    assert os.environ["AWS_ENDPOINT_URL"] not in recorded


def test_a_copy_that_fails_at_the_start_ends_the_run_with_one_line(
    config: Path, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bucket
    assert run(config, tmp_path, "--last.copy_to=s3://no-such-bucket/x")[0] == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "s3://no-such-bucket/x/config.yaml: cannot be written" in line


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_processes_train(config: Path, tmp_path: Path) -> None:
    arguments = ["--trainer.devices=2", "--trainer.strategy=ddp_fork", "--trainer.max_epochs=1"]
    code, folder = run(config, tmp_path, *arguments)
    assert code == 0
    progress = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert progress == SIZES["train"] // 2 // 6
    assert len(pd.read_parquet(folder / "predictions" / "test.parquet")) == SIZES["test"]
