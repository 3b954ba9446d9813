"""Captions as a second objective of a dual encoder.

Yu et al., "CoCa: Contrastive Captioners are Image-Text Foundation Models", TMLR 2022, arXiv 2205.01917. In the paper
the first half of the text decoder is also the contrastive text tower. Text towers here may attend to what follows a
token, from which it could be copied, so the decoder is apart: it has token embeddings and causal self-attention of its
own, and attends to the images alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.options import CaptioningOptions

_IGNORED = -100
_HEAD_WIDTH = 64


class Captioner(nn.Module):
    """An attentional pooler of image tokens, and a causal decoder of captions that attends to what it pools.

    Args:
        options: sizes.
        image_width: W, length of an image token.
        vocabulary_size: V.
        max_length: most tokens of a caption.
    """

    def __init__(self, options: CaptioningOptions, image_width: int, vocabulary_size: int, max_length: int) -> None:
        super().__init__()
        width, heads = options.width, max(options.width // _HEAD_WIDTH, 1)
        self.weight, self.max_length = options.weight, max_length
        self.image_projection = nn.Sequential(nn.Linear(image_width, width), nn.LayerNorm(width))
        self.queries = nn.Parameter(0.02 * torch.randn(options.queries, width))
        self.pooler = nn.MultiheadAttention(width, heads, batch_first=True)
        self.pooler_norm = nn.LayerNorm(width)
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.tokens = nn.Parameter(0.02 * torch.randn(vocabulary_size, width))  # of inputs and outputs alike
        self.positions = nn.Parameter(0.02 * torch.randn(max_length, width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, heads, 4 * width, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(options.layers)
        )
        self.norm = nn.LayerNorm(width)

    def pooled(self, image: torch.Tensor) -> torch.Tensor:
        """What the decoder attends to, float ``(B, Q, D)``, of image tokens, float ``(B, N, W)``."""
        image = self.image_projection(image)
        pooled, _ = self.pooler(self.queries.expand(len(image), -1, -1), image, image, need_weights=False)
        normalised: torch.Tensor = self.pooler_norm(pooled)
        return normalised

    def logits(self, pooled: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the tokens after 0, 1, … n given ones, float32 ``(B, n + 1, V)``.

        Args:
            pooled: of the images, float ``(B, Q, D)``.
            ids: the given tokens, int64 ``(B, n)``.
        """
        hidden = torch.cat([self.start.expand(len(ids), 1, -1), F.embedding(ids, self.tokens)], dim=1)
        hidden = hidden + self.positions[: hidden.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1], hidden.device, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, pooled, tgt_mask=mask, tgt_is_causal=True)
        return F.linear(self.norm(hidden), self.tokens).float()

    def forward(self, image: torch.Tensor, ids: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the tokens given the image and those before each, summed by caption, float32 ``(B,)``.

        Args:
            image: image tokens, float ``(B, N, W)``.
            ids: tokens of the captions, with their special ones, int64 ``(B, L)``.
            attended: 0 for padding, on either side, int64 ``(B, L)``.
        """
        last = (attended == 0).int().argsort(dim=1, stable=True)  # padding to the end
        targets = ids.masked_fill(attended == 0, _IGNORED).gather(1, last)
        logits = self.logits(self.pooled(image), targets[:, :-1].clamp(min=0))
        return F.cross_entropy(logits.mT, targets, ignore_index=_IGNORED, reduction="none").sum(dim=1)

    @torch.no_grad()
    def generate(self, image: torch.Tensor, end_id: int | None) -> list[list[int]]:
        """The most probable token after the other, up to the end token; image tokens are float ``(B, N, W)``."""
        pooled = self.pooled(image)
        ids = torch.zeros(len(image), 0, dtype=torch.int64, device=image.device)
        ended = torch.zeros(len(image), dtype=torch.bool, device=image.device)
        while ids.shape[1] < self.max_length and not ended.all():
            following = self.logits(pooled, ids)[:, -1].argmax(dim=-1)
            ids = torch.cat([ids, following[:, None]], dim=1)
            ended |= following == end_id
        rows = ids.tolist()
        return [row[: row.index(end_id)] if end_id in row else row for row in rows]
