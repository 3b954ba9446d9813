"""Search as the application offers it: who can rank what, filters by value, pages of results with their scores.

Whether a search by words found something, or only what is least unlike: vectors always have a nearest one.

The gallery's own captions are the measure. Each of them has an image it belongs to, so a query that fits should be as
similar to its best image as captions are to theirs. The conformal p-value of the hypothesis that the query is one
more caption of the gallery is

    p = (1 + number of captions that are at most as similar to their best image) / (1 + number of captions)

and where p ≤ ``ALPHA`` the match is called weak. Captions of training images are left out where there are others: the
model knows them by heart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from app.logic.uploads import one_at_a_time, read_pixels
from retrieval.search.searcher import Query, Ranker, Searcher, SearchResult
from retrieval.search.text import WordSource
from vitrail.errors import UserError

if TYPE_CHECKING:
    from app.state.context import AppContext, Limits
    from app.state.galleries import ServedGallery
    from app.state.runs import ServedRun
    from retrieval.search.searcher import Reading


ALPHA = 0.05
"""Share of the gallery's own captions that would be called weak."""

FEWEST, MOST = 19, 128
"""Captions with which a p-value can be as low as ``ALPHA``, and those that are compared with."""

_AT_A_TIME = 32


class WeakMatches:
    """Best cosines of captions.

    Args:
        usual: float32 ``(N,)``, of each caption that of its most similar image.
    """

    def __init__(self, usual: NDArray[np.float32]) -> None:
        self._usual = np.sort(usual)

    @classmethod
    def of(cls, gallery: ServedGallery) -> WeakMatches:
        """Captions of a gallery, evenly spread over it; none where it has none, or its model is not served."""
        captions = _captions(gallery)
        if gallery.run is None or not gallery.identity.encodes_text or len(captions) < FEWEST:
            return cls(np.zeros(0, np.float32))
        chunks = [captions[start : start + _AT_A_TIME] for start in range(0, len(captions), _AT_A_TIME)]
        vectors = np.concatenate([gallery.run.encode_texts(chunk) for chunk in chunks])
        return cls(np.array([hits[0].score for hits in gallery.gallery.nearest(vectors, 1)], np.float32))

    def weakness(self, top: float) -> str:
        """Why a query whose best image has this cosine found rather nothing; empty where it may have."""
        count = len(self._usual)
        if count < FEWEST:
            return ""
        p_value = (1 + int(np.searchsorted(self._usual, top, side="right"))) / (1 + count)
        if p_value > ALPHA:
            return ""
        return (
            f"Nearly all of the gallery's own captions are more similar to their best image "
            f"(p = {p_value:.3f} beside {count} of them)."
        )


def _captions(gallery: ServedGallery) -> list[str]:
    columns = gallery.metadata
    texts, splits = columns.column("caption").to_pylist(), columns.column("split").to_pylist()
    unseen = dict.fromkeys(text for text, split in zip(texts, splits, strict=True) if text and split != "train")
    distinct = list(unseen if len(unseen) >= FEWEST else dict.fromkeys(text for text in texts if text))
    places = np.unique(np.linspace(0, len(distinct) - 1, min(MOST, len(distinct))).astype(np.int64))
    return [distinct[place] for place in places.tolist()]


RANKERS: dict[Ranker, str] = {"clip": "vectors", "tfidf": "words", "hybrid": "both"}
"""Rankers, and what people call them."""

SCORES: dict[Ranker, str] = {"clip": "cosine", "tfidf": "cosine of words", "hybrid": "fused ranks"}
"""What a ranker's score is."""

_OTHER = "gallery:"
"""Words that another gallery's model says of the same images: this, and the gallery's name."""


@dataclass(frozen=True)
class Request:
    """One page of one search. It comes from a browser, so nothing of it is trusted.

    Attributes:
        gallery: name of the gallery.
        query: what is looked for.
        ranker: empty for the one that suits gallery and query.
        words: what is searched in by words, one of ``word_choices``; empty for the first of them.
        filters: by name (``class``, ``split`` …) the values of which an image has one; a name without values is none.
        count: results on a page.
        page: from 1.
    """

    gallery: str
    query: Query
    ranker: str = ""
    words: str = ""
    filters: Mapping[str, Sequence[str]] = field(default_factory=dict)
    count: int = 20
    page: int = 1


