"""Search as the application offers it: rankers, filters by value, pages of results, and words that nothing matches.

Vectors always have a nearest one, so a search by text may have found only what is least unlike. A word of the query
that an image shows should have a higher best similarity than ``OTHER_WORDS``, things that hardly any gallery shows.
So each word is compared with these, alone in short sentences (``_FORMS``), which models know better than keywords;
where it is not among the best, the query is compared with the query with another word in its place. The p-value is

    p = (1 + number of other words with at least the same best similarity) / (1 + number of other words)

and where both are above ``ALPHA`` the word is called unmatched. No captions are needed, and keywords are welcome.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from app.logic.uploads import one_at_a_time, read_pixels
from app.state.context import SingleFlightCache, shortened
from retrieval.search.searcher import FORMER_RANKERS, Query, Ranker, Searcher
from retrieval.search.text import TEXT_FIELDS, TextSource, raw_words, words
from vitrail.errors import UserError

if TYPE_CHECKING:
    from app.state.context import AppContext, Limits
    from app.state.galleries import ServedGallery
    from app.state.runs import ServedRun

ALPHA = 0.2
"""Share of other words that may fit as well as a word that is matched."""

_FORMS = ("a photo of a {}", "an image of one {}")
"""Sentences whose mean embedding stands for a word; two, because a weak model's embeddings are noisy."""

OTHER_WORDS = (
    "accordion", "anvil", "balcony", "beehive", "cactus", "canoe", "chimney", "dinosaur", "dolphin", "drawbridge",
    "escalator", "glacier", "gondola", "harpsichord", "helicopter", "igloo", "jellyfish", "lighthouse", "lobster",
    "octopus", "pagoda", "parachute", "peacock", "penguin", "pyramid", "saxophone", "scorpion", "sledge",
    "submarine", "telescope", "tractor", "trombone", "tuba", "unicycle", "volcano", "walrus", "waterfall",
    "windmill", "xylophone", "zeppelin",
)  # fmt: skip
"""What words of a query are replaced by; those that the gallery has in captions or labels are left out."""

_ABOUT = {"photo", "photos", "photograph", "photography", "image", "images", "picture", "pictures", "something"}
"""Words that hold for every image."""

_OTHERS, _MOST_WORDS = 29, 6
"""Other words, and words of a query that are tested."""

RANKERS: dict[Ranker, str] = {"vector": "vectors", "text": "text", "hybrid": "both"}
"""Rankers, and what people call them."""

SCORES: dict[Ranker, str] = {"vector": "cosine", "text": "cosine of text", "hybrid": "fused ranks"}
"""What a ranker's score is."""

_OTHER = "gallery:"
"""Prefix of text fields that are another gallery's predictions for the same images."""


@dataclass(frozen=True)
class OtherWords:
    """Words that a gallery does not show, and of each the best similarity to its images, float64 ``(N,)``."""

    words: list[str]
    best: NDArray[np.float64]

    def p_value(self, best: float, others: NDArray[np.float64] | None = None) -> float:
        """Return the p-value of a word; ``others`` are the similarities of other words in its place."""
        as_good = ((self.best if others is None else others) >= best).sum()
        return float((1 + as_good) / (1 + len(self.words)))


def other_words(gallery: ServedGallery) -> OtherWords | None:
    """Return what words of queries are compared with; None where no served model encodes text for the gallery."""
    chosen = words_not_shown(gallery)
    if gallery.run is None or not gallery.identity.encodes_text or not chosen or not len(gallery):
        return None
    return OtherWords(chosen, _best_similarities(gallery, chosen))


def unmatched_words(gallery: ServedGallery, query: str, others: OtherWords | None) -> list[str]:
    """Return the words of a query that no image of a gallery matches better than other words.

    Args:
        gallery: that is searched.
        query: what is looked for.
        others: of the gallery (``other_words``).
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    tested = [word for word in dict.fromkeys(raw_words(query)) if word not in ENGLISH_STOP_WORDS | _ABOUT][:_MOST_WORDS]
    if others is None or not tested:
        return []
    alone = _best_similarities(gallery, tested).tolist()
    doubtful = [word for word, best in zip(tested, alone, strict=True) if others.p_value(best) > ALPHA]
    return [word for word in doubtful if _in_context(gallery, query, word, others) > ALPHA]


def _in_context(gallery: ServedGallery, query: str, word: str, others: OtherWords) -> float:
    """The p-value of a word in its place in the query."""
    pattern = re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE)
    texts = [query, *(pattern.sub(other, query) for other in others.words)]
    best = _best_similarities(gallery, texts)
    return others.p_value(float(best[0]), best[1:])


def _best_similarities(gallery: ServedGallery, texts: Sequence[str]) -> NDArray[np.float64]:
    """Best cosine of each text's mean embedding to the images of a gallery, float64 ``(N,)``."""
    assert gallery.run is not None
    vectors = gallery.run.encode_labels([[form.format(text) for form in _FORMS] for text in texts])
    return np.array([hits[0].score for hits in gallery.gallery.nearest(vectors, 1)], np.float64)


