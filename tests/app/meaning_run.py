"""A run whose model understands the small gallery perfectly, and small galleries as the application serves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from app.state.galleries import ServedGallery
from app.state.runs import ServedRun
from retrieval.search.searcher import Reading
from retrieval.search.text import words
from tests.retrieval.small_gallery import CLASSES, COLOURS, MATERIALS, meaning_vector, small_gallery

KNOWN = {word: value for value in (*CLASSES, *COLOURS, *MATERIALS) for word in words(value)}
"""Values of the gallery by the words that a person says."""


class MeaningRun:
    """What the search needs of a run; an image means its colour: blue where it is more blue than red."""

    def __init__(self, name: str = "perfect", weights: str = "a" * 64) -> None:
        self.name, self.weights = name, weights

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        meant = [[KNOWN[word] for word in words(text) if word in KNOWN] or ["black"] for text in texts]
        return np.stack([meaning_vector(*values) for values in meant])

    value_range = "auto"

    def prepared(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels

    def encode_images(self, images: Sequence[torch.Tensor]) -> NDArray[np.float32]:
        means = [image.float().mean(dim=(1, 2)).tolist() for image in images]
        return np.stack([meaning_vector("blue" if mean[2] > mean[0] else "black") for mean in means])

    def reading(self, text: str) -> Reading:
        found = words(text)
        known = [word for word in found if word in KNOWN]
        return Reading(len(known), [word for word in found if word not in KNOWN], "")


def served_small(folder: Path, name: str = "small", run: MeaningRun | None = None, **changes: Any) -> ServedGallery:
    """The small gallery, served.

    Args:
        folder: where to make it.
        name: that users see.
        run: that made it; None for one that is not served.
        changes: fields of its identity that differ.
    """
    small_gallery(folder, **changes)
    return ServedGallery(folder, name, cast("ServedRun | None", run))
