"""Responses of the API, from which its OpenAPI document is made."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, Field

from vitrail.predictions import ImagePrediction, TaskPrediction


class Error(BaseModel):
    """Why a request was refused, in one line."""

    error: str


class Choice(BaseModel):
    """A class or label with its probability."""

    label: str
    confidence: float


class TaskResult(BaseModel):
    """What is predicted for one image in one task; fields that do not belong to its kind are null."""

    kind: str = Field(description="single_label, multi_label, ordinal or regression")
    label: str | None = Field(default=None, description="predicted class; null where several are equally probable")
    confidence: float | None = Field(default=None, description="probability of the predicted class")
    calibrated: bool = Field(default=False, description="whether confidences are calibrated")
    top_k: list[Choice] = Field(default=[], description="most probable classes, best first")
    labels: list[Choice] | None = Field(default=None, description="of multi_label: all predicted labels")
    value: float | None = Field(default=None, description="of regression: the predicted number")
    deviation: float | None = Field(
        default=None, description="of regression: its standard deviation, where there is one"
    )
    decision: str | None = Field(
        default=None, description="what is predicted at the run's operating point, if it has one"
    )

    @classmethod
    def of(cls, one: TaskPrediction, top_k: int) -> TaskResult:
        """Make it of a prediction."""
        if one.kind == "regression":
            return cls(kind=one.kind, value=one.value, deviation=one.deviation)
        several = one.kind == "multi_label"
        return cls(
            kind=one.kind,
            label=None if several else one.label or None,
            confidence=None if several else one.confidence,
            calibrated=one.calibrated,
            top_k=_choices(one.top_k(top_k)),
            labels=_choices(one.labels) if several else None,
            decision=one.decision,
        )


class ImageResult(BaseModel):
    """Predictions for one image."""

    image: str = Field(description="name of the uploaded file")
    tasks: dict[str, TaskResult]
    unknown: bool | None = Field(
        default=None, description="whether it is unlike the training images; null if that is unknown"
    )

    @classmethod
    def of(cls, name: str, found: ImagePrediction, top_k: int) -> ImageResult:
        """Make it of a prediction."""
        tasks = {task: TaskResult.of(one, top_k) for task, one in found.tasks.items()}
        return cls(image=name, tasks=tasks, unknown=found.unknown)


class Classified(BaseModel):
    """One result per image, in their order."""

    predictions: list[ImageResult]


class Embedded(BaseModel):
    """Vectors of unit length, one per image and one per text, in their order."""

    images: list[list[float]]
    texts: list[list[float]]


class Likeness(BaseModel):
    """A label of the request with its probability among all of them, and the cosine of image and label."""

    label: str
    confidence: float
    similarity: float


class ZeroShotResult(BaseModel):
    """Labels of the request for one image, best first."""

    image: str
    labels: list[Likeness]
    none_of_these: bool = Field(description="whether something else fits the image better than every label")
    other: str | None = Field(default=None, description="what fits best of everything that is not among the labels")


class ZeroShotResults(BaseModel):
    """One result per image, in their order."""

    predictions: list[ZeroShotResult]


class Found(BaseModel):
    """An image of the gallery."""

    id: str
    score: float = Field(description="cosine of its vector and the query's")
    image_url: str = Field(description="address of the image, relative to the server")
    metadata: dict[str, Any] = Field(description="caption, split, labels and predictions of the image")


class SearchResults(BaseModel):
    """Images of the gallery, best first."""

    results: list[Found]


class Task(BaseModel):
    """A task of the model."""

    kind: str
    classes: list[str]


class Limits(BaseModel):
    """What one request may have at most."""

    bytes: int
    pixels: int
    images: int
    text: int = Field(description="characters of a text")
    labels: int
    top_k: int


class ModelInfo(BaseModel):
    """What is served."""

    name: str
    kind: str
    engine: str
    tasks: dict[str, Task]
    gallery_images: int | None = Field(default=None, description="images of the gallery; null without one")
    limits: Limits
    notes: list[str]


class Health(BaseModel):
    """The server answers, and its model is loaded."""

    status: str = "ready"
    model: str


def _choices(ranked: list[tuple[str, float]]) -> list[Choice]:
    return [Choice(label=label, confidence=share) for label, share in ranked if not math.isnan(share)]
