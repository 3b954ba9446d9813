"""``python -m retrieval info``: what is in a gallery, and which model made it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vitrail.console import Table

if TYPE_CHECKING:
    from retrieval.gallery import Gallery
    from retrieval.schema import ModelIdentity


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``info``."""
    command.add_argument("--gallery", required=True, metavar="G", help="folder or address of the gallery")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
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
