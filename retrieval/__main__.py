"""``python -m retrieval index``, ``search``, ``build-index`` and ``info``: fill a gallery, search in it, look at it.

What the user can mend is told in one line with exit code 2, without a traceback unless ``VITRAIL_DEBUG=1``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vitrail.errors import run_program
from vitrail.types import DATA_ARGUMENTS

if TYPE_CHECKING:
    from rich.table import Table

    from retrieval.gallery import Gallery


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser(arguments[0] if arguments else "")
    options, rest = parser.parse_known_args(arguments)
    if rest and not (options.command == "index" and rest[0].startswith(DATA_ARGUMENTS)):
        parser.error(f"unknown argument {rest[0]!r}")
    from vitrail.errors import run_reporting_user_errors  # after --help, which it would make slow

    return run_reporting_user_errors(lambda: options.run_command(options, rest))


def _build_index(options: argparse.Namespace, _: list[str]) -> None:
    from rich.console import Console

    from retrieval.gallery import EXACT_LIMIT, Gallery
    from vitrail.errors import UserError

    if options.sample < 1:
        raise UserError(f"--sample: is {options.sample}, must be at least 1")
    gallery = Gallery.open(options.gallery)
    with Console(stderr=True).status("building the index, and comparing it with exact search"):
        report = gallery.build_index(sample=options.sample)
    print(
        f"{options.gallery}: index of {report.rows:,} images; recall@{report.k} against exact search "
        f"{report.recall:.3f} (mean of {report.queries} stored vectors; the worst {report.worst:.1f})"
    )
    if report.rows <= EXACT_LIMIT:
        print(f"search stays exact up to {EXACT_LIMIT:,} images; the index is used past that")


def _info(options: argparse.Namespace, _: list[str]) -> None:
    from retrieval.gallery import Gallery

    _print(_description(Gallery.open(options.gallery)))


def _description(gallery: Gallery) -> Table:
    from rich.table import Table
    from rich.text import Text

    made_by = gallery.identity
    counts = gallery.table(["split"]).column("split").value_counts().to_pylist()
    splits = ", ".join(f"{entry['values'] or 'no split'} {entry['counts']:,}" for entry in counts)
    table = Table("", "value", title=Text(f"gallery {gallery.uri}"), show_header=False)
    rows = {
        "made by": f"{made_by.task} of {made_by.run or 'an unknown run'}",
        "weights": made_by.weights,
        "images": f"{len(gallery):,}" + (f" ({splits})" if splits else ""),
        "captions with vectors": f"{gallery.n_captions():,}",
        "vectors": f"{made_by.dim} numbers; texts {'can' if made_by.encodes_text else 'cannot'} be compared with them",
        "predicts": ", ".join(f"{task} ({len(names)})" for task, names in made_by.predicts.items()) or "nothing",
        "labels": ", ".join(made_by.labels) or "none",
        "images as the model sees them": ", ".join(f"{key} {value}" for key, value in made_by.input_options.items()),
        "index": "built" if gallery.has_index() else "none; search is exact",
        "a filter may use": ", ".join(gallery.columns()),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))  # a value with square brackets is no markup
    return table


def _print(table: Table) -> None:
    from rich.console import Console

    # Wide enough for whole lines where there is no terminal to fit (a pipe, a log).
    Console(width=None if sys.stdout.isatty() else 160).print(table)


_IN_FILES = {"index": "retrieval.commands.index", "search": "retrieval.commands.search"}
"""Commands with a file of their own; it has ``add_parser`` and ``run``."""


def _parser(asked: str) -> argparse.ArgumentParser:
    """Arguments of the command that was asked for, or of all: searching must not load what only indexing needs."""
    parser = argparse.ArgumentParser(
        prog="python -m retrieval", description="A gallery of images that a model fills and people search."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in _IN_FILES.items():
        if asked == name or asked not in {*_IN_FILES, "build-index", "info"}:
            command_file = importlib.import_module(module)
            command_file.add_parser(commands)
            commands.choices[name].set_defaults(run_command=command_file.run)
    command = commands.add_parser(
        "build-index", help="build the approximate index of a very large gallery, and print its recall"
    )
    command.add_argument("--gallery", required=True, metavar="G", help="folder or address of the gallery")
    command.add_argument(
        "--sample", type=int, default=200, metavar="N", help="stored vectors that recall is measured on (default: 200)"
    )
    command.set_defaults(run_command=_build_index)
    command = commands.add_parser("info", help="tell what is in a gallery and which model made it")
    command.add_argument("--gallery", required=True, metavar="G", help="folder or address of the gallery")
    command.set_defaults(run_command=_info)
    return parser


if __name__ == "__main__":
    sys.exit(run_program(main))
