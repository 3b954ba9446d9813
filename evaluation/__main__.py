"""``python -m evaluation summary RUN …`` and ``python -m evaluation linear_probe --config experiment.yaml …``.

What the user can mend is told in one line with exit code 2, without a traceback unless ``VITRINE_DEBUG=1``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from datamodules.schema import UserError
from evaluation import summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        summaries = _probe(options) if options.command == "linear_probe" else _summarise(options)
    except UserError as error:
        if os.environ.get("VITRINE_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(summary.as_json(summaries))
    elif options.markdown:
        print(summary.markdown_table(summaries))
    else:
        from rich.console import Console

        # Wide enough for whole numbers where there is no terminal to fit (a pipe, a log).
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(summary.rich_table(summaries))
    return 0


def _summarise(options: argparse.Namespace) -> list[summary.TaskSummary]:
    return [row for run in options.runs for row in summary.summarise_run(run, options.split)]


def _probe(options: argparse.Namespace) -> list[summary.TaskSummary]:
    from evaluation.linear_probe import linear_probe

    return linear_probe(options.config, options.backbone, options.pretrained, options.image_size, options.data)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation", description="What the numbers of runs mean.")
    commands = parser.add_subparsers(dest="command", required=True)
    output = argparse.ArgumentParser(add_help=False)
    form = output.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--json", action="store_true", help="print JSON, with cross-checks and further statistics")

    command = commands.add_parser(
        "summary",
        parents=[output],
        help="accuracy and macro F1 of runs with intervals by group, next to the majority baseline",
    )
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    command.add_argument("--split", default="test", help="split whose predictions are read (default: test)")

    command = commands.add_parser(
        "linear_probe",
        parents=[output],
        help="logistic regression on a frozen backbone's features: the floor that training has to beat",
    )
    command.add_argument("--config", type=Path, required=True, help="experiment YAML; only its `data:` part is read")
    command.add_argument("--backbone", required=True, help="timm name, for example resnet18")
    command.add_argument("--pretrained", default="true", help="true (hub), false, or a local file of weights")
    command.add_argument("--image_size", type=int, default=224, help="side of the pictures in pixels (default: 224)")
    command.add_argument(
        "--data", action="append", default=[], metavar="KEY=VALUE", help="override of the data part, repeatable"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