@dataclass(frozen=True)
class Result:
    """An image that was found.

    Attributes:
        sample_id: in the gallery.
        rank: from 1.
        score: of the ranker.
        row: what is said of it, by column of the gallery's metadata.
    """

    sample_id: str
    rank: int
    score: float
    row: Mapping[str, Any]


@dataclass(frozen=True)
class ResultPage:
    """A page of results.

    Attributes:
        request: what was asked.
        ranker: who ranked.
        results: best first; empty where nothing matches.
        top: score of the best result of all pages, None where there is none.
        more: whether there is another page.
        fitting: images of the gallery that fit the filters.
        notes: what a person should know of it, one line each.
        weakness: why these are rather no match, empty where they may be one.
        seconds: that the search took.
    """

    request: Request
    ranker: Ranker
    results: list[Result]
    top: float | None
    more: bool
    fitting: int
    notes: list[str]
    weakness: str
    seconds: float

    @property
    def mean(self) -> float | None:
        """Mean score of the results on this page, None where there is none."""
        return float(np.mean([result.score for result in self.results])) if self.results else None


class Searching:
    """Searches in all galleries; ready for the first query once it is made.

    Args:
        context: what is served.
    """

    def __init__(self, context: AppContext) -> None:
        self._context = context
        self._searchers: dict[tuple[str, str], Searcher] = {}
        self._lock = threading.Lock()
        self._word_choices = {name: self._words_of(gallery) for name, gallery in context.galleries.items()}
        self._weak: dict[str, WeakMatches] = {}
        for name, gallery in context.galleries.items():
            _warm(gallery)
            self._weak[name] = WeakMatches.of(gallery)
            if choices := self._word_choices[name]:
                words = next(iter(choices))
                self._searcher(gallery, words).prepare_words()

    def word_choices(self, gallery: str) -> dict[str, str]:
        """What can be searched in by words, best first, and what people call it; empty where there are no words.

        Raises:
            UserError: for a gallery that is not served.
        """
        return self._word_choices[self._context.gallery(gallery).name]

    def rankers(self, gallery: str, kind: str) -> list[Ranker]:
        """Who can rank, the one that suits best first.

        Args:
            gallery: name.
            kind: ``text``, ``image`` or ``like``.

        Raises:
            UserError: for a gallery that is not served.
        """
        served = self._context.gallery(gallery)
        vectors = kind == "like" or (served.run is not None and (kind == "image" or served.identity.encodes_text))
        words = kind != "image" and bool(self.word_choices(gallery))
        able = {"clip": vectors, "tfidf": words, "hybrid": vectors and words}
        return [ranker for ranker in RANKERS if able[ranker]]

    def search(self, request: Request) -> ResultPage:
        """One page of results.

        Raises:
            UserError: for whatever cannot be answered, with a fix.
        """
        begin = time.perf_counter()
        gallery = self._context.gallery(request.gallery)
        first = _checked_page(request, self._context.limits)
        fitting = gallery.fitting(request.filters)
        ranker = self._ranker(request)
        like = request.query.like
        if like is not None:
            gallery.place(like)
        # One more tells whether there is another page.
        found = self._searcher(gallery, self._words(request)).rank_all(
            [request.query], first + request.count + 1, ranker, fitting if len(fitting) < len(gallery) else ""
        )[0]
        hits = found.hits[first : first + request.count]
        rows = gallery.rows([hit.id for hit in hits])
        results = [
            Result(hit.id, first + place, float(hit.score), row)
            for place, (hit, row) in enumerate(zip(hits, rows, strict=True), start=1)
        ]
        return ResultPage(
            request=request,
            ranker=ranker,
            results=results,
            top=float(found.hits[0].score) if found.hits else None,
            more=len(found.hits) > first + request.count,
            fitting=len(fitting),
            notes=list(dict.fromkeys(found.notes)),
            weakness=self._weakness(request, found),
            seconds=time.perf_counter() - begin,
        )

    def _weakness(self, request: Request, found: SearchResult) -> str:
        """Why the best result is hardly one; only cosines of texts are known well enough for that."""
        if found.ranker != "clip" or request.query.text is None or not found.hits:
            return ""
        return self._weak[request.gallery].weakness(float(found.hits[0].score))

    def _ranker(self, request: Request) -> Ranker:
        kind = kind_of(request.query)
        able = self.rankers(request.gallery, kind)
        if not request.ranker and able:
            return able[0]
        for ranker in able:
            if ranker == request.ranker:
                return ranker
        if request.ranker and request.ranker not in get_args(Ranker):
            raise UserError(f"ranker {request.ranker[:40]!r}: is unknown; choose one of {', '.join(RANKERS.values())}")
        raise UserError(_cannot(self._context.gallery(request.gallery), kind, able))

    def _words(self, request: Request) -> str:
        choices = self.word_choices(request.gallery)
        if request.words and request.words not in choices:
            raise UserError(f"words {request.words[:80]!r}: {request.gallery} has none of these; choose others")
        return request.words or next(iter(choices), "predicted")

    def _searcher(self, gallery: ServedGallery, words: str) -> Searcher:
        with self._lock:
            key = (gallery.name, words)
            if key not in self._searchers:
                run, limits = gallery.run, self._context.limits
                other = (
                    self._context.galleries[words.removeprefix(_OTHER)].gallery if words.startswith(_OTHER) else None
                )
                source: WordSource = "predicted" if other is not None else cast("WordSource", words)
                load = None if run is None else lambda: _Encoder(run, limits)
                self._searchers[key] = Searcher(gallery.gallery, load, words=source, words_gallery=other)
            return self._searchers[key]

    def _words_of(self, gallery: ServedGallery) -> dict[str, str]:
        own = {"predicted": "what its model says"} if gallery.identity.predicts else {}
        others = {
            f"{_OTHER}{name}": f"what the model of {name} says"
            for name, other in self._context.galleries.items()
            if other is not gallery and other.identity.predicts and gallery.shares_images(other)
        }
        labels = {"label": "true labels"} if gallery.identity.labels else {}
        said = any(gallery.metadata.column("caption").unique().to_pylist())
        return own | others | labels | ({"caption": "captions"} if said else {})


