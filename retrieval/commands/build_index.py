"""``python -m retrieval build-index``: the approximate index of a very large gallery, and its recall."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``build-index``."""
    command.description = "Build the approximate index of a very large gallery and print its recall."
    command.add_argument("--gallery", required=True, metavar="G", help="folder or address of the gallery")
    command.add_argument(
        "--sample", type=int, default=200, metavar="N", help="stored vectors that recall is measured on (default: 200)"
    )


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Build the index and print its recall."""
    from rich.console import Console

    from retrieval.gallery import EXACT_LIMIT, Gallery
    from vitrail.errors import UserError

    if options.sample < 1:
        raise UserError(f"--sample: must be at least 1; got {options.sample}")
    gallery = Gallery.open(options.gallery)
    with Console(stderr=True).status("building the index, and comparing it with exact search"):
        report = gallery.build_index(sample=options.sample)
    sys.stdout.write(
        f"{options.gallery}: index of {report.rows:,} images; recall@{report.k} against exact search "
        f"{report.recall:.3f} (mean of {report.queries} stored vectors; the worst {report.worst:.1f})\n"
    )
    if report.rows <= EXACT_LIMIT:
        sys.stdout.write(f"search stays exact up to {EXACT_LIMIT:,} images; the index is used past that\n")
