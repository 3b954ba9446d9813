"""A tiny experiment that the command-line tests share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.__main__ import main
from tests.support.plain_figures import undrawn
from tests.support.runs import TINY, tiny_run

__all__ = ["undrawn"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The YAML of a tiny experiment."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def fitted(tmp_path: Path) -> Path:
    """A copy of a trained and tested run of the tiny experiment, where ``run`` finds it."""
    source = tiny_run()
    return Path(shutil.copytree(source, tmp_path / "runs" / "tiny" / source.name))


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
