"""Searching a gallery: rankers by name, for texts, images, and images like one that is there.

``clip`` ranks by the cosine of a dual encoder's vectors (or, between images, of any model's), ``tfidf`` by words,
``hybrid`` fuses both. Equal scores keep the order of the gallery.

Vectors of queries: texts and images are encoded by the model that made the gallery, its own images looked up.

Reciprocal-rank fusion: one ranking out of several whose scores do not compare.

Cormack, Clarke & Büttcher, Reciprocal rank fusion outperforms Condorcet and individual rank learning methods, SIGIR
2009: an item's score is the sum over rankings of 1 / (k + rank), with k = 60 and ranks from 1. An item that a ranking
does not hold gets nothing from it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from retrieval.gallery import Gallery, Where
from retrieval.schema import CaptionHit, Hit
from retrieval.search.text import GalleryWords, RankedRows, WordSource
from vitrail.errors import UserError


class Reading(NamedTuple):
    """What a text tower makes of a text.

    Attributes:
        known: number of tokens that it has learned, special ones left out.
        unknown: parts of the text that it has no token for.
        unread: the end of the text that is too much for it, empty where all is read.
    """

    known: int
    unknown: list[str]
    unread: str


class Encoder(Protocol):
    """The model that made a gallery's vectors, for new texts and images."""

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        """Vectors ``(Q, D)`` of unit length."""

    def encode_image(self, path: Path) -> NDArray[np.float32]:
        """Vector ``(D,)`` of unit length."""

    def reading(self, text: str) -> Reading:
        """What is read of a text."""


class QueryVectors:
    """Makes vectors of queries; the model is loaded when it is first needed.

    Args:
        gallery: that is searched.
        load_encoder: gives the model that made it.
    """

    def __init__(self, gallery: Gallery, load_encoder: Callable[[], Encoder] | None) -> None:
        self._gallery = gallery
        self._load_encoder = load_encoder
        self._encoder: Encoder | None = None

    def of(self, queries: Sequence[Query]) -> tuple[list[NDArray[np.float32] | None], list[list[str]]]:
        """Vectors and how the queries were read.

        Args:
            queries: Q of them; texts are encoded together.

        Returns:
            Of each query a vector ``(D,)`` of unit length, None for a text of which the model knows nothing; and notes
            for people, one line each.

        Raises:
            UserError: if there is no such image, or no model.
        """
        notes: list[list[str]] = [[] for _ in queries]
        vectors: list[NDArray[np.float32] | None] = [None for _ in queries]
        texts: dict[int, str] = {}
        for place, query in enumerate(queries):
            if query.text is not None:
                reading = self._encoder_now().reading(query.text)
                notes[place] = _notes_on(reading)
                if reading.known:
                    texts[place] = query.text
            elif query.image is not None:
                vectors[place] = self._encoder_now().encode_image(query.image)
            else:
                vectors[place] = self._gallery.vectors([str(query.like)])[0]
        if texts:
            encoded = self._encoder_now().encode_texts(list(texts.values()))
            for place, vector in zip(texts, encoded, strict=True):
                vectors[place] = vector
        return vectors, notes

    def _encoder_now(self) -> Encoder:
        if self._encoder is None:
            if self._load_encoder is None:
                raise UserError(f"{self._gallery.uri}: its model is needed to encode the query; name it with --run")
            self._encoder = self._load_encoder()
        return self._encoder


def _notes_on(reading: Reading) -> list[str]:
    if not reading.known:
        return [
            "the model's tokenizer knows nothing of the query: " + (", ".join(reading.unknown) or "it has no words")
        ]
    notes = []
    if reading.unknown:
        notes.append(f"the model's tokenizer does not know {', '.join(map(repr, reading.unknown))}")
    if reading.unread:
        notes.append(f"the model read only the beginning of the query, not {_shortened(reading.unread)!r}")
    return notes


def _shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


SMOOTHING = 60
"""The k of the paper: how little the first ranks stand out."""


