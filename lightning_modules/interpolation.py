"""Weights between two models, to get back what fine-tuning has cost."""

from __future__ import annotations

import torch

from lightning_modules.encoders.image import misfits
from vitrail.errors import UserError


def interpolated_weights(
    start: dict[str, torch.Tensor], end: dict[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """Weights on the way from one model to another: (1 - α) · start + α · end (WiSE-FT, Wortsman et al., CVPR 2022).

    An adapter's update is a product of two matrices, the second of which begins as zero: that one alone is scaled, so
    that the sum of base and update is what is interpolated.

    Args:
        start: weights at the beginning.
        end: weights at the end, of the same names and shapes.
        alpha: 0 for the beginning, 1 for the end.

    Raises:
        UserError: if the names or shapes differ.
    """
    if wrong := misfits(end, start):
        raise UserError(f"the end's weights do not fit the start: {wrong}; give the start and the end of one run")
    mixed = {}
    for name, last in end.items():
        if not last.is_floating_point() or ".lora_A." in name:
            mixed[name] = last
        else:
            mixed[name] = torch.lerp(start[name].double(), last.double(), alpha).to(last.dtype)
    return mixed
