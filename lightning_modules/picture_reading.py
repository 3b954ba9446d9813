"""What pictures become for a model that reads them, and what it knows when it has read them with a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures.

    Attributes:
        encoded: what the model's vision tower returns.
        features: float ``(B, D)``, the mean of each picture's tokens.
    """

    encoded: Any
    features: torch.Tensor


@dataclass(frozen=True)
class Reading:
    """What has been read of B texts with pictures. It never changes: whoever reads on gets another one.

    Attributes:
        cache: keys and values of every layer.
        hidden: float ``(B, D)``, what the last token became.
        length: tokens that were read.
        position: of the next token; smaller than ``length``, because a picture takes few positions.
    """

    cache: Any
    hidden: torch.Tensor
    length: int
    position: int


def patches_of(pixels: torch.Tensor, patch: int, merge: int, frames: int) -> torch.Tensor:
    """Patches of pictures, those that become one token together next to each other, as Qwen2-VL wants them.

    Args:
        pixels: float ``(B, 3, S, S)``, normalised; S is a multiple of ``patch · merge``.
        patch: side of a patch.
        merge: so many patches by as many become one token.
        frames: a picture is a film of so many frames.

    Returns:
        float ``(B · patches, 3 · frames · patch²)``.
    """
    blocks = pixels.shape[-1] // (patch * merge)
    grid = pixels.reshape(len(pixels), 3, blocks, merge, patch, blocks, merge, patch)
    film = grid.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    return film.reshape(-1, 3 * frames * patch**2)
