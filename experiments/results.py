"""``python -m experiments results``: make the runs of ``results.yaml`` that are missing, and the tables made of them.

A run that is there and has finished with the same configuration is not made again, wherever it was made by; one that
was stopped goes on. A table whose runs are not there, because data or weights are not, is left as it is.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.errors import UserError, run_reporting_user_errors, same_command

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

    from experiments.results_file import ResultsFile, Table
    from experiments.results_maker import Maker
    from experiments.results_process import Runner

FILE = Path("experiments/results.yaml")


def main(args: Sequence[str], runner: Runner | None = None) -> int:
    """Make results, or go on with making them.

    Args:
        args: arguments after ``results``.
        runner: runs a command; by default as a process of its own.

    Returns:
        Exit code: 0 also where data or weights are not there, 1 where a command failed, 2 after a mistake of the user,
        130 after Ctrl-C, 143 after SIGTERM.
    """
    options = _parser().parse_args(list(args))
    codes: list[int] = []
    code = run_reporting_user_errors(lambda: codes.append(_run(options, runner)))
    return codes[0] if codes else code


def _run(options: argparse.Namespace, runner: Runner | None) -> int:
    from rich.console import Console

    from experiments.results_file import read_results
    from experiments.results_maker import Maker
    from experiments.results_process import run_process
    from experiments.results_readme import check_markers

    file = read_results(options.file)
    tables, names = _chosen(file, options)
    console = Console(stderr=True)
    maker = Maker(file, Path(options.runs), runner or run_process, console)
    if options.list:
        _list(maker, tables, names)
        return 0
    check_markers(options.readme, tables)
    with _alone(maker.place), _stopping(maker.stop) as told:
        if not options.tables_only:
            maker.make_runs([entry for name, entry in file.entries.items() if name in names])
        written = [maker.make_table(table, options.readme) for table in tables if not maker.stop.is_set()]
    return _report(maker, written, told, console)


def _report(maker: Maker, written: Sequence[str], told: Sequence[int], console: Console) -> int:
    """Say what was done and what was not."""
    for line in written:
        sys.stdout.write(f"{line}\n")
    for name, reason in maker.failed.items():
        console.print(f"failed: {name}: {reason}", highlight=False, soft_wrap=True, markup=False)
    if told:
        sys.stdout.write(f"Stopped. The same command goes on. ({same_command()})\n")
        return 128 + told[0]
    return 1 if maker.failed else 0


def _chosen(file: ResultsFile, options: argparse.Namespace) -> tuple[list[Table], set[str]]:
    """Tables to be made, and names of the runs that are needed."""
    if strange := [name for name in options.only if name not in file.tables and name not in file.entries]:
        known = ", ".join([*file.tables, *file.entries])
        raise UserError(f"--only {strange[0]}: {options.file} has {known}; name some of them")
    tables = [
        table
        for table in file.tables.values()
        if (table.name in options.only if options.only else options.long or not file.is_long(table))
    ]
    names = {entry.name for table in tables for entry in file.entries_of(table.command)}
    for name in file.entries.keys() & set(options.only):
        names |= {entry.name for entry in file.entries_of([f"{{{name}}}"])}
    if not options.only:
        names |= {name for name, entry in file.entries.items() if options.long or not entry.long}
    return tables, names


def _list(maker: Maker, tables: Sequence[Table], names: set[str]) -> None:
    from vitrail.console import print_table

    print_table(_state_table(maker, tables, names))


def _state_table(maker: Maker, tables: Sequence[Table], names: set[str]) -> RichTable:
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable("", "name", "state")
    for name, entry in maker.file.entries.items():
        if name in names:
            for planned in entry.runs():
                shown.add_row("run", Text(planned.label), Text(maker.state(planned)))
    for table in tables:
        shown.add_row("table", Text(table.name), Text(maker.missing(table) or "can be made"))
    return shown


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second process out, which would go on with the same interrupted runs.

    The operating system ends the lock with the process, so a killed one blocks nobody.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process makes results there; wait until it is done") from error
        yield


@contextmanager
def _stopping(stop: threading.Event) -> Iterator[list[int]]:
    """Set ``stop`` on Ctrl-C and SIGTERM, so that what runs can save; gives the signals that came."""
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        stop.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments results",
        description="Make the runs that are missing, and the README's tables of them.",
        allow_abbrev=False,
    )
    parser.add_argument("file", nargs="?", type=Path, default=FILE, metavar="FILE", help=f"(default: {FILE})")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these tables and runs only")
    parser.add_argument("--long", action="store_true", help="also what the file marks as long")
    parser.add_argument("--list", action="store_true", help="say what is there and what is missing, and make nothing")
    parser.add_argument("--tables-only", action="store_true", help="make no runs, only tables of those that are there")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="(default: README.md)")
    parser.add_argument("--runs", default="runs", help="directory of all runs (default: runs); new ones: RUNS/results")
    return parser
