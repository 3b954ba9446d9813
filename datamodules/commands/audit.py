"""``python -m datamodules audit``: what is in a data set and what is wrong with it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from vitrail.errors import UserError
from vitrail.files import write_text_atomically


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``audit``."""
    add_data_arguments(command)
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the whole report to this file")


def add_data_arguments(command: argparse.ArgumentParser) -> None:
    """Add what names a data set: ``--config`` and ``--data``."""
    command.epilog = (
        "--data.init_args.KEY VALUE changes an argument of the data set, --data.help CLASS lists them, and\n"
        "--seed_everything N is the seed of its splits, as in fit."
    )
    command.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="experiment file whose data: part is used; a later one overrides what it names",
    )
    command.add_argument(
        "--data", metavar="CLASS", help="data set, such as Products, instead of a file or on top of it"
    )


def data_arguments(options: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """Return the arguments that ``datamodules.cli.parse_data`` takes."""
    configs = [part for path in options.config for part in ("--config", path)]
    return [*configs, *(["--data", options.data] if options.data is not None else []), *rest]


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the report, write it where that is asked for, and then refuse what a fit would refuse."""
    from rich.console import Console

    from datamodules.checks.audit import print_report
    from datamodules.cli import data_parser, parse_data

    datamodule, _ = parse_data(data_parser("audit"), data_arguments(options, rest))
    report = datamodule.audit()
    print_report(report, Console())
    if options.json is not None:
        try:
            content = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
            write_text_atomically(options.json, content + "\n")
        except OSError as error:
            raise UserError(f"--json {options.json}: cannot be written ({error.strerror})") from error
    report.refuse()
