"""What is said of a gallery's pictures in words, and the search in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retrieval.schema import LABEL, PREDICTED
from retrieval.tfidf import TfidfIndex, default_weights
from vitrail.errors import UserError

if TYPE_CHECKING:
    from retrieval.gallery import Gallery

WordSource = Literal["predicted", "label", "caption"]
"""What the words are: a model's answers, the true labels, or the captions of the data."""


class RankedRows(NamedTuple):
    """Rows of a gallery, best first.

    Attributes:
        rows: int64 ``(n,)``, places of pictures in the gallery's order.
        scores: float32 ``(n,)``.
        notes: what a person should know of it, one line each.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    notes: list[str]


class GalleryWords:
    """Ranks the pictures of a gallery by TF-IDF.

    Args:
        gallery: whose pictures are ranked.
        source: what the words are.
        words_gallery: another gallery of the same pictures that the words are taken from, joined by id; a picture
            whose content is another there gets no words.
        weights: of fields (task names, or ``caption``) that are not to have their default ones.

    Attributes:
        ids: of the gallery's pictures, in its order.
        notes: what a person should know of the words, one line each.

    Raises:
        UserError: if there are no such words or fields, or the galleries share no picture, or only ids.
    """

    def __init__(
        self,
        gallery: Gallery,
        source: WordSource,
        words_gallery: Gallery | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        speaker = gallery if words_gallery is None else words_gallery
        columns = _columns(speaker, source)
        table = speaker.table(["id", *columns.values()])
        texts = {field: table.column(column).to_pylist() for field, column in columns.items()}
        self.ids: list[str] = table.column("id").to_pylist()
        self.notes: list[str] = []
        if words_gallery is not None:
            places, self.notes = _joined(gallery, words_gallery)
            self.ids = gallery.table(["id"]).column("id").to_pylist()
            texts = {
                field: [None if place is None else column[place] for place in places] for field, column in texts.items()
            }
        self._index = TfidfIndex(texts, _checked_weights(list(columns), weights or {}))
        self._row_of = {identifier: row for row, identifier in enumerate(self.ids)}

    def rows_of(self, ids: list[str]) -> NDArray[np.int64]:
        """Places of pictures, int64 ``(n,)``, of ids that are there."""
        return np.array([self._row_of[identifier] for identifier in ids], dtype=np.int64)

    def by_text(self, text: str, allowed: NDArray[np.int64] | None) -> RankedRows:
        """Pictures that share a word with a text.

        Args:
            text: the query.
            allowed: rows that may be found; all by default.
        """
        matches = self._index.match(text)
        notes = [f"no picture has the word {word!r} or one that ends so" for word in matches.unknown]
        if len(notes) > 1:
            notes = [f"no picture has any of the words {', '.join(matches.unknown)}"]
        notes += [f"{asked!r} is read as {' or '.join(found)}" for asked, found in matches.read_as.items()]
        if not matches.scores.any():
            notes = ["no word of the query is known: " + (", ".join(matches.unknown) or "it has none")]
        return _ranked(matches.scores, allowed, [*notes, *self.notes])

    def like(self, identifier: str, allowed: NDArray[np.int64] | None) -> RankedRows:
        """Pictures of which similar things are said as of one of them, without itself.

        Args:
            identifier: id of a picture that is there.
            allowed: rows that may be found; all by default.
        """
        row = self._row_of[identifier]
        scores = self._index.like(row)
        notes = [] if scores.any() else [f"nothing is said of {identifier} in words"]
        scores[row] = 0
        return _ranked(scores, allowed, [*notes, *self.notes])


def _joined(gallery: Gallery, words_gallery: Gallery) -> tuple[list[int | None], list[str]]:
    """Where the words of each picture of a gallery stand in another one, None for nowhere; and notes.

    Ids are what users call their pictures, and two data sets may both have a ``00001.jpg``. So contents are compared.

    Raises:
        UserError: where the galleries have no picture in common.
    """
    own, theirs = (one.table(["id", "content"]) for one in (gallery, words_gallery))
    there = zip(theirs.column("id").to_pylist(), theirs.column("content").to_pylist(), strict=True)
    known = {identifier: (place, content) for place, (identifier, content) in enumerate(there)}
    places: list[int | None] = []
    missing = other = unchecked = 0
    for identifier, content in zip(own.column("id").to_pylist(), own.column("content").to_pylist(), strict=True):
        place, told = known.get(identifier, (None, ""))
        missing += place is None
        if place is not None and content and told and content != told:
            place, other = None, other + 1
        elif place is not None and not (content and told):
            unchecked += 1
        places.append(place)
    if places and all(place is None for place in places):
        others = (
            f": {other:,} of the same ids are there, but their images are others (or were read from elsewhere: images "
            "in shards are told apart by their place)"
        )
        raise UserError(
            f"--words-gallery {words_gallery.uri}: has none of the pictures of {gallery.uri}{others if other else ''}; "
            "name a gallery of the same data"
        )
    notes = []
    if missing:
        notes.append(f"{missing:,} of {len(places):,} pictures have no words in {words_gallery.uri}")
    if other:
        notes.append(
            f"{other:,} of {len(places):,} pictures have another content in {words_gallery.uri} under the same id; "
            "their words are left out"
        )
    if unchecked:
        notes.append(
            f"{unchecked:,} of {len(places):,} pictures are joined with {words_gallery.uri} by id alone: their content "
            "is not known to both galleries"
        )
    return places, notes


def _ranked(scores: NDArray[np.float32], allowed: NDArray[np.int64] | None, notes: list[str]) -> RankedRows:
    rows = np.flatnonzero(scores) if allowed is None else np.sort(allowed)[scores[np.sort(allowed)] != 0]
    order = rows[np.argsort(-scores[rows], kind="stable")]
    return RankedRows(order, scores[order], notes)


def _columns(gallery: Gallery, source: WordSource) -> dict[str, str]:
    """The columns that hold the words, by field."""
    if source == "caption":
        return {"caption": "caption"}
    prefix, tasks = (
        (PREDICTED, list(gallery.identity.predicts)) if source == "predicted" else (LABEL, gallery.identity.labels)
    )
    if tasks:
        return {task: f"{prefix}{task}" for task in tasks}
    what = "its model predicts nothing" if source == "predicted" else "its data have no labels"
    raise UserError(
        f"{gallery.uri}: has no words to search, because {what}; choose other ones with --words, name a gallery that "
        "has some with --words-gallery, or use --ranker clip"
    )


def _checked_weights(fields: list[str], given: Mapping[str, float]) -> dict[str, float]:
    for field, weight in given.items():
        if field not in fields:
            raise UserError(f"--weight {field}: there is no such field; there are {', '.join(fields)}")
        if not 0 < weight < float("inf"):
            raise UserError(f"--weight {field}={weight}: must be above 0")
    return {**default_weights(fields), **given}
