"""Section of a report: what a run's gallery finds for pictures and, where it has captions, for texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from evaluation.html_page import Card, Section
from evaluation.report_pictures import ReadPicture, rows_of, small_picture, told_split
from vitrail.files import read_csv

if TYPE_CHECKING:
    import pandas as pd

    from retrieval.gallery import Gallery
    from retrieval.hits import Hit

_QUERIES, _HITS, _TEXTS = 6, 5, 3


def retrieval_section(
    gallery: Gallery, split: str, task: str, read: ReadPicture | None, scores: Path | None, seed: int = 0
) -> Section:
    """Pictures of different classes and what the run's gallery finds for them, and for their captions.

    Args:
        gallery: of the run.
        split: that queries are drawn from.
        task: whose classes are told.
        read: reads a picture; without it, or where it cannot, what the gallery keeps of it is shown.
        scores: file of retrieval metrics that a test wrote, where there is one.
        seed: of the draw.
    """
    from retrieval.hits import Hit

    rows = rows_of(gallery, split)
    queries = _different(rows, f"label_{task}", seed)
    says = [
        f"Queries are drawn from {told_split(rows, split)} with seed {seed}, of different classes where there are; "
        f"found are the nearest of the gallery's {len(gallery):,} pictures by cosine, without the query itself."
    ]
    section = Section("Retrieval examples", says=says)
    if scores is not None and scores.is_file():
        section.tables[scores.stem] = read_csv(scores)
    known = gallery.table(["id", "group"]).to_pydict()
    groups = dict(zip(known["id"], known["group"], strict=True))
    vectors = gallery.vectors(queries)
    for number, (query, hits) in enumerate(zip(queries, gallery.nearest(vectors, _HITS + 1), strict=True), start=1):
        others = [hit for hit in hits if hit.id != query][:_HITS]
        same = {hit.id: "the same object" for hit in others if groups[hit.id] == groups[query]}
        cards = _cards(gallery, [Hit(query, 1.0), *others], task, f"retrieval_{number:02}", read, same)
        cards[0].says[0] = "query"
        if gallery.n_captions():
            cards[0].says.extend(_nearest_texts(gallery, vectors[number - 1 : number]))
        section.cards[query] = cards
    _add_texts(section, gallery, queries, task, read)
    return section


def _add_texts(section: Section, gallery: Gallery, queries: Sequence[str], task: str, read: ReadPicture | None) -> None:
    """The first caption of each query that has one, and the pictures that the gallery finds for it."""
    if not gallery.n_captions():
        return
    from retrieval.store import matrix_of

    captions = gallery.captions_of(queries)
    written = captions.column("picture").to_pylist()
    places = [written.index(query) for query in queries if query in written]
    if not places:
        return
    texts = captions.take(places)
    asked = zip(*(texts.column(name).to_pylist() for name in ("picture", "caption")), strict=True)
    found = gallery.nearest(matrix_of(texts.column("vector")), _HITS)
    for number, ((picture, caption), hits) in enumerate(zip(asked, found, strict=True), start=1):
        if (title := f"“{caption}”") in section.cards:
            continue  # another query's caption says the same
        its = {picture: "the picture that the text is of"}
        section.cards[title] = _cards(gallery, hits, task, f"retrieval_text_{number:02}", read, its)
    section.says.append(
        "Texts are the first captions of the same pictures; for them the nearest pictures are shown, their own one "
        "among all others."
    )


def _cards(
    gallery: Gallery, hits: Sequence[Hit], task: str, stem: str, read: ReadPicture | None, notes: dict[str, str]
) -> list[Card]:
    """Pictures with score and class, and what is noted of some by id."""
    from retrieval.found import look_up

    cards = []
    found = look_up(gallery, [hit.id for hit in hits], [hit.score for hit in hits])
    for place, one in enumerate(found):
        lines = [f"{task}: {one.labels[task]}"] if one.labels.get(task) else []
        if one.id in notes:
            lines.append(notes[one.id])
        picture = small_picture(one.id, read) or one.thumbnail
        cards.append(Card(f"{stem}_{place:02}", picture, [f"{one.score:.3f}", *lines]))
    return cards


def _nearest_texts(gallery: Gallery, vector: NDArray[np.float32]) -> list[str]:
    return [f"{hit.score:.3f} “{hit.caption}”" for hit in gallery.nearest_captions(vector, _TEXTS)[0]]


def _different(rows: pd.DataFrame, column: str, seed: int) -> list[str]:
    """Names of rows drawn, of as many classes as there are."""
    drawn = rows.iloc[np.random.default_rng(seed).permutation(len(rows))]
    if column in drawn:
        firsts = drawn[~drawn[column].duplicated()]
        drawn = drawn.loc[[*firsts.index, *drawn.index.difference(firsts.index, sort=False)]]
    return [str(name) for name in drawn["id"].head(_QUERIES)]
