"""The command line of the data sets.

``python -m datamodules audit --config experiments/quickstart.yaml`` says what is in a data set and what is wrong;
``python -m datamodules pack --config experiments/quickstart.yaml --to data/wares_shards`` writes shards to stream.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.errors import EXIT_USER_ERROR, UserError, run_program, run_reporting_user_errors
from vitrail.files import write_text_atomically

if TYPE_CHECKING:
    from datamodules.checks.audit import AuditReport

_DATA = "--config FILE [--config OVERLAY] [--data.init_args.KEY VALUE] [--seed_everything N]"
USAGES = {
    "audit": f"python -m datamodules audit {_DATA} [--json FILE]",
    "pack": f"python -m datamodules pack {_DATA} --to FOLDER [--format parquet|webdataset] [--shard_size 1000]",
}


def main(args: list[str]) -> int:
    """Runs the command line.

    Args:
        args: arguments without the program's name.

    Returns:
        Exit code: 0, or 2 for leaks that are not allowed and for mistakes of the user, told in one line.
    """
    if not args or args[0] not in USAGES:
        asks = bool(args) and args[0] in ("-h", "--help")
        (sys.stdout if asks else sys.stderr).write("".join(f"usage: {usage}\n" for usage in USAGES.values()))
        return 0 if asks else EXIT_USER_ERROR
    command = _audit if args[0] == "audit" else _pack
    return run_reporting_user_errors(lambda: command(args[1:]))


def _audit(args: list[str]) -> None:
    """Prints the report, writes it where that is asked for, and then refuses what a fit would refuse."""
    from rich.console import Console

    from datamodules.checks.audit import audit, print_report
    from datamodules.cli import data_parser, parse_data

    parser = data_parser("python -m datamodules audit", USAGES["audit"])
    parser.add_argument("--json", type=str | None, default=None, help="File to write the whole report to.")
    datamodule, options = parse_data(parser, args)
    report = audit(datamodule)
    print_report(report, Console())
    if options.json is not None:
        _write_json(Path(options.json), report)
    report.refuse()


def _pack(args: list[str]) -> None:
    """Writes the shards and says how many."""
    from datamodules.cli import data_parser, parse_data
    from datamodules.streaming.pack import PackFormat, pack

    parser = data_parser("python -m datamodules pack", USAGES["pack"])
    parser.add_argument("--to", type=str, required=True, help="Folder to write to.")
    parser.add_argument("--format", type=PackFormat, default="parquet", help="Of the shards.")
    parser.add_argument("--shard_size", type=int, default=1000, help="Samples of a shard at most.")
    datamodule, options = parse_data(parser, args)
    counts = pack(datamodule, Path(options.to), options.format, options.shard_size)
    told = ", ".join(f"{split} {count}" for split, count in counts.items())
    sys.stdout.write(f"Shards in {options.to}: {told}\n")


def _write_json(path: Path, report: AuditReport) -> None:
    try:
        write_text_atomically(path, json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(sys.argv[1:])))
