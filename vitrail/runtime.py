"""Processes and devices of commands."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from vitrail.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LIMIT = 1 << 30


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next training step instead of returning it to the system.

    By default it returns every block above 32 MB, and the page faults of the next one take a third of the time of a
    small convolutional network on a CPU. Resident memory stays at its peak.

    Returns:
        Whether it is possible: on Linux with glibc only.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LIMIT)) and bool(mallopt(_M_TRIM_THRESHOLD, _LIMIT))


def cores() -> int:
    """Return how many cores this process may use: by affinity and the quota of its container, if there are any.

    ``LOKY_MAX_CPU_COUNT`` lowers it, as for all that runs on joblib.
    """
    from joblib import cpu_count

    return max(1, int(cpu_count()))


STOP_TIMEOUT = 30.0
"""Seconds for training to finish its batch or validation and to write ``last.ckpt``."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_OF_A_RUN = {"VITRAIL_RUN_DIRECTORY", "LOCAL_RANK"}
"""Variables that would send another run to this run's directory."""
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
        errors: file for standard error, by default the same.
        environment: additional environment variables.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_A_RUN}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=errors if errors is not None else subprocess.STDOUT,
        env={**inherited, **(environment or {})},
        # Ctrl-C in a terminal must reach only this process, which then ends the others.
        process_group=0,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 -- calls into C only
    )


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Terminate a process, wait, and kill it after a timeout."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """Ask the kernel to end this process when its parent is killed."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def memory_bytes() -> int | None:
    """Return this machine's memory; None where the system does not report it, as on Windows."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def check_device(name: str) -> str:
    """Return the name of a device such as ``cuda:1``; for ``auto`` the first GPU, Apple's included, else the CPU.

    Raises:
        UserError: it cannot be used here.
    """
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(f"--device {name}: cannot be used here ({reason}); try cpu") from error
    return name


_UNUSED = {"matplotlib", "scipy", "transformers"}
"""Packages that torchmetrics imports for metrics of sound and of texts and for plots; Vitrail uses none of these."""


def lighten_torchmetrics() -> None:
    """Let torchmetrics, which Lightning imports, leave out what needs packages that slow down the start of commands.

    Importing them takes as long as importing torch itself, and more than 100 MB. Vitrail imports them where it needs
    them. It has no effect once torchmetrics is imported, and is meant for commands only: in a session of Python's, and
    with plugins, any metric may be wanted.
    """
    try:
        from lightning_utilities.core import imports
    except ModuleNotFoundError:
        return  # a machine without Lightning, which serves an export

    is_available, is_met = imports.package_available, imports.RequirementCache.__bool__

    def package_available(package_name: str) -> bool:
        return package_name not in _UNUSED and bool(is_available(package_name))

    def met(requirement: imports.RequirementCache) -> bool:
        if (requirement.requirement or "").split(">=")[0] in _UNUSED:
            requirement.available = False
            requirement.message = f"{requirement.requirement}: not used by the commands of Vitrail"
        return bool(is_met(requirement))

    module: Any = imports
    module.package_available, module.RequirementCache.__bool__ = package_available, met
