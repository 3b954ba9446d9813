"""From what a model's steps return to columns: vectors, predictions, thumbnails and captions.

A chunk is what is committed, or written as a shard, at a time. Outputs stay on the model's device until it is whole, so
that the model need not wait for them.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from retrieval.schema import CONFIDENCE, PREDICTED
from vitrail.errors import UserError
from vitrail.predictions import predicted_classes
from vitrail.types import UNKNOWN

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

# A loader's worker processes are forked while nothing of LanceDB is under way, and do not use it.
warnings.filterwarnings("ignore", message="lancedb fork support is experimental")

CHUNK = 1024
"""Pictures that are committed at a time, by default."""

THUMBNAIL = 128
"""Longest side of a thumbnail in pixels."""

_QUALITY = 85


class Encoded(NamedTuple):
    """What a model says of some pictures.

    Attributes:
        pictures: ``sample_id``, ``vector``, ``predicted_<task>`` and ``confidence_<task>`` of each task, ``thumbnail``
            (null where none is wanted); ascending by ``sample_id``.
        captions: ``sample_id`` of the picture, ``number`` of the caption within it, ``caption``, ``vector``; None where
            captions are not embedded.
    """

    pictures: pa.Table
    captions: pa.Table | None


class _Step(NamedTuple):
    outputs: Mapping[str, Any]
    images: torch.Tensor | None
    captions: list[str] | None


class Chunk:
    """Collects the outputs of several batches.

    Args:
        predicts: class names of each task that is predicted.
        thumbnails: whether to make small pictures of the batches' own.
    """

    def __init__(self, predicts: Mapping[str, list[str]], *, thumbnails: bool) -> None:
        self._predicts = predicts
        self._thumbnails = thumbnails
        self._steps: list[_Step] = []
        self.batches = 0
        self.rows = 0

    def add(self, outputs: object, batch: Mapping[str, Any], origin: str) -> None:
        """Keeps what a step returned.

        Args:
            outputs: of the step, padding left out.
            batch: that it was given.
            origin: what messages call the model.

        Raises:
            UserError: if there are no embeddings among them.
        """
        if not isinstance(outputs, Mapping) or not {"sample_id", "image_embedding"} <= outputs.keys():
            raise UserError(
                f"{origin}: its steps return no image_embedding (vitrail.types.Outputs); use a task that yields "
                "embeddings of pictures"
            )
        self.batches += 1
        self.rows += len(outputs["sample_id"])
        real = _real_rows(batch, len(outputs["sample_id"]))
        images = batch["image"][real] if self._thumbnails and "image" in batch else None
        captions = None
        if "text_embedding" in outputs and "captions" in batch:
            texts = [texts for texts, is_real in zip(batch["captions"], real.tolist(), strict=True) if is_real]
            captions = [text for several in texts for text in several]
        self._steps.append(_Step(outputs, images, captions))

    @torch.no_grad()
    def encoded(self) -> Encoded:
        """The collected outputs as columns; may be called in another thread.

        Raises:
            UserError: if an embedding or a prediction is not finite.
        """
        import pyarrow as pa

        sample_id = _joined([step.outputs["sample_id"] for step in self._steps])
        order = np.argsort(sample_id, kind="stable")
        vectors = _joined([step.outputs["image_embedding"] for step in self._steps])[order]
        _check_unit(vectors, sample_id[order])
        columns: dict[str, Any] = {"sample_id": pa.array(sample_id[order]), "vector": vector_column(vectors)}
        for task, names in self._predicts.items():
            logits = torch.cat([step.outputs["logits"][task] for step in self._steps]).float()
            confidence = logits.softmax(dim=1).amax(dim=1).cpu().numpy()[order]
            indices = predicted_classes(logits.cpu().numpy()[order])
            # Null where the model predicts none of the classes.
            places = pa.array(indices, pa.int64(), mask=indices == UNKNOWN)
            columns[f"{PREDICTED}{task}"] = pa.array(names, pa.string()).take(places)
            columns[f"{CONFIDENCE}{task}"] = pa.array(confidence, pa.float32())
        columns["thumbnail"] = pa.array(self._small_pictures(order), pa.binary())
        return Encoded(pa.table(columns), self._captions())

    def _small_pictures(self, order: NDArray[np.int64]) -> list[bytes | None]:
        pictures: list[bytes | None] = []
        for step in self._steps:
            if step.images is None:
                pictures += [None] * len(step.outputs["sample_id"])
            else:
                pictures += [thumbnail(pixels) for pixels in step.images.permute(0, 2, 3, 1).cpu().numpy()]
        return [pictures[place] for place in order.tolist()]

    def _captions(self) -> pa.Table | None:
        import pyarrow as pa

        steps = [step for step in self._steps if step.captions is not None]
        if not steps:
            return None
        texts = [text for step in steps for text in step.captions or ()]
        owner = _joined([step.outputs["text_image"] for step in steps])
        vectors = _joined([step.outputs["text_embedding"] for step in steps])
        # A picture's captions stand together; the empty text stands for none.
        first = np.r_[True, owner[1:] != owner[:-1]] if len(owner) else np.zeros(0, dtype=bool)
        starts = np.flatnonzero(first)
        number = np.arange(len(owner)) - np.repeat(starts, np.diff(np.r_[starts, len(owner)]))
        given = np.flatnonzero([bool(text) for text in texts])
        rows = given[np.argsort(owner[given], kind="stable")]
        _check_unit(vectors[rows], owner[rows])
        return pa.table(
            {
                "sample_id": pa.array(owner[rows]),
                "number": pa.array(number[rows]),
                "caption": pa.array([texts[row] for row in rows.tolist()], pa.string()),
                "vector": vector_column(vectors[rows]),
            }
        )


def thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    """A small JPEG of a picture.

    Args:
        pixels: uint8 ``(H, W, 3)``.
    """
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=_QUALITY)
    return buffer.getvalue()


def vector_column(vectors: NDArray[np.float32]) -> pa.FixedSizeListArray:
    """float32 ``(N, D)`` as a column of lists of one length."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def _real_rows(batch: Mapping[str, Any], count: int) -> torch.Tensor:
    """Which rows of a batch are no padding, bool ``(B,)`` on the CPU."""
    if "is_padding" in batch:
        padding: torch.Tensor = batch["is_padding"].cpu()
        return ~padding
    return torch.ones(count, dtype=torch.bool)


def _joined(parts: list[torch.Tensor]) -> NDArray[Any]:
    joined: NDArray[Any] = torch.cat([part.detach() for part in parts]).cpu().numpy()
    return joined


def _check_unit(vectors: NDArray[np.float32], sample_id: NDArray[np.int64]) -> None:
    """Refuses vectors that are not of unit length, which includes those that are not finite."""
    bad = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < 1e-3))
    if bad.size:
        raise UserError(
            f"{bad.size} of {len(vectors)} embeddings are zero or not finite, first of sample {sample_id[bad[0]]}; "
            "has the model diverged? train again with a lower learning rate"
        )
