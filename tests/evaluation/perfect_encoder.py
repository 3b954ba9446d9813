"""An encoder for the gallery of twelve images that understands every query."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retrieval.search.searcher import Reading
from tests.retrieval.small_gallery import meaning_vector


class PerfectEncoder:
    """Makes of a query the direction that its words have in the gallery."""

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        return np.stack([meaning_vector(*text.replace("bottle", "tableware_water_bottle").split()) for text in texts])

    def encode_image(self, path: Path) -> NDArray[np.float32]:
        raise AssertionError(path)

    def reading(self, text: str) -> Reading:
        return Reading(len(text.split()), [], "")
