"""Let the C library keep the memory that training frees, instead of giving it back and asking for it again.

A training step on a CPU allocates and frees the same large tensors over and over. By default glibc gives every block
above 32 MB back to the system at once, and the next one costs a page fault for every 4 KB: a third of the time of a
small convolutional network (``python -m benchmarks training.allocator``). Resident memory stays at its peak.

Commands as processes of their own that neither outlive this one nor get its Ctrl-C.

The device that a command computes on.
"""

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
    """Raise glibc's thresholds for this process.

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
"""Training ends after the batch or the validation at hand when it is asked to, and writes ``last.ckpt``."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_OF_A_RUN = {"VITRAIL_RUN_DIRECTORY", "LOCAL_RANK"}
"""In the environment of a run these would send another run to that one's directory."""
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def start_process(
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


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, wait, and kill it if it does not; nothing where it has ended already."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """Ask the kernel to end this process when its parent is killed, so that nothing goes on that nobody watches."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def check_device(name: str) -> str:
    """The name of a device that can be used here.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1`` …

    Raises:
        UserError: if there is none of this name.
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
