"""What a gallery holds: its tables' columns, the model that made it, and what a search returns.

A gallery has a table of images and, where a dual encoder was given captions, a table of captions. Vectors are of unit
length, so that a dot product is a cosine.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vitrail.errors import UserError
from vitrail.types import CLASS_KINDS, TaskKind, kind_of, with_image_defaults

if TYPE_CHECKING:
    import pyarrow as pa


FORMAT = 2
"""Incremented when the meaning of a gallery's tables changes. Galleries of single-label tasks only keep format 1, in
which all labels and predictions are text, so that older versions read them."""

IMAGES, CAPTIONS = "images", "captions"
"""Names of the two tables."""

IDENTITY_KEY = b"vitrail.gallery"
"""Key of the identity, as JSON, in the schema's metadata."""

LABEL, PREDICTED, CONFIDENCE, DEVIATION = "label_", "predicted_", "confidence_", "deviation_"
"""Prefixes of a task's columns: the label, the prediction, its confidence (0 to 1), and of regression tasks instead the
predicted standard deviation. Labels of multi-label tasks are lists, with a list of confidences; numbers are float32."""

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
        kinds: of the tasks that are not single-label, predicted or labelled.
        scales: classes of ordinal tasks in their order.
        thresholds: of predicted multi-label tasks the probability from which each label is predicted.
    """

    task: str
    weights: str
    run: str
    dim: int
    encodes_text: bool
    input_options: dict[str, Any]
    predicts: dict[str, list[str]]
    labels: list[str]
    kinds: dict[str, TaskKind] = field(default_factory=dict)
    scales: dict[str, list[str]] = field(default_factory=dict)
    thresholds: dict[str, list[float]] = field(default_factory=dict)

    def kind(self, task: str) -> TaskKind:
        """Return the kind of a task."""
        return kind_of(self.kinds, task)

    def worded(self, tasks: Iterable[str]) -> list[str]:
        """Return those of some tasks whose values are words, all but regression."""
        return [task for task in tasks if self.kind(task) != "regression"]

    def to_json(self) -> str:
        """Return one line of JSON, with the format's number."""
        content = dataclasses.asdict(self)
        if self.kinds:
            return json.dumps({"format": FORMAT, **content}, sort_keys=True)
        former = {name: value for name, value in content.items() if name not in ("kinds", "scales", "thresholds")}
        return json.dumps({"format": 1, **former}, sort_keys=True)

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

    fields = [pa.field(name, pa.string()) for name in ("id", "path", "content", "caption", "group", "split")]
    fields += [pa.field(f"{LABEL}{task}", value_type(identity.kind(task))) for task in identity.labels]
    for task in identity.predicts:
        kind = identity.kind(task)
        confidence = pa.list_(pa.float32()) if kind == "multi_label" else pa.float32()
        further = DEVIATION if kind == "regression" else CONFIDENCE
        fields += [pa.field(f"{PREDICTED}{task}", value_type(kind)), pa.field(f"{further}{task}", confidence)]
    fields += [pa.field("text", pa.string()), pa.field("thumbnail", pa.binary())]
    fields += [pa.field("run", pa.string()), pa.field("weights", pa.string())]
    fields.append(pa.field("vector", pa.list_(pa.float32(), identity.dim)))
    return pa.schema(fields, metadata={IDENTITY_KEY: identity.to_json().encode()})


def value_type(kind: TaskKind) -> pa.DataType:
    """Return the Arrow type of labels and predictions of a kind."""
    import pyarrow as pa

    types = {"multi_label": pa.list_(pa.string()), "regression": pa.float32()}
    return types.get(kind, pa.string())


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


