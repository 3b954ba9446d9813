"""What a search in a gallery finds."""

from __future__ import annotations

from typing import NamedTuple


class Hit(NamedTuple):
    """A picture that was found.

    Attributes:
        id: name of the picture.
        score: cosine.
    """

    id: str
    score: float


class CaptionHit(NamedTuple):
    """A caption that was found.

    Attributes:
        caption: the text.
        picture: id of the first picture that has it.
        score: cosine.
    """

    caption: str
    picture: str
    score: float