def words_not_shown(gallery: ServedGallery) -> list[str]:
    """Return words that none of a gallery's captions, labels and predictions has."""
    captions = gallery.metadata.column("caption").unique().to_pylist()
    shown = {word for caption in captions for word in words(caption or "")}
    for values in gallery.choices.values():
        shown.update(word for value in values for word in words(value))
    return [word for word in OTHER_WORDS if word not in shown][:_OTHERS]


@dataclass(frozen=True)
class Request:
    """One page of one search. It comes from a browser, so nothing of it is trusted.

    Attributes:
        gallery: name of the gallery.
        query: what is looked for.
        ranker: empty for the one that suits gallery and query.
        fields: text fields that are searched, one of ``text_fields``; empty for the first of them.
        filters: by name (``class``, ``split`` …) the values of which an image has one; a name without values is none.
        count: results on a page.
        page: from 1.
    """

    gallery: str
    query: Query
    ranker: str = ""
    fields: str = ""
    filters: Mapping[str, Sequence[str]] = field(default_factory=dict)
    count: int = 20
    page: int = 1


@dataclass(frozen=True)
class Result:
    """An image that was found, its rank from 1, its score, and its metadata by column."""

    sample_id: str
    rank: int
    score: float
    row: Mapping[str, Any]


@dataclass(frozen=True)
class ResultPage:
    """A page of results.

    Attributes:
        request: what was asked.
        ranker: that ranked.
        results: best first; empty where nothing matches.
        top: score of the best result of all pages, None where there is none.
        more: whether there is another page.
        fitting: images of the gallery that fit the filters.
        notes: what a person should know, one line each.
        unmatched: words of the query that no image matches.
        seconds: that the search took.
    """

    request: Request
    ranker: Ranker
    results: list[Result]
    top: float | None
    more: bool
    fitting: int
    notes: list[str]
    unmatched: list[str]
    seconds: float

    @property
    def mean(self) -> float | None:
        """Mean score of the results on this page, None where there is none."""
        return float(np.mean([result.score for result in self.results])) if self.results else None


class Searching:
    """Searches in all galleries; ready for the first query once it is made."""

    def __init__(self, context: AppContext) -> None:
        self._context = context
        self._text_fields = {name: self._text_fields_of(gallery) for name, gallery in context.galleries.items()}
        count = sum(max(1, len(choices)) for choices in self._text_fields.values())
        self._searchers: SingleFlightCache[Searcher] = SingleFlightCache(count)
        self._others: dict[str, OtherWords | None] = {}
        for name, gallery in context.galleries.items():
            _warm_up(gallery)
            self._others[name] = other_words(gallery)
            if choices := self._text_fields[name]:
                self._searcher(gallery, next(iter(choices))).text_index()

    def text_fields(self, gallery: str) -> dict[str, str]:
        """Return the text fields that can be searched, best first, and what people call them."""
        return self._text_fields[self._context.gallery(gallery).name]

    def rankers(self, gallery: str, kind: str) -> list[Ranker]:
        """Return the rankers for a query of a kind (``text``, ``image`` or ``like``), the one that suits best first."""
        served = self._context.gallery(gallery)
        by_vectors = kind == "like" or (served.run is not None and (kind == "image" or served.identity.encodes_text))
        by_text = kind != "image" and bool(self.text_fields(gallery))
        able: dict[Ranker, bool] = {"vector": by_vectors, "text": by_text, "hybrid": by_vectors and by_text}
        return [ranker for ranker in RANKERS if able[ranker]]

    def search(self, request: Request) -> ResultPage:
        """Return one page of results; raise ``UserError`` for a request that cannot be answered, with a hint."""
        begin = time.perf_counter()
        gallery = self._context.gallery(request.gallery)
        first = _first_result(request, self._context.limits)
        fitting = gallery.fitting(request.filters)
        ranker = self._ranker(request)
        if request.query.like is not None:
            gallery.place(request.query.like)
        # One more shows whether there is another page.
        found = self._searcher(gallery, self._fields(request)).rank_all(
            [request.query],
            first + request.count + 1,
            ranker,
            fitting if len(fitting) < len(gallery) else "",
        )[0]
        hits = found.hits[first : first + request.count]
        rows = gallery.rows([hit.id for hit in hits])
        text = request.query.text if ranker == "vector" and found.hits and request.page == 1 else None
        return ResultPage(
            request=request,
            ranker=ranker,
            results=[
                Result(hit.id, rank, float(hit.score), row)
                for rank, (hit, row) in enumerate(zip(hits, rows, strict=True), start=first + 1)
            ],
            top=float(found.hits[0].score) if found.hits else None,
            more=len(found.hits) > first + request.count,
            fitting=len(fitting),
            notes=list(dict.fromkeys(found.notes)),
            unmatched=[] if text is None else unmatched_words(gallery, text, self._others[gallery.name]),
            seconds=time.perf_counter() - begin,
        )

    def _ranker(self, request: Request) -> Ranker:
        kind = kind_of(request.query)
        able = self.rankers(request.gallery, kind)
        asked = FORMER_RANKERS.get(request.ranker, request.ranker)
        if able and not asked:
            return able[0]
        for ranker in able:
            if ranker == asked:
                return ranker
        if asked and asked not in RANKERS:
            raise UserError(f"ranker: must be one of {', '.join(RANKERS)}; got {shortened(asked, 40)!r}")
        raise UserError(_cannot(self._context.gallery(request.gallery), kind, able))

    def _fields(self, request: Request) -> str:
        choices = self.text_fields(request.gallery)
        if request.fields and request.fields not in choices:
            raise UserError(f"text fields: {request.gallery} has no {shortened(request.fields)!r}; choose others")
        return request.fields or next(iter(choices), "predicted")

    def _searcher(self, gallery: ServedGallery, fields: str) -> Searcher:
        def make() -> Searcher:
            run, limits = gallery.run, self._context.limits
            load = None if run is None else lambda: _Encoder(run, limits)
            if fields.startswith(_OTHER):
                other = self._context.galleries[fields.removeprefix(_OTHER)].gallery
                return Searcher(gallery.gallery, load, text_gallery=other)
            return Searcher(gallery.gallery, load, text_source=cast("TextSource", fields))

        return self._searchers.get((gallery.name, fields), make)

    def _text_fields_of(self, gallery: ServedGallery) -> dict[str, str]:
        identity = gallery.identity
        own = {"predicted": TEXT_FIELDS["predicted"]} if identity.worded(identity.predicts) else {}
        others = {
            f"{_OTHER}{name}": f"labels predicted by the model of {name}"
            for name, other in self._context.galleries.items()
            if other is not gallery and other.identity.worded(other.identity.predicts) and gallery.shares_images(other)
        }
        labels = {"label": TEXT_FIELDS["label"]} if identity.worded(identity.labels) else {}
        both = {"all": TEXT_FIELDS["all"]} if own and labels else {}
        has_captions = any(gallery.metadata.column("caption").unique().to_pylist())
        return both | own | others | labels | ({"caption": TEXT_FIELDS["caption"]} if has_captions else {})


