"""Whether an image shows none of some labels: whether something else fits it better.

A softmax always finds one of the labels likely, also for an image that shows none. So the labels are joined by others
that the user has not named: the classes that the model was trained for, and common things. Where one of these has the
highest similarity, with the same prompts, the verdict is "none of these", and it names what fits better. This is the
zero-shot classification of the image among all of them, so it is wrong as often as that is.

A class that a label names, also by its last word only ("bottle" for ``water_bottle``), is not among the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from app.state.limits import SingleFlightCache
from datamodules.captions import PromptOptions, class_prompts
from retrieval.search.text import words
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    from app.state.runs import ServedModel

COMMON = (
    "accordion", "airplane", "anchor", "apple", "bed", "bicycle", "bird", "boat", "book", "bridge", "building",
    "bus", "cactus", "cake", "camera", "candle", "car", "castle", "cat", "chair", "cloud", "computer", "cow",
    "crowd", "dog", "door", "elephant", "fish", "flower", "food", "fountain", "grass", "guitar", "hammer", "hand",
    "helicopter", "horse", "house", "insect", "jewelry", "keyboard", "ladder", "landscape", "leaf", "machine",
    "map", "money", "mountain", "mushroom", "painting", "person", "piano", "pizza", "river", "road", "rock",
    "sandwich", "sea", "sheep", "ship", "snow", "sofa", "statue", "table", "telephone", "tent", "toy", "train",
    "tree", "truck", "umbrella", "wall", "window",
)  # fmt: skip
"""Common things, offered where a model was trained for no classes of its own."""

_KEPT = 32
"""Embeddings of others that are kept, by model and prompts."""


@dataclass(frozen=True)
class Verdict:
    """Whether something else fits an image better than every label.

    Attributes:
        none_of_these: whether it does.
        other: what else fits best; empty where nothing else was compared.
        share: its probability among all labels and others.
    """

    none_of_these: bool = False
    other: str = ""
    share: float = 0.0

    @property
    def text(self) -> str:
        """The verdict in one line; empty where one of the labels fits best."""
        return f"None of these: more like “{self.other}” ({self.share:.0%})" if self.none_of_these else ""


class Others:
    """What images are compared with in addition to the labels, of each model; from several threads too."""

    def __init__(self) -> None:
        self._vectors: SingleFlightCache[NDArray[np.float32]] = SingleFlightCache(_KEPT)

    def verdicts(
        self,
        run: ServedModel,
        labels: Sequence[str],
        templates: Sequence[str],
        similarities: NDArray[np.float64],
        images: NDArray[np.float32],
        scale: float,
    ) -> list[Verdict]:
        """Return a verdict on each image.

        Args:
            run: a dual encoder.
            labels: C of them.
            templates: with which labels and others become texts.
            similarities: float64 ``(N, C)``, cosines of N images and the labels.
            images: float32 ``(N, D)``, their vectors, of unit length.
            scale: that makes logits of cosines.
        """
        from scipy.special import softmax

        names = candidates(run)
        rows = [row for row, name in enumerate(names) if not any(is_named(name, label) for label in labels)]
        if not rows:
            return [Verdict() for _ in images]
        key = (run.name, *templates)
        vectors = self._vectors.get(
            key, lambda: run.encode_labels(class_prompts(PromptOptions(templates=list(templates)), names))
        )
        others = (images @ vectors[rows].T).astype(np.float64)
        shares = softmax(scale * np.concatenate([similarities, others], axis=1), axis=1)[:, len(labels) :]
        best = others.argmax(axis=1)
        return [
            Verdict(bool(other[at] > own.max()), names[rows[at]], float(share[at]))
            for own, other, share, at in zip(similarities, others, shares, best.tolist(), strict=True)
        ]


def candidates(run: ServedModel) -> list[str]:
    """Return what a model is asked for in addition to a user's labels: its own classes, otherwise common things."""
    own = [name.replace("_", " ") for name in run.tasks.get(LABEL_TASK, ())]
    return own or list(COMMON)


def is_named(name: str, label: str) -> bool:
    """Return whether a label names a class: by all of its words, or by the last, its head."""
    own, given = list(words(name)), set(words(label))
    return bool(own) and (set(own) <= given or own[-1] in given)
