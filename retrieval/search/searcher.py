"""Search in a gallery by text, by an image, or by an image of the gallery.

Rankers: ``vector`` ranks by the cosine of a dual encoder's vectors (or, between images, of any model's), ``text`` by
TF-IDF over text fields of the images, such as predicted labels, ``hybrid`` fuses both. Equal scores keep the order of
the gallery.

Queries are encoded by the model that made the gallery's vectors: loaded again from its run, or as the user names it.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from retrieval.gallery import Gallery, Where
from retrieval.schema import CaptionHit, Hit, ModelIdentity, shortened
from retrieval.search.text import RankedRows, TextIndex, TextSource
from vitrail.errors import UserError
from vitrail.files import local_folder
from vitrail.runs import Run, load_checkpoint, prepared_image
from vitrail.types import TextReading

Ranker = Literal["vector", "text", "hybrid"]

FORMER_RANKERS: dict[str, Ranker] = {"clip": "vector", "tfidf": "text"}
"""Names of rankers in version 0.1."""

MAX_CHARACTERS = 2_000
"""Longer queries are refused: no text encoder reads as much, and a pasted document is probably a mistake."""

FUSED_DEPTH = 1_000
"""Number of nearest images that take part in a fusion; the next one would add less than 1 / 1,060."""

SMOOTHING = 60
"""The k of reciprocal-rank fusion: how little the first ranks stand out."""


def current_ranker(name: str) -> str:
    """Return the current name of a ranker; one of version 0.1 is reported in a line on standard error."""
    if name not in FORMER_RANKERS:
        return name
    sys.stderr.write(f"warning: ranker {name} is now called {FORMER_RANKERS[name]}\n")
    return FORMER_RANKERS[name]


class Encoder(Protocol):
    """The model that made a gallery's vectors, for new texts and images."""

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        """Return vectors ``(Q, D)`` of unit length."""

    def encode_image(self, path: Path) -> NDArray[np.float32]:
        """Return a vector ``(D,)`` of unit length."""

    def reading(self, text: str) -> TextReading:
        """Return what the model's tokenizer reads of a text."""


@dataclass(frozen=True)
class Query:
    """What is searched for; exactly one is given.

    Attributes:
        text: a description.
        image: file of an image.
        like: id of an image of the gallery.
    """

    text: str | None = None
    image: Path | None = None
    like: str | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.text, self.image, self.like) if value is not None]
        if len(given) != 1:
            raise UserError(f"give exactly one of a text, --image and --like; got {len(given)}")
        if self.text is None:
            return
        # Labels and captions are in NFC, what people type or paste need not be.
        object.__setattr__(self, "text", unicodedata.normalize("NFC", self.text))
        if not self.text.strip():
            raise UserError('the query is empty; describe what to look for, for example "blue plastic bottle"')
        if len(self.text) > MAX_CHARACTERS:
            raise UserError(f"the query has {len(self.text):,} characters, {MAX_CHARACTERS:,} are allowed; shorten it")
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise UserError("the query is not valid UTF-8; type it again") from error


@dataclass(frozen=True)
class SearchResult:
    """Images that match a query, best first, with notes for the user, one line each."""

    query: Query
    ranker: Ranker
    hits: list[Hit]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CaptionResult:
    """Captions that match a query, best first, with notes for the user, one line each."""

    query: Query
    hits: list[CaptionHit]
    notes: list[str] = field(default_factory=list)