def identity_of(
    task: object,
    run: str,
    input_options: Mapping[str, Any],
    labels: Iterable[str] | Mapping[str, Sequence[str]],
    kinds: Mapping[str, TaskKind] | None = None,
) -> ModelIdentity:
    """Return the identity that a gallery keeps of a task.

    Args:
        task: fills the gallery.
        run: directory of the run.
        input_options: how its images are made (size, crop fraction, interpolation).
        labels: tasks that the data have labels of; with class names, so that ordinal labels have their order.
        kinds: of these tasks, where they are not single-label.

    Raises:
        UserError: if the task yields no embeddings, or data and task have labels of different kinds under one name.
    """
    if not isinstance(task, EmbedsImages):
        raise UserError(
            f"{type(task).__name__} yields no embeddings of images (image_embedding, vitrail.types.Outputs); "
            "use a classifier, a multi-task model or a dual encoder"
        )
    own: Mapping[str, TaskKind] = getattr(task, "task_kinds", {})
    for name in set(labels) & set(task.tasks):
        if kind_of(own, name) != kind_of(kinds, name) and not {kind_of(own, name), kind_of(kinds, name)} <= {
            *CLASS_KINDS
        }:
            raise UserError(
                f"task {name!r}: is {kind_of(kinds, name)} in the data and {kind_of(own, name)} of the model; set its "
                "kind in the data (kinds)"
            )
    classes = {**(labels if isinstance(labels, Mapping) else {}), **task.tasks}
    named: dict[str, TaskKind] = {
        name: kind
        for name, kind in {**(kinds or {}), **own}.items()
        if kind != "single_label" and (name in set(labels) or name in task.tasks)
    }
    return ModelIdentity(
        task=type(task).__name__,
        weights=task.weights_digest(),
        run=run,
        dim=task.embedding_dim,
        encodes_text=hasattr(task, "encode_text"),
        input_options=dict(input_options),
        predicts={name: list(names) for name, names in task.tasks.items()},
        labels=list(labels),
        kinds=named,
        scales={name: list(classes[name]) for name, kind in named.items() if kind == "ordinal" and name in classes},
        thresholds={name: list(values) for name, values in getattr(task, "thresholds", {}).items()},
    )


def shortened(vectors: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """Return the first numbers of embeddings ``(n, D)``, of unit length again."""
    if vectors.shape[1] <= dim:
        return vectors
    cut = vectors[:, :dim]
    unit: NDArray[np.float32] = cut / np.linalg.norm(cut, axis=1, keepdims=True).clip(min=1e-12)
    return unit


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
    if _predicted(there) != _predicted(new):
        return "the model predicts other classes"
    given, had = _labelled(new), _labelled(there)
    if given and given != had:  # images without any labels may join
        return f"the data have labels of {', '.join(given)}, not of {', '.join(had) or 'nothing'}"
    return ""


def _predicted(identity: ModelIdentity) -> tuple[object, ...]:
    kinds = {task: identity.kind(task) for task in identity.predicts}
    return identity.predicts, kinds, identity.thresholds


def _labelled(identity: ModelIdentity) -> list[str]:
    """Tasks that the data have labels of, and their kinds."""
    kinds = {task: identity.kind(task) for task in identity.labels}
    return [task if kind == "single_label" else f"{task} ({kind})" for task, kind in kinds.items()]


Value = str | list[str] | float
"""Value of a task: a class, labels, or a number."""


def value_text(value: Value | None) -> str:
    """Return a value as text, such as ``blue``, ``cat, dog`` or ``12.5``; empty where there is none."""
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:.4g}" if isinstance(value, float) else value or ""


class Predicted(NamedTuple):
    """What a model predicts for an image in one task.

    Attributes:
        value: class, labels, or number.
        confidence: of the class, or of each label, 0 to 1; of a number its standard deviation; None where not known.
    """

    value: Value
    confidence: float | list[float] | None

    def __str__(self) -> str:
        if isinstance(self.value, float):
            return value_text(self.value) + ("" if self.confidence is None else f" ± {self.confidence:.2g}")
        if self.confidence is None:
            return value_text(self.value) or "(no label)"
        names = self.value if isinstance(self.value, list) else [self.value]
        shares = self.confidence if isinstance(self.confidence, list) else [self.confidence]
        return " + ".join(f"{name} {share:.2f}" for name, share in zip(names, shares, strict=True)) or "(no label)"

    def as_dict(self) -> dict[str, Any]:
        """Return ``value`` with ``confidence``, a list for a list, or ``deviation``."""
        given = self.confidence
        rounded = [round(share, 6) for share in given] if isinstance(given, list) else given and round(given, 6)
        return {"value": self.value, "deviation" if isinstance(self.value, float) else "confidence": rounded}


def prediction_columns(identity: ModelIdentity, task: str) -> list[str]:
    """Return the columns of a task's predictions."""
    return [f"{PREDICTED}{task}", f"{DEVIATION if identity.kind(task) == 'regression' else CONFIDENCE}{task}"]


def prediction_of(row: Mapping[str, Any], task: str) -> Predicted | None:
    """Return the prediction in a row of the table of images; None where the model predicts nothing."""
    value = row.get(f"{PREDICTED}{task}")
    if value is None:
        return None
    if isinstance(value, float):
        return Predicted(value, row.get(f"{DEVIATION}{task}"))
    return Predicted(value, row.get(f"{CONFIDENCE}{task}"))


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
