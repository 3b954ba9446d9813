"""Zero-shot classification by labels of the user's own, and whether an image shows none of them.

A softmax always finds one of the labels likely, also for an image that shows none. So the labels are joined by others
that the user has not named: the classes that the model was trained for, and common things. Where one of these has the
highest similarity, with the same prompts, the verdict is "none of these", and it names what fits better. This is the
zero-shot classification of the image among all of them, so it is wrong as often as that is.

A class that a label names, also by its last word only ("bottle" for ``water_bottle``), is not among the others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.state.context import Limits, SingleFlightCache
from app.state.runs import ServedModel, ServedRun
from datamodules.captions import PromptOptions, class_prompts
from retrieval.search.text import words
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

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


PROMPTS: dict[str, tuple[str, ...]] = {
    "One sentence": ("a photo of a {}.",),
    "The label alone": ("{}",),
    # The seven that were chosen for ImageNet (Radford et al., 2021, notebook on prompt engineering).
    "Ensemble of seven": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}
"""Sets of prompt templates that are offered; users may write their own."""

LOWEST, HIGHEST = 0.1, 10.0
"""Range of the temperature that users set."""

_MOST_PROMPTS = 2_000
"""Texts of one request: labels times templates."""


@dataclass(frozen=True)
class Labels:
    """Distinct labels, at least one, and notes on what was changed, one line each."""

    names: list[str]
    notes: list[str]


@dataclass(frozen=True)
class ZeroShot:
    """What a model predicts for one image.

    Attributes:
        labels: C of them.
        prompts: the texts of each label.
        similarities: float64 ``(C,)``, cosine of the image and each label, the mean of its prompts.
        probabilities: float64 ``(C,)``, sum to 1.
        verdict: whether something else fits the image better than every label.
    """

    labels: list[str]
    prompts: list[list[str]]
    similarities: NDArray[np.float64]
    probabilities: NDArray[np.float64]
    verdict: Verdict

    def ranked(self) -> list[tuple[str, float, float]]:
        """Return labels with probability and similarity, best first."""
        order = np.argsort(-self.similarities, kind="stable").tolist()
        return [(self.labels[at], float(self.probabilities[at]), float(self.similarities[at])) for at in order]


def parse_labels(text: str, limits: Limits) -> Labels:
    """Split text at commas and line breaks into labels; those that differ only in case or blanks are one.

    Raises:
        UserError: there is no label, or they are too many or too long.
    """
    _check_length("labels", text, limits.text)
    return distinct_labels(re.split(r"[,\n\r]", text), limits)


def distinct_labels(names: Sequence[str], limits: Limits) -> Labels:
    """Return the labels among names; those that differ only in case or blanks are one.

    Raises:
        UserError: as ``parse_labels``.
    """
    given = [name for name in (" ".join(part.split()) for part in names) if name]
    if not given:
        raise UserError("labels: there are none; write some, separated by commas or lines")
    distinct: dict[str, str] = {}
    for name in given:
        distinct.setdefault(name.casefold(), name)
    if len(distinct) > limits.labels:
        raise UserError(f"labels: {len(distinct)} are too many; leave {limits.labels} or fewer")
    for name in distinct.values():
        _check_length(f"label “{name[:30]}…”", name, limits.label_text)
    counts = Counter(name.casefold() for name in given)
    notes = [f"“{distinct[key]}” was given {n} times and counts once." for key, n in counts.items() if n > 1]
    if len(distinct) == 1:
        notes.append("A single label always has the probability 1; its similarity is more informative.")
    return Labels(list(distinct.values()), notes)


def parse_templates(text: str, limits: Limits) -> list[str]:
    """Split text into prompt templates, one per line, each once; embeddings of several are averaged.

    Raises:
        UserError: there is no template, or one is too long or lacks ``{}``.
    """
    _check_length("templates", text, limits.text)
    return distinct_templates(text.splitlines(), limits)


def distinct_templates(lines: Sequence[str], limits: Limits) -> list[str]:
    """Return the templates among lines, each once.

    Raises:
        UserError: as ``parse_templates``.
    """
    templates = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not templates:
        raise UserError("templates: there are none; write one with {} in place of the label")
    for template in templates:
        _check_length(f"template “{template[:30]}…”", template, limits.label_text)
        if template.count("{}") != 1:
            raise UserError(f"template “{template[:60]}”: must have {{}} once, in place of the label")
    return templates


def ask(
    run: ServedModel, images: Sequence[Any], labels: Sequence[str], templates: Sequence[str], **options: Any
) -> list[ZeroShot]:
    """Return what ``compare`` returns for N images, which are encoded first."""
    return compare(run, run.encode_images(images), labels, templates, **options)


def compare(
    run: ServedModel,
    vectors: NDArray[np.float32],
    labels: Sequence[str],
    templates: Sequence[str],
    *,
    temperature: float = 1.0,
    others: Others | None = None,
) -> list[ZeroShot]:
    """Return how likely each label is for each image, and whether none of them fits.

    Logits are cosines, multiplied by the model's logit scale and divided by the run's calibration temperature, if it
    has one, and by the user's. A probability only compares the labels with each other; whether something else fits
    better is the verdict (``app.logic.zero_shot``).

    Args:
        run: a dual encoder.
        vectors: of N images, float32 ``(N, D)``, of unit length.
        labels: distinct.
        templates: each with ``{}`` once.
        temperature: above 1 the probabilities are more alike; below, less.
        others: what else the images are compared with; without it there is no verdict.

    Raises:
        UserError: the run has no text encoder, or the temperature or the number of texts is out of range.
    """
    from scipy.special import softmax

    if not LOWEST <= temperature <= HIGHEST:
        raise UserError(f"temperature: must be between {LOWEST:g} and {HIGHEST:g}; got {temperature:g}")
    if len(labels) * len(templates) > _MOST_PROMPTS:
        raise UserError(
            f"labels: {len(labels)} with {len(templates)} templates are more than {_MOST_PROMPTS} texts; use fewer"
        )
    scale = run.logit_scale / run.temperatures.get(LABEL_TASK, 1.0) / temperature
    prompts = class_prompts(PromptOptions(templates=list(templates)), labels)
    texts = run.encode_labels(prompts)
    similarities = (vectors @ texts.T).astype(np.float64)
    verdicts = [Verdict()] * len(vectors)
    if others is not None:
        verdicts = others.verdicts(run, labels, templates, similarities, vectors, scale)
    return [
        ZeroShot(list(labels), prompts, row, softmax(scale * row), verdict)
        for row, verdict in zip(similarities, verdicts, strict=True)
    ]


def reading_notes(run: ServedRun, labels: Sequence[str]) -> list[str]:
    """Return what the model's tokenizer cannot read of labels, one line each."""
    notes = []
    for label in labels:
        reading = run.reading(label)
        if reading.unknown:
            notes.append(f"The model's tokenizer does not know {', '.join(reading.unknown)} in “{label}”.")
        if reading.unread:
            notes.append(f"The model reads only the beginning of “{label}”.")
    return notes


def _check_length(what: str, text: str, longest: int) -> None:
    if len(text) > longest:
        raise UserError(f"{what}: {len(text)} characters are too many; leave {longest} or fewer")
