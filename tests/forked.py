"""Work in a fork of this process, which has imported already what takes long to import."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def begin_fork(work: Callable[[], int | None], log: Path) -> int:
    """Starts work whose output goes to the end of a file; the process id.

    The fork ends with what the work returns (nothing is 0) or exits with, with 1 after any other exception.
    """
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
    """Waits for it: its exit code, or the number of the signal that ended it, below 0."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
