"""From a batch and its logits to what callbacks get, with padding and unknown targets left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F

from vitrail.types import UNKNOWN, Batch, Outputs, batch_targets


def real_rows(batch: Batch) -> torch.Tensor:
    """Which rows are samples and not padding, bool ``(B,)``."""
    if "is_padding" in batch:
        return ~batch["is_padding"]
    return torch.ones_like(batch["sample_id"], dtype=torch.bool)


def known_targets(batch: Batch, tasks: Iterable[str]) -> dict[str, torch.Tensor]:
    """Targets of these tasks, unknown where the batch has none and where a row is only padding.

    Returns:
        For each task int64 ``(B,)``.
    """
    given = batch_targets(batch)
    unknown = torch.full_like(batch["sample_id"], UNKNOWN)
    padding = ~real_rows(batch)
    return {task: given.get(task, unknown).masked_fill(padding, UNKNOWN) for task in tasks}


def real_outputs(batch: Batch, logits: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> Outputs:
    """What callbacks get of a batch."""
    real = real_rows(batch)
    return {
        "sample_id": batch["sample_id"][real],
        "logits": {task: values.detach()[real] for task, values in logits.items()},
        "targets": {task: values[real] for task, values in targets.items()},
    }


def with_embedding(outputs: Outputs, batch: Batch, features: torch.Tensor) -> Outputs:
    """Adds the features of the batch's samples as embeddings of unit length.

    Args:
        outputs: of ``real_outputs``.
        batch: that they are of.
        features: float ``(B, D)``.
    """
    return {**outputs, "image_embedding": F.normalize(features.detach()[real_rows(batch)].float(), dim=-1)}
