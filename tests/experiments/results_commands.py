"""What the tests of results run: a fit of a tiny experiment, in this process or not at all."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from evaluation.__main__ import main as evaluate
from experiments.train.cli import main as experiment

ROOT = Path(__file__).parents[2]
FIT = "python -m experiments fit --config tiny.yaml --test_best=true"


class InProcess:
    """Runs commands in this process.

    Attributes:
        commands: all that were asked for.
        stops: the first fit ends after an epoch, as if it were stopped from outside.
    """

    def __init__(self, stops: bool = False) -> None:
        self.commands: list[list[str]] = []
        self.stops = stops

    def __call__(
        self,
        command: Sequence[str],
        log: Path,
        stop: threading.Event,
        output: Path | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> int:
        beat()
        self.commands.append(list(command))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("error: as told above\n")
        own: Callable[[list[str]], int] = experiment if command[0] == "experiments" else evaluate
        arguments = list(command[1:])
        if self.stops and not stop.is_set():
            arguments += ["--trainer.max_epochs=1", "--test_best=false"]
        with pytest.MonkeyPatch.context() as patch, (output or log.with_suffix(".out")).open("w") as file:
            # The record of a run has the command that a process of its own would have had.
            patch.setattr(sys, "argv", ["experiments", *command[1:]])
            with redirect_stdout(file):
                code = own(arguments)
        if self.stops:
            stop.set()
        return code

    @property
    def fits(self) -> list[list[str]]:
        return [command for command in self.commands if command[1] == "fit"]


def refuses(*_: object, **__: object) -> int:
    raise AssertionError("nothing is to be run")
