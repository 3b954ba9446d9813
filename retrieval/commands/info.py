"""``python -m retrieval info``: what is in a gallery, and which model made it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from retrieval.gallery import Gallery


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``info``."""
    command.add_argument("--gallery", required=True, metavar="G", help="folder or address of the gallery")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Print the table."""
    from rich.console import Console

    from retrieval.gallery import Gallery

    # Wide enough for whole lines where there is no terminal to fit (a pipe, a log).
    Console(width=None if sys.stdout.isatty() else 160).print(_description(Gallery.open(options.gallery)))


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