def kind_of(query: Query) -> str:
    """Return ``text``, ``image`` or ``like``."""
    return "text" if query.text is not None else "image" if query.image is not None else "like"


class _Encoder:
    """The model of a gallery's run; images are read as every upload is."""

    def __init__(self, run: ServedRun, limits: Limits) -> None:
        self._run, self._limits = run, limits
        self.encode_texts, self.reading = run.encode_texts, run.reading

    def encode_image(self, path: Path) -> NDArray[np.float32]:
        with one_at_a_time:
            prepared = self._run.prepared(read_pixels(path, self._limits, self._run.value_range))
        vector: NDArray[np.float32] = self._run.encode_images([prepared])[0]
        return vector


def _warm_up(gallery: ServedGallery) -> None:
    """Read all vectors and use the model once, so that the first person who searches does not wait for either."""
    if len(gallery):
        direction = np.zeros((1, gallery.identity.dim), np.float32)
        direction[0, 0] = 1
        gallery.gallery.nearest(direction, 1)
    if gallery.run is not None and gallery.identity.encodes_text:
        gallery.run.encode_texts(["a"])


def _first_result(request: Request, limits: Limits) -> int:
    """Number of results before the page."""
    if not 1 <= request.count <= limits.results:
        raise UserError(f"results: {request.count} on a page; choose 1 to {limits.results}")
    first = (request.page - 1) * request.count
    if request.page < 1 or first > limits.offset:
        raise UserError(f"page {request.page}: at most {limits.offset:,} results can be shown; make the query narrower")
    return first


def _cannot(gallery: ServedGallery, kind: str, able: Sequence[Ranker]) -> str:
    """Why a gallery cannot answer such a query with the ranker that was chosen."""
    name, model = gallery.name, gallery.identity.task
    hint = f"choose {' or '.join(RANKERS[ranker] for ranker in able)}" if able else "choose another gallery"
    if kind == "image":
        reason = "an uploaded image has no text" if able else "the run that made the gallery is not served"
    elif kind == "text" and not gallery.identity.encodes_text:
        reason = f"its model ({model}) has no text encoder" + ("" if able else ", and there are no text fields")
    elif kind == "text" and gallery.run is None:
        reason = "the run that made the gallery is not served"
    else:
        reason = "its images have no text fields"
    return f"gallery {name}: {reason}; {hint}"
