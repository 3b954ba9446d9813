"""A tiny experiment that the command-line tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.__main__ import main
from tests.support.plain_figures import undrawn

__all__ = ["undrawn"]

TINY = """
name: tiny
data:
  class_path: datamodules.Wares
  init_args:
    n_samples: 60
    resolution: 32
    image: {size: 32}
    loader: {batch_size: 8}
model:
  class_path: lightning_modules.MultiTaskClassifier
  init_args:
    backbone: test_resnet
    pretrained: false
    lr: 0.001
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
wandb: {mode: disabled}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The YAML of a tiny experiment."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def run(tmp_path: Path, tiny: Path) -> Callable[..., int]:
    """Run the command line on the tiny experiment; all runs lie in ``tmp_path / "runs"``."""

    def command(subcommand: str, *arguments: str, config: Path = tiny) -> int:
        return main([subcommand, "--config", str(config), "--runs", str(tmp_path / "runs"), *arguments])

    return command


def only_run(runs: Path) -> Path:
    """The run directory, where there is exactly one."""
    (directory,) = runs.glob("*/*")
    return directory


def launch(command: str, *arguments: str, runner: object) -> int:
    """Run ``sweep`` or ``ablate`` with trials that are computed by a function in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.launch.workers.run_trial", runner)
        return main([command, *arguments])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command has refused something."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line