def reciprocal_rank_fusion(
    rankings: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]], smoothing: int = SMOOTHING
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Fuse rankings.

    Items of a ranking with equal scores share the mean of their ranks, so that a ranking that cannot tell them apart
    does not order them by accident.

    Args:
        rankings: of each the items, distinct int64 ``(n,)``, and their scores, float32 ``(n,)``; higher is better.
        smoothing: the k of the formula.

    Returns:
        Items that any ranking holds, int64 ``(m,)``, best first, equal ones in ascending order, and their scores,
        float64 ``(m,)``.
    """
    items = np.concatenate([np.asarray(found, dtype=np.int64) for found, _ in rankings] or [np.zeros(0, np.int64)])
    shares = [1 / (smoothing + _mean_ranks(scores)) for _, scores in rankings]
    distinct, place = np.unique(items, return_inverse=True)
    # Summed in the order of the rankings, so the result is the same on every machine.
    sums = np.zeros(len(distinct))
    np.add.at(sums, place, np.concatenate(shares or [np.zeros(0)]))
    order = np.argsort(-sums, kind="stable")
    return distinct[order], sums[order]


def _mean_ranks(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Ranks from 1, highest score first; equal scores share the mean of theirs."""
    _, place, counts = np.unique(-np.asarray(scores), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: NDArray[np.float64] = (last - (counts - 1) / 2)[place]
    return mean


Ranker = Literal["clip", "tfidf", "hybrid"]

MAX_CHARACTERS = 2_000
"""Longer queries are refused: no text tower reads as much, and a pasted document is rather a mistake."""

FUSED_DEPTH = 1_000
"""So many of the nearest images take part in a fusion; the next one would add less than 1 / 1,060."""


@dataclass(frozen=True)
class Query:
    """What is looked for; exactly one is given.

    Attributes:
        text: some words.
        image: file of an image.
        like: id of an image of the gallery.
    """

    text: str | None = None
    image: Path | None = None
    like: str | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.text, self.image, self.like) if value is not None]
        if len(given) != 1:
            raise UserError(f"give exactly one of a text, --image and --like; there are {len(given)}")
        if self.text is None:
            return
        # Labels and captions are in NFC, what people type or paste need not be.
        object.__setattr__(self, "text", unicodedata.normalize("NFC", self.text))
        if not self.text.strip():
            raise UserError('the query is empty; say what to look for, for example "blue plastic bottle"')
        if len(self.text) > MAX_CHARACTERS:
            raise UserError(f"the query has {len(self.text):,} characters, {MAX_CHARACTERS:,} are allowed; shorten it")
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise UserError("the query is not valid UTF-8; type it anew") from error


@dataclass(frozen=True)
class SearchResult:
    """Images that answer a query, best first.

    Attributes:
        query: what was asked.
        ranker: who ranked.
        hits: id and score.
        notes: what a person should know of it, one line each.
    """

    query: Query
    ranker: Ranker
    hits: list[Hit]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CaptionResult:
    """Captions that answer a query, best first.

    Attributes:
        query: what was asked.
        hits: text, the image that it belongs to, and score.
        notes: what a person should know of it, one line each.
    """

    query: Query
    hits: list[CaptionHit]
    notes: list[str] = field(default_factory=list)


