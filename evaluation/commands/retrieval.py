"""``python -m evaluation retrieval --gallery G``: how well rankers find what people ask for.

See ``evaluation.retrieval`` for what is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from retrieval.search.text import TEXT_FIELDS
from vitrail.console import Table
from vitrail.files import write_csv, write_text_atomically

if TYPE_CHECKING:
    from evaluation.retrieval import AttributeRow, Ground, System
    from retrieval.gallery import Gallery
    from retrieval.search.text import TextSource


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``retrieval``."""
    command.description = (
        "Ranks all images for each query such as 'blue plastic bottle' that some image fits, and "
        "evaluates by the true labels. What a gallery cannot be searched with is left out."
    )
    command.add_argument("--gallery", nargs="+", required=True, metavar="G", help="folders or URIs of galleries")
    command.add_argument("--rankers", nargs="+", default=[], help="vector, text, hybrid, random (default: all)")
    command.add_argument(
        "--words",
        nargs="+",
        default=[],
        help="text fields of text and hybrid: predicted, label (the true ones), caption (default: predicted label)",
    )
    command.add_argument("--words-gallery", metavar="G", help="gallery that a hybrid's predicted labels come from")
    command.add_argument("--splits", nargs="+", default=[], help="only images of these splits, such as val test")
    command.add_argument("--where", default="", help="only images that fit this filter")
    command.add_argument("--tasks", nargs="+", default=[], help="labels that queries are made of (default: all)")
    command.add_argument(
        "--class-words",
        choices=("last", "unique", "full"),
        default="last",
        help="what a class is called: its last word, as many as distinguish it from others, or all (default: last)",
    )
    command.add_argument(
        "--device", default="auto", help="to encode and to search on, such as cpu, cuda or mps (default: auto)"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    command.add_argument("--csv", type=Path, metavar="FILE", help="also write the numbers to this file")
    command.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    """Measure, write what is to be written, and print the table.

    Raises:
        UserError: a gallery or an option is not as it should be, or nothing can be measured.
    """
    rows = measured_rows(options)
    if options.json is not None:
        write_text_atomically(options.json, json.dumps([row._asdict() for row in rows], indent=2) + "\n")
    if options.csv is not None:
        import pandas as pd

        write_csv(options.csv, pd.DataFrame(rows, columns=list(rows[0]._fields)))
    Table(*_cells(rows), ("gallery", "ranker"), _title(rows)).show(as_markdown=options.markdown)


def measured_rows(options: argparse.Namespace) -> list[AttributeRow]:
    """All rows of all galleries, with one progress bar; those that depend on no model once."""
    from rich.console import Console
    from rich.progress import Progress

    from evaluation.retrieval import measure, rows_of
    from retrieval.gallery import Gallery
    from retrieval.search.searcher import Searcher, current_ranker, load_encoder
    from vitrail.errors import UserError
    from vitrail.runtime import check_device

    options.device = check_device(options.device)
    options.rankers = [current_ranker(name) for name in options.rankers]
    text_gallery = Gallery.open(options.words_gallery) if options.words_gallery else None
    jobs = _jobs([Gallery.open(uri, options.device) for uri in options.gallery], options, text_gallery)
    if not jobs:
        raise UserError(
            f"--rankers {' '.join(options.rankers)}: not possible in these galleries; vector and hybrid need a dual "
            "encoder's gallery, text needs predictions or labels"
        )
    names = _names([gallery.uri for gallery, _, _ in jobs])
    # Loaded when first needed, once for all rankers of a gallery.
    encoders = {gallery.uri: cache(partial(load_encoder, gallery, device=options.device)) for gallery, _, _ in jobs}
    rows: list[AttributeRow] = []
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("measuring", total=sum(len(ground.queries) for _, ground, _ in jobs))
        for gallery, ground, system in jobs:
            values = []
            borrowed = text_gallery if (system.ranker, system.source) == ("hybrid", "predicted") else None
            searcher = Searcher(
                gallery, encoders[gallery.uri], text_source=system.source or "label", text_gallery=borrowed
            )
            for part in measure(ground, searcher, system):
                values.append(part)
                progress.advance(bar, len(next(iter(part.values()))))
            rows += rows_of(names[gallery.uri], system, ground, values)
    return rows


def _jobs(
    galleries: Sequence[Gallery], options: argparse.Namespace, text_gallery: Gallery | None
) -> list[tuple[Gallery, Ground, System]]:
    from evaluation.retrieval import ground_of, systems_of

    jobs: list[tuple[Gallery, Ground, System]] = []
    for gallery in galleries:
        ground = ground_of(
            gallery, splits=options.splits, where=options.where, tasks=options.tasks, class_words=options.class_words
        )
        for system in systems_of(gallery, options.rankers, options.words, has_text_gallery=text_gallery is not None):
            again = (other == system and ground.same_as(asked) for _, asked, other in jobs)
            if system.depends_on_model or not any(again):
                jobs.append((gallery, ground, system))
    return jobs


def _names(uris: Sequence[str]) -> dict[str, str]:
    """As little of each URI's end as distinguishes it from the others."""
    parts = {uri: uri.rstrip("/").split("/") for uri in uris}
    longest = max(len(own) for own in parts.values())
    for length in range(1, longest):
        names = {uri: "/".join(own[-length:]) for uri, own in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {uri: uri for uri in uris}


def _title(rows: Sequence[AttributeRow]) -> str:
    counts = list(dict.fromkeys((row.queries, row.groups, row.images) for row in rows))
    parts = [f"{queries:,} queries in {groups:,} groups, {images:,} images" for queries, groups, images in counts]
    return "; ".join(parts) + "; mean [95 %]"


def _cells(rows: Sequence[AttributeRow]) -> tuple[list[str], list[list[str]]]:
    metrics = list(dict.fromkeys(row.metric for row in rows))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        ranker = f"{row.ranker}, {TEXT_FIELDS[cast('TextSource', row.words)]}" if row.words else row.ranker
        cell = f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
        lines.setdefault((row.gallery or "any", ranker), {})[row.metric] = cell
    return ["gallery", "ranker", *metrics], [
        [*key, *(cells.get(metric, "") for metric in metrics)] for key, cells in lines.items()
    ]
