"""What a gallery holds: its tables' columns, the model that made it, and what a search returns.

A gallery has a table of images and, where a dual encoder was given captions, a table of captions. Vectors are of unit
length, so that a dot product is a cosine.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vitrail.errors import UserError
from vitrail.types import CLASS_KINDS, kind_of, with_image_defaults

if TYPE_CHECKING:
    import pyarrow as pa


FORMAT = 1
"""Incremented when the meaning of a gallery's tables changes."""

IMAGES, CAPTIONS = "images", "captions"
"""Names of the two tables."""

IDENTITY_KEY = b"vitrail.gallery"
"""Key of the identity, as JSON, in the schema's metadata."""

LABEL, PREDICTED, CONFIDENCE = "label_", "predicted_", "confidence_"
"""Prefixes of a task's columns: the label, the prediction, and its confidence (0 to 1)."""

CHUNK = 1024
"""Images that are committed at a time, by default."""

NOT_METADATA = ("vector", "thumbnail")
"""Columns that are large and of no use to a filter."""

_UNIT_TOLERANCE = 1e-3
"""How far a vector's length may be from 1; half precision rounds by less."""


def not_unit(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the rows of vectors ``(N, D)`` that are not of unit length, which includes those that are not finite."""
    with np.errstate(all="ignore"):
        # Written so that NaN is among them.
        return np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1) <= _UNIT_TOLERANCE))


@dataclass(frozen=True)
class ModelIdentity:
    """Which model made the vectors of a gallery, and what it predicts.

    Attributes:
        task: name of the task's class, such as ``DualEncoder``.
        weights: SHA-256 of the weights, hexadecimal; vectors of other weights do not compare.
        run: directory of the run, for people to read.
        dim: length of the vectors.
        encodes_text: whether texts can be compared with the vectors.
        input_options: how the model's input images were made (size, crop fraction, interpolation).
        predicts: class names of each task that the model predicts.
        labels: tasks that the data have labels of.
    """

    task: str
    weights: str
    run: str
    dim: int
    encodes_text: bool
    input_options: dict[str, Any]
    predicts: dict[str, list[str]]
    labels: list[str]

    def to_json(self) -> str:
        """Return one line of JSON, with the format's number."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, origin: str) -> ModelIdentity:
        """Read what ``to_json`` wrote; raise ``UserError`` for any other text, or a newer format."""
        try:
            content = json.loads(text)
            if content.pop("format") > FORMAT:
                raise UserError(f"{origin}: was made by a newer version of Vitrail; update, or make the gallery again")
            return cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{origin}: does not name the model that made it; make the gallery again") from error


def image_schema(identity: ModelIdentity) -> pa.Schema:
    """Return the columns of the table of images; ``identity`` is in its metadata."""
    import pyarrow as pa

    names = ["id", "path", "content", "caption", "group", "split", *(f"{LABEL}{task}" for task in identity.labels)]
    fields = [pa.field(name, pa.string()) for name in names]
    for task in identity.predicts:
        fields += [pa.field(f"{PREDICTED}{task}", pa.string()), pa.field(f"{CONFIDENCE}{task}", pa.float32())]
    fields += [pa.field("text", pa.string()), pa.field("thumbnail", pa.binary())]
    fields += [pa.field("run", pa.string()), pa.field("weights", pa.string())]
    fields.append(pa.field("vector", pa.list_(pa.float32(), identity.dim)))
    return pa.schema(fields, metadata={IDENTITY_KEY: identity.to_json().encode()})


def caption_schema(identity: ModelIdentity) -> pa.Schema:
    """Return the columns of the table of captions; ``image`` is the id of the image that the caption belongs to."""
    import pyarrow as pa

    fields = [pa.field(name, pa.string()) for name in ("id", "image", "caption")]
    fields.append(pa.field("vector", pa.list_(pa.float32(), identity.dim)))
    return pa.schema(fields, metadata={IDENTITY_KEY: identity.to_json().encode()})


@runtime_checkable
class EmbedsImages(Protocol):
    """A task that fills galleries: its steps return ``image_embedding`` (``vitrail.types.Outputs``)."""

    @property
    def tasks(self) -> dict[str, list[str]]:
        """Class names of each task that it predicts, the main one first."""

    @property
    def embedding_dim(self) -> int:
        """Length of the embeddings."""

    def weights_digest(self) -> str:
        """SHA-256 of the weights, hexadecimal."""


def identity_of(task: object, run: str, input_options: Mapping[str, Any], labels: list[str]) -> ModelIdentity:
    """Return the identity that a gallery keeps of a task.

    Args:
        task: fills the gallery.
        run: directory of the run.
        input_options: how its images are made (size, crop fraction, interpolation).
        labels: tasks that the data have labels of.

    Raises:
        UserError: if the task yields no embeddings.
    """
    if not isinstance(task, EmbedsImages):
        raise UserError(
            f"{type(task).__name__} yields no embeddings of images (image_embedding, vitrail.types.Outputs); "
            "use a classifier, a multi-task model or a dual encoder"
        )
    return ModelIdentity(
        task=type(task).__name__,
        weights=task.weights_digest(),
        run=run,
        dim=task.embedding_dim,
        encodes_text=hasattr(task, "encode_text"),
        input_options=dict(input_options),
        predicts={
            name: list(classes)
            for name, classes in task.tasks.items()
            if kind_of(getattr(task, "task_kinds", {}), name) in CLASS_KINDS
        },
        labels=list(labels),
    )


def difference(there: ModelIdentity, new: ModelIdentity) -> str:
    """Return how a model that is to add images differs from the gallery's; empty where it may add them."""
    if there.weights != new.weights:
        return f"the weights of {new.run or 'the new model'} are others"
    if there.dim != new.dim or there.encodes_text != new.encodes_text or there.task != new.task:
        return "the task is another"
    # A gallery of an older version lacks what has become an option since.
    older, newer = with_image_defaults(there.input_options), with_image_defaults(new.input_options)
    if any(older[key] != newer[key] for key in older.keys() & newer.keys()):
        return f"images were made as {there.input_options}, now {new.input_options}"
    if there.predicts != new.predicts:
        return "the model predicts other classes"
    if new.labels and there.labels != new.labels:  # images without any labels may join
        return f"the data have labels of {', '.join(new.labels)}, not of {', '.join(there.labels) or 'nothing'}"
    return ""


class Hit(NamedTuple):
    """An image that was found.

    Attributes:
        id: name of the image.
        score: cosine.
    """

    id: str
    score: float


class CaptionHit(NamedTuple):
    """A caption that was found.

    Attributes:
        caption: the text.
        image: id of the first image that has it.
        score: cosine.
    """

    caption: str
    image: str
    score: float
