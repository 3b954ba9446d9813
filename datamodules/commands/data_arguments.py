"""The arguments that name a data set, for the commands of this package and the audit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


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
