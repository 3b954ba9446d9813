"""Commands as processes of their own that neither outlive this one nor get its Ctrl-C."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO

SECONDS_TO_END = 30.0
"""Training ends after the batch or the validation at hand when it is asked to, and writes ``last.ckpt``."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_OF_A_RUN = {"VITRINE_RUN_DIRECTORY", "LOCAL_RANK"}
"""In the environment of a run these would send another run to that one's directory."""
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def begin_process(
    command: Sequence[str],
    out: IO[bytes],
    errors: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start ``python -m command``.

    Args:
        command: module and arguments.
        out: file for standard output.
        errors: file for standard error; by default the same.
        environment: variables besides this process's own.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_RUN}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=errors if errors is not None else subprocess.STDOUT,
        env={**inherited, **(environment or {})},
        # Ctrl-C in a terminal must reach this process alone, which then ends the others.
        process_group=0,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 -- calls into C only
    )


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, wait, and kill it if it does not; nothing where it has ended already."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """Ask the kernel to end this process when its parent is killed, so that nothing goes on that nobody watches."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