class Searcher:
    """Ranks the images of a gallery.

    Args:
        gallery: to search in.
        load_encoder: returns the model that made it; only called for a text or image that has to be encoded.
        text_source: which text fields ``text`` and ``hybrid`` search in.
        text_gallery: another gallery of the same images that has the text fields.
        weights: of text fields, where not the default ones.
    """

    def __init__(
        self,
        gallery: Gallery,
        load_encoder: Callable[[], Encoder] | None = None,
        *,
        text_source: TextSource = "predicted",
        text_gallery: Gallery | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.gallery = gallery
        self._load_encoder = load_encoder
        self._encoder: Encoder | None = None
        self._text_options = (text_source, text_gallery, weights)
        self._text: TextIndex | None = None

    def text_index(self) -> TextIndex:
        """Return the index of the text fields, built when first needed; ``UserError`` where there are none."""
        if self._text is None:
            self._text = TextIndex(self.gallery, *self._text_options)
        return self._text

    def default_ranker(self, query: Query) -> Ranker:
        """Return ``vector`` where the gallery's vectors can answer the query, else ``text``."""
        return "vector" if query.text is None or self.gallery.identity.encodes_text else "text"

    def search(self, query: Query, top_k: int, ranker: Ranker | None = None, where: str = "") -> SearchResult:
        """Find images for one query; see ``search_all``."""
        return self.search_all([query], top_k, ranker or self.default_ranker(query), where)[0]

    def search_all(self, queries: Sequence[Query], top_k: int, ranker: Ranker, where: str = "") -> list[SearchResult]:
        """Find images for each of several queries.

        Args:
            queries: what is searched for.
            top_k: how many images each, 1 or more.
            ranker: by which they are ranked.
            where: only images that fit this filter.

        Raises:
            UserError: if the gallery cannot answer such a query, or an argument is wrong.
        """
        results = self.rank_all(queries, top_k, ranker, where)
        if all(len(result.hits) >= top_k for result in results):
            return results
        available = len(self.gallery.places(where))
        return [replace(one, notes=[*one.notes, *self._shortage(one, top_k, available, where)]) for one in results]

    def rank_all(self, queries: Sequence[Query], top_k: int, ranker: Ranker, where: Where = "") -> list[SearchResult]:
        """Do as ``search_all``, without a note on why there are fewer images than requested.

        ``where`` may also be the places of the images that may be found.
        """
        self._check(queries, top_k, ranker)
        if ranker == "vector":
            found = self._nearest(queries, top_k, where)
        else:
            allowed = where if not isinstance(where, str) else self.gallery.places(where) if where else None
            by_text = [self._by_text(query, allowed) for query in queries]
            if ranker == "text":
                found = [(self._hits(ranked.rows, ranked.scores, top_k), ranked.notes) for ranked in by_text]
            else:
                nearest = self._nearest(queries, max(top_k, FUSED_DEPTH), where)
                found = [self._fused(*both, top_k) for both in zip(nearest, by_text, strict=True)]
        return [SearchResult(query, ranker, hits, notes) for query, (hits, notes) in zip(queries, found, strict=True)]

    def search_captions(self, query: Query, top_k: int, where: str = "") -> CaptionResult:
        """Find captions that match an image or a text, each text once.

        Args:
            query: what they are to match.
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
        self._check([query], top_k, "vector")
        (vector,), (notes,) = self._encode([query])
        hits = [] if vector is None else self.gallery.nearest_captions(vector[None], top_k, where)[0]
        if vector is not None and len(hits) < top_k:
            count = f"there are only {len(hits):,} different captions" if hits else "no caption was found"
            notes = [*notes, count + (" of images that fit the filter" if where else "")]
        return CaptionResult(query, hits, notes)

    def _check(self, queries: Sequence[Query], top_k: int, ranker: Ranker) -> None:
        if ranker not in get_args(Ranker):
            raise UserError(f"--ranker: must be one of {', '.join(get_args(Ranker))}; got {ranker!r}")
        if top_k < 1:
            raise UserError(f"--top-k: must be 1 or more; got {top_k}")
        if ranker != "vector" and any(query.image is not None for query in queries):
            raise UserError(f"--ranker {ranker}: an image file has no text fields; use --ranker vector")
        if ranker != "text" and any(query.text is not None for query in queries):
            identity = self.gallery.identity
            if not identity.encodes_text:
                raise UserError(
                    f"{self.gallery.uri}: {identity.task} does not encode texts; use --ranker text, or a gallery "
                    "of a dual encoder"
                )

    def _encode(self, queries: Sequence[Query]) -> tuple[list[NDArray[np.float32] | None], list[list[str]]]:
        """Vectors ``(D,)`` of queries, None for a text of which the model knows nothing, and notes on each query."""
        notes: list[list[str]] = [[] for _ in queries]
        vectors: list[NDArray[np.float32] | None] = [None for _ in queries]
        texts: dict[int, str] = {}
        for place, query in enumerate(queries):
            if query.text is not None:
                reading = self._loaded_encoder().reading(query.text)
                notes[place] = _notes_on(reading)
                if reading.known:
                    texts[place] = query.text
            elif query.image is not None:
                vectors[place] = self._loaded_encoder().encode_image(query.image)
            else:
                vectors[place] = self.gallery.vectors([str(query.like)])[0]
        if texts:
            encoded = self._loaded_encoder().encode_texts(list(texts.values()))
            for place, vector in zip(texts, encoded, strict=True):
                vectors[place] = vector
        return vectors, notes

    def _loaded_encoder(self) -> Encoder:
        if self._encoder is None:
            if self._load_encoder is None:
                raise UserError(f"{self.gallery.uri}: its model is needed to encode the query; name it with --run")
            self._encoder = self._load_encoder()
        return self._encoder

    def _nearest(self, queries: Sequence[Query], top_k: int, where: Where) -> list[tuple[list[Hit], list[str]]]:
        """Nearest images by vector, and notes; never the image of the query itself."""
        vectors, notes = self._encode(queries)
        known = [vector for vector in vectors if vector is not None]
        one_more = int(any(query.like is not None for query in queries))
        found = iter(self.gallery.nearest(np.stack(known), top_k + one_more, where) if known else [])
        hits = [
            [] if vector is None else [hit for hit in next(found) if hit.id != query.like][:top_k]
            for query, vector in zip(queries, vectors, strict=True)
        ]
        return list(zip(hits, notes, strict=True))

    def _by_text(self, query: Query, allowed: NDArray[np.int64] | None) -> RankedRows:
        if query.text is not None:
            return self.text_index().search(query.text, allowed)
        self.gallery.rows([str(query.like)], ["id"])  # raises an error for an unknown id
        return self.text_index().like(str(query.like), allowed)

    def _hits(self, rows: NDArray[np.int64], scores: NDArray[np.floating], top_k: int) -> list[Hit]:
        ids = self.text_index().ids
        return [Hit(ids[row], score) for row, score in zip(rows[:top_k].tolist(), scores[:top_k].tolist(), strict=True)]

    def _fused(
        self, nearest: tuple[list[Hit], list[str]], by_text: RankedRows, top_k: int
    ) -> tuple[list[Hit], list[str]]:
        hits, notes = nearest
        rows = self.text_index().rows_of([hit.id for hit in hits])
        scores = np.array([hit.score for hit in hits], dtype=np.float32)
        fused = reciprocal_rank_fusion([(rows, scores), (by_text.rows, by_text.scores)])
        return self._hits(*fused, top_k), [*notes, *by_text.notes]

    def _shortage(self, result: SearchResult, top_k: int, available: int, where: str) -> list[str]:
        """Why there are fewer images than requested."""
        if len(result.hits) >= top_k:
            return []
        if not len(self.gallery):
            return ["the gallery is empty"]
        if not available:
            return ["no image fits the filter"]
        if not result.hits:
            return []
        others = " other" if result.query.like is not None else ""
        which = "fit the filter" if where else "are in the gallery"
        return [
            f"{top_k:,} were requested, {len(result.hits):,}{others} were found; {available:,} {which}",
        ]


def _notes_on(reading: TextReading) -> list[str]:
    if not reading.known:
        unknown = ", ".join(reading.unknown) or "it has no words"
        return [f"the model's tokenizer knows nothing of the query: {unknown}"]
    notes = []
    if reading.unknown:
        notes.append(f"the model's tokenizer does not know {', '.join(map(repr, reading.unknown))}")
    if reading.unread:
        unread = reading.unread if len(reading.unread) <= 60 else f"{reading.unread[:60]}…"
        notes.append(f"the model reads only the beginning of the query, not {unread!r}")
    return notes


def reciprocal_rank_fusion(
    rankings: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Fuse rankings whose scores do not compare.

    An item's score is the sum over rankings of 1 / (``SMOOTHING`` + rank), with ranks from 1 (Cormack, Clarke &
    Büttcher, Reciprocal rank fusion outperforms Condorcet and individual rank learning methods, SIGIR 2009). A ranking
    adds nothing to an item that it lacks. Items with equal scores in a ranking share the mean of their ranks, so that
    their order in it is of no effect.

    Args:
        rankings: of each the items, distinct int64 ``(n,)``, and their scores, float32 ``(n,)``; higher is better.

    Returns:
        Items of all rankings, int64 ``(m,)``, best first, equal ones in ascending order, and their scores, float64
        ``(m,)``.
    """
    from scipy.stats import rankdata

    items = np.concatenate([np.zeros(0, np.int64), *(found for found, _ in rankings)])
    shares = np.concatenate([np.zeros(0), *(1 / (SMOOTHING + rankdata(-scores)) for _, scores in rankings)])
    distinct, place = np.unique(items, return_inverse=True)
    # Summed in the order of the rankings, so the result is the same on every machine.
    sums = np.zeros(len(distinct))
    np.add.at(sums, place, shares)
    order = np.argsort(-sums, kind="stable")
    return distinct[order], sums[order]


class QueryEncoder:
    """Encodes texts and images as the gallery's were; an ``Encoder`` of ``retrieval.search.searcher``.

    Args:
        task: a ``lightning_modules.VisionTask`` with the weights that made the gallery, on the device to compute on.
        identity: of the gallery, with the options by which images are prepared.
    """

    def __init__(self, task: Any, identity: ModelIdentity) -> None:
        self._task, self._identity = task, identity

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        """See ``Encoder``."""
        import torch

        self._check_texts()
        with torch.inference_mode():
            vectors: NDArray[np.float32] = self._task.encode_text(texts).float().cpu().numpy()
        return shortened(vectors, self._identity.dim)

    def encode_image(self, path: Path) -> NDArray[np.float32]:
        """See ``Encoder``; raises ``UserError`` if the image cannot be read."""
        import torch
        import torch.nn.functional as F

        if path.is_dir():
            raise UserError(f"--image {path}: is a folder; name a file")
        image = prepared_image(path, self._identity.input_options)
        encode = self._task.encode_image if self._identity.encodes_text else self._task.image_features
        with torch.inference_mode():
            features = encode(image[None].to(self._task.device)).float()
            vector = features if self._identity.encodes_text else F.normalize(features, dim=-1)
        found: NDArray[np.float32] = shortened(vector.cpu().numpy(), self._identity.dim)[0]
        return found

    def reading(self, text: str) -> TextReading:
        """See ``Encoder``."""
        self._check_texts()
        reading: TextReading = self._task.towers.tokenizer.reading(text)
        return reading

    def _check_texts(self) -> None:
        if not self._identity.encodes_text or self._task.towers.tokenizer is None:
            raise UserError(f"{type(self._task).__name__} does not encode texts; use --ranker text")


def load_encoder(
    gallery: Gallery, run: Path | None = None, checkpoint: Path | None = None, device: str = "cpu"
) -> QueryEncoder:
    """Load the model whose weights made a gallery.

    Args:
        gallery: names the weights and the run.
        run: where the run's directory is now, if it was moved.
        checkpoint: the very file, instead of a run.
        device: to compute on.

    Raises:
        UserError: if it does not exist, or has other weights.
    """
    files = [checkpoint] if checkpoint is not None else _checkpoints(gallery, run)
    for file in files:
        task = load_checkpoint(file, device)
        if task.weights_digest() == gallery.identity.weights:
            return QueryEncoder(task, gallery.identity)
    raise UserError(
        f"{files[0]}: has other weights than those that made {gallery.uri}, so its vectors do not compare; name the "
        "right one with --run or --checkpoint, or make a new gallery with this one"
    )


def _checkpoints(gallery: Gallery, run: Path | None) -> list[Path]:
    """Checkpoints of the run that may have made the gallery, the most likely first."""
    recorded = Path(gallery.identity.run)
    # A gallery inside of its run may have been moved with it.
    place = local_folder(gallery.uri)
    folders = [run] if run is not None else [recorded, *([place.parent] if place else [])]
    for folder in folders:
        files = [folder / name for name in (Run.BEST, Run.LAST)]
        if there := [file for file in files if file.is_file()]:
            return there
    if run is not None:
        raise UserError(f"--run {run}: has no checkpoints/best.ckpt; name the run that made {gallery.uri}")
    raise UserError(
        f"{gallery.uri}: its run {gallery.identity.run or '(unknown)'} has no checkpoints any more; name its place "
        "with --run or --checkpoint, or search without the model (--like, --ranker text)"
    )
