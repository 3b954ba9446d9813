"""The process that a command runs in: memory of the C library, child processes, the device."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO

from vitrail.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LIMIT = 1 << 30


def keep_freed_memory() -> bool:
    """Raise glibc's thresholds, so that training keeps the memory it frees instead of asking for it again.

    A training step on a CPU allocates and frees the same large tensors over and over. By default glibc returns every
    block above 32 MB to the system at once, and the next one costs a page fault for every 4 KB: a third of the time of
    a small convolutional network. Resident memory stays at its peak.

    Returns:
        Whether that was possible: on Linux with glibc only.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LIMIT)) and bool(mallopt(_M_TRIM_THRESHOLD, _LIMIT))


STOP_TIMEOUT = 30.0
"""Seconds: training that is asked to end finishes its batch or validation and writes ``last.ckpt``."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_OF_A_RUN = {"VITRAIL_RUN_DIRECTORY", "LOCAL_RANK"}
"""Variables of a run that would send another run to its directory."""
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def start_process(
    command: Sequence[str],
    out: IO[bytes],
    errors: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start ``python -m command`` as a process that ends with this one and does not get its Ctrl-C.

    Args:
        command: module and arguments.
        out: file for standard output.
        errors: file for standard error; by default the same.
        environment: variables in addition to this process's own.
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


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, wait, and kill it if it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """Ask the kernel to end this process when its parent is killed, so that nothing runs on unattended."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def check_device(name: str) -> str:
    """Return the name of a device such as ``cuda:1``.

    Raises:
        UserError: it cannot be used here.
    """
    if name == "cpu":
        return name
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"--device {name}: cannot be used here ({reason}); try cpu") from error
    return name
