"""``python -m retrieval info``, ``build-index`` and ``upgrade``: what is in a gallery, and its upkeep."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vitrail.console import Table

if TYPE_CHECKING:
    from retrieval.gallery import Gallery
    from retrieval.schema import ModelIdentity


def add_info_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``info``."""
    command.add_argument("--gallery", required=True, metavar="G", help="folder or address of the gallery")


def run_info(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Print the table."""
    from retrieval.gallery import Gallery

    _description(Gallery.open(options.gallery)).show()


def _description(gallery: Gallery) -> Table:
    made_by = gallery.identity
    counts = gallery.table(["split"]).column("split").value_counts().to_pylist()
    splits = ", ".join(f"{entry['values'] or 'no split'} {entry['counts']:,}" for entry in counts)
    rows = {
        "made by": f"{made_by.task} of {made_by.run or 'an unknown run'}",
        "weights": made_by.weights,
        "images": f"{len(gallery):,}" + (f" ({splits})" if splits else ""),
        "captions with vectors": f"{gallery.n_captions():,}",
        "vectors": f"{made_by.dim} numbers; texts {'can' if made_by.encodes_text else 'cannot'} be compared with them",
        "predicts": ", ".join(_task(made_by, task, len(names)) for task, names in made_by.predicts.items())
        or "nothing",
        "labels": ", ".join(_task(made_by, task) for task in made_by.labels) or "none",
        "images as the model sees them": ", ".join(f"{key} {value}" for key, value in made_by.input_options.items()),
        "index": "built" if gallery.has_index() else "none; search is exact",
        "a filter may use": ", ".join(gallery.columns()),
    }
    return Table(["", "value"], [[*row] for row in rows.items()], None, f"gallery {gallery.uri}", header=False)


def _task(made_by: ModelIdentity, task: str, classes: int = 0) -> str:
    """A task with the number of its classes and its kind, such as ``tags (4, multi_label)``."""
    kind = made_by.kind(task)
    facts = [str(classes)] * bool(classes) + [kind] * (kind != "single_label")
    return f"{task} ({', '.join(facts)})" if facts else task


def add_build_index_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``build-index``."""
    command.description = "Build the approximate index of a very large gallery and print its recall."
    command.add_argument("--gallery", required=True, metavar="G", help="folder or address of the gallery")
    command.add_argument(
        "--sample", type=int, default=200, metavar="N", help="stored vectors that recall is measured on (default: 200)"
    )


def run_build_index(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
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


def add_upgrade_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``upgrade``."""
    command.description = (
        "Renames the tables and columns of a gallery that version 0.1 made, in place and without reading the images. "
        "A gallery that is up to date is left as it is."
    )
    command.add_argument("--gallery", required=True, metavar="G", help="folder of the gallery")


def run_upgrade(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Upgrade the gallery, and report how many images it has."""
    from retrieval.gallery import Gallery, upgrade_gallery

    upgraded = upgrade_gallery(options.gallery)
    count = len(Gallery.open(options.gallery))
    sys.stdout.write(f"{options.gallery}: {'upgraded' if upgraded else 'is up to date'}, {count:,} images\n")
