"""The CSV log is always there; W&B is offline where nobody is logged in."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.loggers import WandbLogger

from experiments.train.loggers import MetricsLog, build_loggers, wandb_mode


@pytest.fixture
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("nobody_logged_in")
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


def test_wandb_stands_beside_the_csv_log(tmp_path: Path) -> None:
    directory = tmp_path / "flowers" / "1"
    loggers = build_loggers(directory, {"mode": "offline", "project": "p", "tags": ["t"]})
    assert [type(logger) for logger in loggers] == [MetricsLog, WandbLogger]
