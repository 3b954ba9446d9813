"""Forks of this process, and read-only folders also for the superuser."""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def begin_fork(work: Callable[[], int | None], log: Path) -> int:
    """Start work in a fork, with its output appended to a file; return the process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = work() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end_of_fork(pid: int) -> int:
    """Wait for a fork; return its exit code, or the number of a signal below 0."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


_VERSION = 0x20080522  # linux/capability.h
_OVERRIDE = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


class _Sets(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing below a folder can be written in this block, by this thread and those that it starts."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in (*folders, *files):
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        with _without_override():
            yield
    finally:
        for path in (*folders, *files):
            if path.exists():
                path.chmod(path.stat().st_mode | 0o200)


@contextmanager
def _without_override() -> Iterator[None]:
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    before, after = (_Sets * 2)(), (_Sets * 2)()
    for sets in (before, after):
        assert libc.capget(header, sets) == 0
    after[0].effective &= ~_OVERRIDE
    assert libc.capset(header, after) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0
