"""One command of a list of results, as a process of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from vitrail.runtime import begin_process, end_process

_POLL_SECONDS = 0.5


class Runner(Protocol):
    """Runs a command to its end."""

    def __call__(
        self,
        command: Sequence[str],
        log: Path,
        stop: threading.Event,
        output: Path | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> int:
        """Run it.

        Args:
            command: after ``python -m``.
            log: file for what it prints.
            stop: set from outside to end it early; a training then saves where it is.
            output: file for standard output, where that is wanted by itself.
            beat: called about twice a second.

        Returns:
            Its exit code, negative for a signal.
        """


def run_process(
    command: Sequence[str],
    log: Path,
    stop: threading.Event,
    output: Path | None = None,
    beat: Callable[[], None] = lambda: None,
) -> int:
    """Run a command as ``Runner`` says; it ends when this process is killed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        errors = files.enter_context(log.open("wb"))
        out = files.enter_context(output.open("wb")) if output else errors
        process = begin_process(command, out, errors)
        try:
            while process.poll() is None and not stop.wait(_POLL_SECONDS):
                beat()
        finally:
            end_process(process)
    return process.returncode
