"""What a frozen text backbone made of texts, so that it need not read them again."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class TextMemory:
    """Features of texts.

    Args:
        texts: n different ones.
        features: float ``(n, D)``.
    """

    def __init__(self, texts: Sequence[str], features: torch.Tensor) -> None:
        self._places = {text: place for place, text in enumerate(texts)}
        self._features = features

    def recall(self, texts: Sequence[str]) -> torch.Tensor | None:
        """Features of texts, float ``(B, D)``; None if one of them is not remembered."""
        try:
            places = [self._places[text] for text in texts]
        except KeyError:
            return None
        return self._features[torch.tensor(places, dtype=torch.int64, device=self._features.device)]
