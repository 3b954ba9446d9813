"""The CSV log is always there; W&B is offline without an account."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger

from experiments.train.loggers import MetricsLog, build_loggers, wandb_mode


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("no_account")
def test_offline_is_the_default_without_an_account() -> None:
    assert wandb_mode("auto") == "offline"


def test_environment_decides_in_auto_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == "disabled"
    assert wandb_mode("online") == "online"


def test_csv_log_lies_in_the_run_directory(tmp_path: Path) -> None:
    directory = tmp_path / "flowers" / "1"
    loggers = build_loggers(directory, {"mode": "disabled"})
    assert [type(logger) for logger in loggers] == [MetricsLog]
    loggers[0].log_metrics({"val/loss": 1.5}, step=3)
    loggers[0].save()
    assert (directory / "metrics.csv").read_text().splitlines() == ["step,val/loss", "3,1.5"]


def test_wandb_comes_after_the_csv_log(tmp_path: Path) -> None:
    directory = tmp_path / "flowers" / "1"
    loggers = build_loggers(directory, {"mode": "offline", "project": "p", "tags": ["t"]})
    assert [type(logger) for logger in loggers] == [MetricsLog, WandbLogger]


def log(folder: Path, *, continues: bool = False) -> MetricsLog:
    return MetricsLog(folder / "name" / "version", continues=continues)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "name" / "version" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_columns_are_added_as_they_come(tmp_path: Path) -> None:
    logger = log(tmp_path)
    logger.log_metrics({"train/loss": torch.tensor(0.1)}, step=0)
    logger.save()
    logger.log_metrics({"val/loss": 0.25, "epoch": 0}, step=0)
    logger.log_metrics({"train/loss": 1 / 3}, step=1)
    logger.save()
    assert rows(tmp_path) == [
        {"epoch": "", "step": "0", "train/loss": str(torch.tensor(0.1).item()), "val/loss": ""},
        {"epoch": "0", "step": "0", "train/loss": "", "val/loss": "0.25"},
        {"epoch": "", "step": "1", "train/loss": str(1 / 3), "val/loss": ""},
    ]
    assert logger.log_dir == str(tmp_path / "name" / "version")


def test_another_run_replaces_the_log(tmp_path: Path) -> None:
    first = log(tmp_path)
    first.log_metrics({"a": 1}, step=0)
    first.finalize("success")
    second = log(tmp_path)
    second.log_metrics({"b": 2}, step=0)
    second.finalize("success")
    assert rows(tmp_path) == [{"b": "2", "step": "0"}]


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_a_resumed_run_goes_on_after_the_rows_that_hold(tmp_path: Path, keep: int) -> None:
    whole = log(tmp_path / "whole")
    first = log(tmp_path / "parts")
    values: list[dict[str, Any]] = [{"a": 0.5}, {"a": 0.25, "b": 1}, {"a": 7.0}, {"c": 1.5, "a": 1e-9}]
    for step, row in enumerate(values):
        whole.log_metrics(row, step=step)
        whole.save()
        if step < 3:
            first.log_metrics(row, step=step)
    assert first.number_of_rows == 3
    # A kill in the middle of a row.
    path = tmp_path / "parts" / "name" / "version" / "metrics.csv"
    path.write_text(path.read_text() + "0.2")
    second = log(tmp_path / "parts", continues=True)
    second.keep_rows(keep)
    assert second.number_of_rows == keep
    for step, row in enumerate(values[keep:], start=keep):
        second.log_metrics(row, step=step)
        second.save()
    assert path.read_bytes() == (tmp_path / "whole" / "name" / "version" / "metrics.csv").read_bytes()


def test_nothing_logged_leaves_no_file(tmp_path: Path) -> None:
    logger = log(tmp_path)
    logger.keep_rows(0)
    logger.finalize("success")
    assert not list(tmp_path.glob("**/*.csv"))


def test_new_columns_are_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = log(tmp_path)
    logger.log_metrics({"a": 1}, step=0)
    logger.save()

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    logger.log_metrics({"b": 1}, step=1)
    with pytest.raises(OSError, match="No space left"):
        logger.save()
    assert rows(tmp_path) == [{"a": "1", "step": "0"}]
