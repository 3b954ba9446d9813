"""Ctrl-C becomes one line with the command that goes on, and exit code 130; nothing slow is imported for it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C: what a shell says of a command that SIGINT has ended."""


def run_program(main: Callable[[], int]) -> int:
    """Run a program to its exit code, 130 also where Ctrl-C comes while its parts are still being imported."""
    try:
        return main()
    except KeyboardInterrupt as error:
        return report_interruption(str(error))


def was_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C is behind what ended a command; Lightning turns it into an exit with code 1."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    )


def report_interruption(how_to_go_on: str = "") -> int:
    """Print one line after Ctrl-C with the command that goes on, on the first of several processes only.

    Args:
        how_to_go_on: by default the same command, which keeps what has been finished.

    Returns:
        The exit code.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"interrupted; {how_to_go_on or f'run the same command again: {same_command()}'}\n")
    return EXIT_INTERRUPTED


def same_command() -> str:
    """The command line of this process, to be run again."""
    return shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
