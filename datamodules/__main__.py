"""The command line of the data sets: ``python -m datamodules audit --config experiments/quickstart.yaml``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.schema import UserError
from datamodules.user_errors import EXIT_USER_ERROR, run_reporting_user_errors

if TYPE_CHECKING:
    from datamodules.audit import AuditReport

USAGE = "python -m datamodules audit --config FILE [--config OVERLAY] [--data.init_args.KEY VALUE] [--json FILE]"


def main(args: list[str]) -> int:
    """Runs the command line.

    Args:
        args: arguments without the program's name.

    Returns:
        Exit code: 0, or 2 for leaks that are not allowed and for mistakes of the user, told in one line.
    """
    if not args or args[0] != "audit":
        asks = bool(args) and args[0] in ("-h", "--help")
        (sys.stdout if asks else sys.stderr).write(f"usage: {USAGE}\n")
        return 0 if asks else EXIT_USER_ERROR
    return run_reporting_user_errors(lambda: _audit(args[1:]))


def _audit(args: list[str]) -> None:
    """Prints the report, writes it where that is asked for, and then refuses what a fit would refuse."""
    from rich.console import Console

    from datamodules.audit import audit
    from datamodules.audit_tables import print_report
    from datamodules.from_experiment import data_parser, parse_data

    parser = data_parser("python -m datamodules audit", USAGE)
    parser.add_argument("--json", type=str | None, default=None, help="File to write the whole report to.")
    datamodule, options = parse_data(parser, args)
    report = audit(datamodule)
    print_report(report, Console())
    if options.json is not None:
        _write_json(Path(options.json), report)
    report.refuse()


def _write_json(path: Path, report: AuditReport) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
