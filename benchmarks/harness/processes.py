"""Training loops that take turns, each in a process of its own, a few steps at a time.

A loop of Lightning or of a ``Trainer`` cannot be called for eight steps: it runs until it ends. So the data stop it.
Every loop gets its batches from a loader whose collation ticks; after so many ticks the tick waits until the other
process says that it is this loop's turn again. What is measured is the time between two fetches of a batch, which is a
whole step whatever a loop does in it, and a loop that waits uses no processor.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO, TypeVar

S = TypeVar("S")
B = TypeVar("B")

GO = "go\n"


class Pacer:
    """The loop's side.

    Args:
        warm_up: batches before the first turn.
        chunk: batches of a turn.
        permits: gives a line for every turn.
        times: takes the seconds of every turn, a line each; the first line says that the warm-up is over.
    """

    def __init__(self, warm_up: int, chunk: int, permits: TextIO, times: TextIO) -> None:
        self._next, self._chunk = warm_up, chunk
        self._permits, self._times = permits, times
        self._ticks = 0
        self._begin: float | None = None

    def tick(self) -> None:
        """Called for every batch; waits at the end of a turn."""
        self._ticks += 1
        if self._ticks <= self._next:
            return
        seconds = 0.0 if self._begin is None else time.perf_counter() - self._begin
        self._next += self._chunk
        self._times.write(f"{seconds!r}\n")
        self._times.flush()
        if self._permits.readline() != GO:
            # The other side has gone; to go on would only disturb the machine.
            os._exit(1)
        self._begin = time.perf_counter()

    def pace(self, collate: Callable[[S], B]) -> Callable[[S], B]:
        """The same collation, with a tick in front."""

        def paced(samples: S) -> B:
            self.tick()
            return collate(samples)

        return paced


def steps_for(warm_up: int, chunk: int, turns: int) -> int:
    """Batches that a loop needs for so many turns; the end of the last one is the fetch of one more."""
    return warm_up + chunk * turns + 1


class Paced:
    """The side of the one who measures: a process with a loop that waits for its turns.

    Args:
        module: with a ``Pacer`` of ``pacer_of`` in it, as for ``python -m``.
        arguments: of the command.
        log: file for what the process says.
        environment: variables on top of those of this process.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        read, write = os.pipe()
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments, "--times", str(write)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
                text=True,
                env={**os.environ, **(environment or {})},
            )
        os.close(write)
        self._times = os.fdopen(read, encoding="ascii")

    def wait_until_warm(self) -> None:
        """Returns when the loop waits for its first turn.

        Raises:
            RuntimeError: if the process has failed, with the last lines of what it said.
        """
        self._next_line()

    def turn(self) -> float:
        """Lets the loop do its steps.

        Returns:
            Seconds that they took.

        Raises:
            RuntimeError: if the process has failed.
        """
        self._allow()
        return float(self._next_line())

    def finish(self) -> None:
        """Lets the loop end.

        Raises:
            RuntimeError: if the process has failed.
        """
        self._allow()
        if self._process.wait():
            raise self._failure()

    def stop(self) -> None:
        """Ends the process, whatever it does; nothing happens where it has ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._times.close()

    def _allow(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(GO)
        self._process.stdin.flush()

    def _next_line(self) -> str:
        if not (line := self._times.readline()):
            self._process.wait()
            raise self._failure()
        return line

    def _failure(self) -> RuntimeError:
        said = self._log.read_text(encoding="utf-8", errors="replace")
        return RuntimeError(f"a training loop ended with {self._process.returncode}:\n{said[-3000:]}")
