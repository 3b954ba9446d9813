"""``python -m evaluation summary RUN …``: the table of results, a row for each run and task; ``--join`` joins runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from evaluation.statistics.scores import checked_names
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
    add_metrics(command)
    add_forms(command)


def add_metrics(command: argparse.ArgumentParser) -> None:
    """Add ``--metrics`` and ``--calibrated``."""
    command.add_argument(
        "--metrics",
        nargs="+",
        default=(),
        metavar="NAME",
        help="scores to show instead of the usual ones: auroc, average_precision, balanced_accuracy, mcc, kappa, "
        "brier, nll, aurc, accuracy@.8 (of the most confident 80 %%), coverage@.05 (at most 5 %% wrong), or all",
    )
    command.add_argument(
        "--calibrated", action="store_true", help="calibrate outputs before, by what `vitrail calibrate` fitted"
    )


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
    metrics = checked_names(options.metrics)
    if options.wide and (options.join or options.json or metrics):
        raise UserError("--wide: is a form of its own, of main scores; leave --join, --json and --metrics out")
    needs = f"reports/{options.split}_retrieval.csv" if options.retrieval else f"predictions/{options.split}.parquet"
    options.runs = runs_among(options.runs, "summary", needs)
    if options.retrieval:
        if options.join or options.wide or metrics or options.calibrated:
            raise UserError("--retrieval: is a table of its own; leave --join, --wide, --metrics and --calibrated out")
        _show(retrieval_table([read_retrieval(path, options.split) for path in options.runs]), options)
    elif options.join:
        found = join_summaries(options.runs, options.split, metrics, calibrated=options.calibrated)
        _show(joined_table(found), options)
    else:
        rows = [
            row
            for path in options.runs
            for row in summarise_run(path, options.split, metrics, calibrated=options.calibrated)
        ]
        if options.wide:
            _show(wide_table(rows), options)
        else:
            show_summaries(rows, as_markdown=options.markdown, as_json=options.json)


def _show(table: Table, options: argparse.Namespace) -> None:
    table.show(as_markdown=options.markdown, as_json=options.json)
