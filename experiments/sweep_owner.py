"""Who runs a trial, and whether he is still there: what tells a trial that goes on from one whose sweep was killed."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

GRACE_SECONDS = 120.0
"""So long a trial on another machine may be silent."""
BEAT_SECONDS = 15.0
"""So often a trial says that it is alive."""


def name_of(process: int) -> str:
    """A process of this machine, told apart from all others, also from a later one with the same number."""
    return f"{_machine()} {process} {_started(process)}"


def is_gone(name: str) -> bool | None:
    """Whether a process has ended; None where it runs on another machine, so that nothing can be seen."""
    machine, number, started = name.rsplit(" ", 2)
    if machine != _machine():
        return None
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _started(int(number)) != started


class Silence:
    """Finds trials on other machines that have not said anything for long.

    Only the own clock is used: clocks of several machines disagree.

    Args:
        grace: seconds of silence that are allowed.
        clock: seconds that pass.
    """

    def __init__(self, grace: float = GRACE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace = grace
        self._clock = clock
        self._heard: dict[int, tuple[int, float]] = {}

    def too_long(self, number: int, beat: int) -> bool:
        """Whether a trial's count of beats has not changed for too long.

        Args:
            number: of the trial.
            beat: its count now.
        """
        if number not in self._heard or self._heard[number][0] != beat:
            self._heard[number] = (beat, self._clock())
        return self._clock() - self._heard[number][1] > self._grace


def _machine() -> str:
    """Containers of one computer may have the same name, and count processes anew."""
    space = Path("/proc/self/ns/pid")
    return f"{platform.node()} {space.readlink() if space.is_symlink() else ''}".strip()


def _started(number: int) -> str:
    """When a process began, as the kernel counts; empty where that cannot be known."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    # The program's name stands in brackets and may hold anything; the start is field 22. A zombie has ended.
    fields = stat.rpartition(")")[2].split()
    return "ended" if fields[0] == "Z" else fields[19]
