"""From a tower's features to the space that pictures and texts share."""

from __future__ import annotations

import torch
from torch import nn


class ProjectionHead(nn.Module):
    """Linear, then a residual block with GELU and dropout, then LayerNorm.

    The head of the reference project (Mini-CLIP), as in M. M. Shariatnia, "Simple CLIP", 2021.

    Args:
        in_features: length of the tower's features.
        embed_dim: length of the embeddings.
        drop_rate: of the residual block, in [0, 1).
    """

    def __init__(self, in_features: int, embed_dim: int, drop_rate: float = 0.1) -> None:
        super().__init__()
        self.projection = nn.Linear(in_features, embed_dim)
        self.block = nn.Sequential(nn.GELU(), nn.Linear(embed_dim, embed_dim), nn.Dropout(drop_rate))
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Embeddings, not of unit length.

        Args:
            features: float ``(B, in_features)``.

        Returns:
            float ``(B, embed_dim)``.
        """
        projected = self.projection(features)
        embeddings: torch.Tensor = self.norm(projected + self.block(projected))
        return embeddings