def kind_of(query: Query) -> str:
    """``text``, ``image`` or ``like``."""
    return "text" if query.text is not None else "image" if query.image is not None else "like"


class _Encoder:
    """The model of a gallery's run; images are read as every upload is."""

    def __init__(self, run: ServedRun, limits: Limits) -> None:
        self._run, self._limits = run, limits

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        return self._run.encode_texts(texts)

    def encode_image(self, path: Path) -> NDArray[np.float32]:
        with one_at_a_time:
            prepared = self._run.prepared(read_pixels(path, self._limits, self._run.value_range))
        vector: NDArray[np.float32] = self._run.encode_images([prepared])[0]
        return vector

    def reading(self, text: str) -> Reading:
        return self._run.reading(text)


def _warm(gallery: ServedGallery) -> None:
    """Reads all vectors and uses the model once, so that the first person who searches does not wait for either."""
    if len(gallery):
        direction = np.zeros((1, gallery.identity.dim), np.float32)
        direction[0, 0] = 1
        gallery.gallery.nearest(direction, 1)
    if gallery.run is not None and gallery.identity.encodes_text:
        gallery.run.encode_texts(["a"])


def _checked_page(request: Request, limits: Limits) -> int:
    """Number of results before the page's first one."""
    if not 1 <= request.count <= limits.results:
        raise UserError(f"results: {request.count} on a page; choose 1 to {limits.results}")
    first = (request.page - 1) * request.count
    if request.page < 1 or first > limits.offset:
        raise UserError(
            f"page {request.page}: at most {limits.offset:,} results can be leafed through; say more exactly"
        )
    return first


def _cannot(gallery: ServedGallery, kind: str, able: Sequence[Ranker]) -> str:
    """Why a gallery cannot answer such a query with the ranker that was chosen."""
    name, model = gallery.name, gallery.identity.task
    use = f"choose {' or '.join(RANKERS[ranker] for ranker in able)}" if able else "choose another gallery"
    if kind == "image":
        reason = "an image from outside has no words" if able else "the run that made the gallery is not served"
    elif kind == "text" and not gallery.identity.encodes_text:
        reason = f"its model ({model}) does not read texts" + ("" if able else ", and says nothing in words")
    elif kind == "text" and gallery.run is None:
        reason = "the run that made the gallery is not served"
    else:
        reason = "nothing is said of its images in words"
    return f"gallery {name}: {reason}; {use}"
