"""``python -m datamodules pack``: a data set becomes shards to stream from."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from datamodules.commands.data_arguments import add_data_arguments, data_arguments


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pack``."""
    add_data_arguments(command)
    command.add_argument(
        "--to", required=True, metavar="FOLDER", help="to write to, or an address such as s3://bucket/folder"
    )
    command.add_argument(
        "--format", choices=("parquet", "webdataset"), default="parquet", help="of the shards (default: parquet)"
    )
    command.add_argument(
        "--shard-size", type=int, default=1000, metavar="N", help="samples of a shard at most (default: 1000)"
    )


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Write the shards and print how many of them each split has."""
    from datamodules.cli import data_parser, parse_data
    from datamodules.streaming.pack import pack

    datamodule, _ = parse_data(data_parser("pack"), data_arguments(options, rest))
    counts = pack(datamodule, options.to, options.format, options.shard_size)
    shown = ", ".join(f"{split} {count}" for split, count in counts.items())
    sys.stdout.write(f"Shards in {options.to}: {shown}\n")
