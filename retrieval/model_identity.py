"""Which model fills a gallery: its weights, and what it says of a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from retrieval.schema import ModelIdentity
from vitrail.errors import UserError


@runtime_checkable
class EmbedsPictures(Protocol):
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
    """The identity that a gallery keeps of a task.

    Args:
        task: fills the gallery.
        run: directory of the run.
        input_options: how its pictures are made (size, crop fraction, interpolation).
        labels: tasks that the data have labels of.

    Raises:
        UserError: if the task yields no embeddings.
    """
    if not isinstance(task, EmbedsPictures):
        raise UserError(
            f"{type(task).__name__} yields no embeddings of pictures (image_embedding, vitrail.types.Outputs); "
            "use a classifier, a multi-task model or a dual encoder"
        )
    return ModelIdentity(
        task=type(task).__name__,
        weights=task.weights_digest(),
        run=run,
        dim=task.embedding_dim,
        encodes_text=hasattr(task, "encode_text"),
        input_options=dict(input_options),
        predicts={name: list(classes) for name, classes in task.tasks.items()},
        labels=list(labels),
    )