class Searcher:
    """Ranks the images of a gallery.

    Args:
        gallery: to search in.
        load_encoder: gives the model that made it; only called for a text or image that has to be encoded.
        words: what ``tfidf`` and ``hybrid`` search in.
        words_gallery: another gallery of the same images that has the words.
        weights: of the words' fields, where not the default ones.
    """

    def __init__(
        self,
        gallery: Gallery,
        load_encoder: Callable[[], Encoder] | None = None,
        *,
        words: WordSource = "predicted",
        words_gallery: Gallery | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.gallery = gallery
        self._vectors = QueryVectors(gallery, load_encoder)
        self._make_words: Callable[[], GalleryWords] = lambda: GalleryWords(gallery, words, words_gallery, weights)
        self._words: GalleryWords | None = None

    def default_ranker(self, query: Query) -> Ranker:
        """``clip`` where the gallery's vectors can answer, else ``tfidf``."""
        return "clip" if query.text is None or self.gallery.identity.encodes_text else "tfidf"

    def prepare_words(self) -> None:
        """Counts the words now instead of with the first query that needs them.

        Raises:
            UserError: if there are no such words.
        """
        self._words_now()

    def search(self, query: Query, top_k: int, ranker: Ranker | None = None, where: str = "") -> SearchResult:
        """Images that answer one query; see ``search_all``."""
        return self.search_all([query], top_k, ranker or self.default_ranker(query), where)[0]

    def search_all(self, queries: Sequence[Query], top_k: int, ranker: Ranker, where: str = "") -> list[SearchResult]:
        """Images that answer each of several queries.

        Args:
            queries: what is looked for.
            top_k: how many images each, 1 or more.
            ranker: who ranks.
            where: only images that fit this filter.

        Raises:
            UserError: if the gallery cannot answer such a query, or an argument is wrong.
        """
        answers = self.rank_all(queries, top_k, ranker, where)
        # Counted once: with a filter that means a look at the whole table.
        there = self._count(where) if any(len(answer.hits) < top_k for answer in answers) else top_k
        return [
            replace(answer, notes=[*answer.notes, *self._shortage(len(answer.hits), top_k, there, where, answer.query)])
            for answer in answers
        ]

    def rank_all(self, queries: Sequence[Query], top_k: int, ranker: Ranker, where: Where = "") -> list[SearchResult]:
        """As ``search_all``, without a note on why there are fewer images than were asked for.

        ``where`` may give the places of the images that may be found, too.
        """
        self._check(queries, top_k, ranker)
        if ranker == "clip":
            found = self._nearest(queries, top_k, where)
        else:
            allowed = self._allowed(where)
            by_words = [self._by_words(query, allowed) for query in queries]
            found = [self._hits(ranked, top_k) for ranked in by_words]
            if ranker == "hybrid":
                nearest = self._nearest(queries, max(top_k, FUSED_DEPTH), where)
                found = [self._fused(*both, top_k) for both in zip(nearest, by_words, strict=True)]
        return [SearchResult(query, ranker, hits, notes) for query, (hits, notes) in zip(queries, found, strict=True)]

    def search_captions(self, query: Query, top_k: int, where: str = "") -> CaptionResult:
        """Captions that fit an image or a text, each text once.

        Args:
            query: what they are to fit.
            top_k: how many, 1 or more.
            where: only captions of images that fit this filter.

        Raises:
            UserError: if the gallery has no captions that can be compared, or an argument is wrong.
        """
        if not self.gallery.identity.encodes_text:
            raise UserError(
                f"{self.gallery.uri}: has no captions to find, because {self.gallery.identity.task} does not encode "
                "texts; use a gallery of a dual encoder"
            )
        self._check([query], top_k, "clip")
        (vector,), (notes,) = self._vectors.of([query])
        hits = [] if vector is None else self.gallery.nearest_captions(vector[None], top_k, where)[0]
        if vector is not None and len(hits) < top_k:
            count = f"there are only {len(hits):,} different captions" if hits else "no caption was found"
            notes = [*notes, count + (" of images that fit the filter" if where else "")]
        return CaptionResult(query, hits, notes)

    def _check(self, queries: Sequence[Query], top_k: int, ranker: Ranker) -> None:
        if ranker not in get_args(Ranker):
            raise UserError(f"--ranker {ranker}: is unknown; choose one of {', '.join(get_args(Ranker))}")
        if top_k < 1:
            raise UserError(f"--top-k {top_k}: must be 1 or more")
        if ranker != "clip" and any(query.image is not None for query in queries):
            raise UserError(f"--ranker {ranker}: an image from outside has no words; use --ranker clip")
        if ranker != "tfidf" and any(query.text is not None for query in queries):
            identity = self.gallery.identity
            if not identity.encodes_text:
                raise UserError(
                    f"{self.gallery.uri}: {identity.task} does not encode texts; use --ranker tfidf, or a gallery "
                    "of a dual encoder"
                )

    def _nearest(self, queries: Sequence[Query], top_k: int, where: Where) -> list[tuple[list[Hit], list[str]]]:
        """Nearest images by vector, and notes; never the image that was asked with."""
        vectors, notes = self._vectors.of(queries)
        asked = [vector for vector in vectors if vector is not None]
        one_more = int(any(query.like is not None for query in queries))
        found = iter(self.gallery.nearest(np.stack(asked), top_k + one_more, where) if asked else [])
        hits = [
            [] if vector is None else [hit for hit in next(found) if hit.id != query.like][:top_k]
            for query, vector in zip(queries, vectors, strict=True)
        ]
        return list(zip(hits, notes, strict=True))

    def _words_now(self) -> GalleryWords:
        if self._words is None:
            self._words = self._make_words()
        return self._words

    def _allowed(self, where: Where) -> NDArray[np.int64] | None:
        if isinstance(where, str):
            return self.gallery.places(where) if where else None
        return where

    def _by_words(self, query: Query, allowed: NDArray[np.int64] | None) -> RankedRows:
        words = self._words_now()
        if query.text is not None:
            return words.by_text(query.text, allowed)
        # The gallery says which id is unknown.
        self.gallery.rows([str(query.like)], ["id"])
        return words.like(str(query.like), allowed)

    def _hits(self, ranked: RankedRows, top_k: int) -> tuple[list[Hit], list[str]]:
        ids = self._words_now().ids
        best = zip(ranked.rows[:top_k].tolist(), ranked.scores[:top_k].tolist(), strict=True)
        return [Hit(ids[row], score) for row, score in best], ranked.notes

    def _fused(
        self, nearest: tuple[list[Hit], list[str]], by_words: RankedRows, top_k: int
    ) -> tuple[list[Hit], list[str]]:
        words, (hits, notes) = self._words_now(), nearest
        by_vector = words.rows_of([hit.id for hit in hits])
        scores = np.array([hit.score for hit in hits], dtype=np.float32)
        rows, sums = reciprocal_rank_fusion([(by_vector, scores), (by_words.rows, by_words.scores)])
        best = zip(rows[:top_k].tolist(), sums[:top_k].tolist(), strict=True)
        return [Hit(words.ids[row], score) for row, score in best], [*notes, *by_words.notes]

    def _count(self, where: str) -> int:
        return len(self.gallery.places(where)) if where else len(self.gallery)

    def _shortage(self, found: int, top_k: int, there: int, where: str, query: Query) -> list[str]:
        """Why there are fewer images than were asked for."""
        if found >= top_k:
            return []
        if not len(self.gallery):
            return ["the gallery is empty"]
        if not there:
            return ["no image fits the filter"]
        if found:
            others = " other" if query.like is not None else ""
            which = "fit the filter" if where else "are in the gallery"
            return [f"{top_k:,} were asked for, {found:,}{others} were found; {there:,} {which}"]
        return []
