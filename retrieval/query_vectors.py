"""Vectors of queries: texts and pictures are encoded by the model that made the gallery, its own pictures looked up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vitrail.errors import UserError

if TYPE_CHECKING:
    from retrieval.gallery import Gallery
    from retrieval.ranking import Query


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
    """The model that made a gallery's vectors, for new texts and pictures."""

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        """Vectors ``(Q, D)`` of unit length."""

    def encode_picture(self, path: Path) -> NDArray[np.float32]:
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
            UserError: if there is no such picture, or no model.
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
                vectors[place] = self._encoder_now().encode_picture(query.image)
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
