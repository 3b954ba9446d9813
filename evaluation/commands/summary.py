"""``python -m evaluation summary RUN …``: the table of results, a row for each run and task; ``--join`` joins runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from evaluation.tables import summary, summary_join, summary_retrieval, summary_wide
from vitrail.console import print_table
from vitrail.errors import UserError
from vitrail.runs import runs_among

if TYPE_CHECKING:
    from rich.table import Table

    Found = TypeVar("Found")
    Forms = tuple[Callable[[Found], str], Callable[[Found], str], Callable[[Found], Table]]
    """What was found as JSON, as Markdown, and for the terminal."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``summary``."""
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    command.add_argument("--split", default="test", help="split whose predictions are read (default: test)")
    command.add_argument(
        "--join",
        action="store_true",
        help="the runs are seeds or folds of one experiment: their mean, standard deviation and intervals",
    )
    command.add_argument("--wide", action="store_true", help="one row a run, one column a task, accuracies only")
    command.add_argument(
        "--retrieval", action="store_true", help="how well images found their texts, and texts their images"
    )
    add_forms(command)


def add_forms(command: argparse.ArgumentParser) -> None:
    """Adds ``--markdown`` and ``--json``."""
    form = command.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--json", action="store_true", help="print JSON, with cross-checks and further statistics")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Summarises the runs.

    Raises:
        UserError: a run or its predictions are missing or cannot be read, or runs cannot be joined.
    """
    if options.wide and (options.join or options.json):
        raise UserError("--wide: is a form of its own; leave --join and --json out")
    needs = f"reports/{options.split}_retrieval.csv" if options.retrieval else f"predictions/{options.split}.parquet"
    options.runs = runs_among(options.runs, "summary", needs)
    if options.retrieval:
        if options.join or options.wide:
            raise UserError("--retrieval: is a table of its own; leave --join and --wide out")
        found = [summary_retrieval.read_run(path, options.split) for path in options.runs]
        form = summary_retrieval
        _print(found, options, (form.as_json, form.markdown_table, form.rich_table))
        return
    if not options.join:
        rows = [row for path in options.runs for row in summary.summarise_run(path, options.split)]
        show_wide(rows, options.markdown) if options.wide else show(rows, options)
        return
    joined = summary_join.join_summaries(options.runs, options.split)
    _print(joined, options, (summary_join.as_json, summary_join.markdown_table, summary_join.rich_table))


def show(rows: Sequence[summary.TaskSummary], options: argparse.Namespace) -> None:
    """Prints summaries in the form that ``add_forms`` let one choose."""
    _print(rows, options, (summary.as_json, summary.markdown_table, summary.rich_table))


def show_wide(rows: Sequence[summary.TaskSummary], markdown: bool) -> None:
    """Prints one row a run."""
    if markdown:
        sys.stdout.write(summary_wide.markdown_table(rows) + "\n")
    else:
        print_table(summary_wide.rich_table(rows))


def _print(found: Found, options: argparse.Namespace, forms: Forms[Found]) -> None:
    """Prints what was found in the form that was chosen."""
    as_json, as_markdown, as_table = forms
    if options.json:
        sys.stdout.write(as_json(found) + "\n")
    elif options.markdown:
        sys.stdout.write(as_markdown(found) + "\n")
    else:
        print_table(as_table(found))
