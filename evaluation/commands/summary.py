"""``python -m evaluation summary RUN …``: the table of results, a row for each run and task; ``--join`` joins runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from evaluation.tables.summary import (
    join_summaries,
    joined_table,
    read_retrieval,
    retrieval_table,
    show_summaries,
    summarise_run,
    wide_table,
)
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.runs import runs_among


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``summary``."""
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    command.add_argument("--split", default="test", help="split whose predictions are read (default: test)")
    command.add_argument(
        "--join",
        action="store_true",
        help="the runs are seeds or folds of one experiment: their mean, standard deviation and intervals",
    )
    command.add_argument("--wide", action="store_true", help="one row a run, one column a task, main scores only")
    command.add_argument(
        "--retrieval", action="store_true", help="how well images found their texts, and texts their images"
    )
    add_forms(command)


def add_forms(command: argparse.ArgumentParser) -> None:
    """Add ``--markdown`` and ``--json``."""
    form = command.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--json", action="store_true", help="print JSON, with cross-checks and further statistics")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Print the table.

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
        _show(retrieval_table([read_retrieval(path, options.split) for path in options.runs]), options)
    elif options.join:
        _show(joined_table(join_summaries(options.runs, options.split)), options)
    else:
        rows = [row for path in options.runs for row in summarise_run(path, options.split)]
        if options.wide:
            _show(wide_table(rows), options)
        else:
            show_summaries(rows, as_markdown=options.markdown, as_json=options.json)


def _show(table: Table, options: argparse.Namespace) -> None:
    table.show(as_markdown=options.markdown, as_json=options.json)
