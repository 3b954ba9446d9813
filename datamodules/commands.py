"""The commands of ``python -m datamodules``: ``audit`` describes a data set, ``pack`` writes shards to stream from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.errors import UserError
from vitrail.files import write_text_atomically
from vitrail.programs import program_name

if TYPE_CHECKING:
    from datamodules.checks.audit import AuditReport

_DATA = "--config FILE [--config OVERLAY] [--data.init_args.KEY VALUE] [--seed_everything N]"


def audit(args: list[str]) -> None:
    """Print the report, write it where that is asked for, and then refuse what a fit would refuse."""
    from rich.console import Console

    from datamodules.checks.audit import print_report
    from datamodules.cli import data_parser, parse_data

    program = f"{program_name('datamodules')} audit"
    parser = data_parser(program, f"{program} {_DATA} [--json FILE]")
    parser.add_argument("--json", type=str | None, default=None, help="File to write the whole report to.")
    datamodule, options = parse_data(parser, args)
    report = datamodule.audit()
    print_report(report, Console())
    if options.json is not None:
        _write_json(Path(options.json), report)
    report.refuse()


def pack(args: list[str]) -> None:
    """Write the shards and print how many samples each split has."""
    from datamodules.cli import data_parser, parse_data
    from datamodules.streaming.pack import PackFormat, pack

    program = f"{program_name('datamodules')} pack"
    usage = f"{program} {_DATA} --to FOLDER [--format parquet|webdataset] [--shard-size 1000]"
    parser = data_parser(program, usage)
    parser.add_argument("--to", type=str, required=True, help="Folder to write to.")
    parser.add_argument("--format", type=PackFormat, default="parquet", help="Of the shards.")
    parser.add_argument("--shard-size", type=int, default=1000, help="Samples of a shard at most.")
    datamodule, options = parse_data(parser, args)
    counts = pack(datamodule, Path(options.to), options.format, options.shard_size)
    shown = ", ".join(f"{split} {count}" for split, count in counts.items())
    sys.stdout.write(f"Shards in {options.to}: {shown}\n")


def _write_json(path: Path, report: AuditReport) -> None:
    try:
        write_text_atomically(path, json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from error
