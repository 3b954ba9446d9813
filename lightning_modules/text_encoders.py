"""Text encoders: from token ids to one feature vector a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import nn

from datamodules.schema import UserError
from lightning_modules.text_tokenizer import TextTokenizer, Tokens, pretrained_tokenizer, trained_tokenizer
from lightning_modules.transformers_models import Configuration, build_model, load_model
from lightning_modules.weights import hub_directory

PoolingRule = Literal["cls", "eos", "mean"]
Pooling = Literal["auto", "cls", "eos", "mean"]

_LAST_TOKEN = {"gpt2", "clip_text_model", "clip", "llama", "qwen2", "mistral"}
"""Kinds of models that read from left to right, so that only the last token has seen the whole text."""


class TextEncoder(nn.Module):
    """A ``transformers`` text model with a pooling rule.

    Args:
        name: local folder or name on the hub that the weights come from.
        configuration: of the model.
        pretrained: whether it will have pretrained weights.
        pooling: ``cls`` takes the first token, ``eos`` the last, ``mean`` the mean of all that are no padding.
        max_length: longest text in tokens.

    Attributes:
        num_features: length of a feature vector.
        tokenizer: None until the weights are loaded or ``train_tokenizer`` was called.

    Raises:
        UserError: if the length or the pooling does not fit the model.
    """

    def __init__(
        self, name: str, configuration: Configuration, *, pretrained: bool, pooling: PoolingRule, max_length: int
    ) -> None:
        super().__init__()
        self.name = name
        self.pretrained = pretrained
        self.configuration = configuration
        self.max_length = checked_length(configuration, max_length)
        self.pooling = pooling
        self.backbone = build_model(configuration)
        self.num_features = int(configuration.hidden_size)
        self.tokenizer: TextTokenizer | None = None
        self._loaded = not pretrained

    def forward(self, tokens: Tokens) -> torch.Tensor:
        """Features of texts.

        Args:
            tokens: B texts.

        Returns:
            float ``(B, num_features)``.
        """
        hidden = self.backbone(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        mask = tokens["attention_mask"]
        if self.pooling == "cls":
            return cast("torch.Tensor", hidden[:, 0])
        if self.pooling == "eos":
            return cast("torch.Tensor", hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1])
        weights = mask[..., None].to(hidden.dtype)
        return cast("torch.Tensor", (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1))

    def load_pretrained(self) -> None:
        """Replace the random weights by the pretrained ones and take their tokenizer, once.

        Raises:
            UserError: if they cannot be had or do not fit.
        """
        if self._loaded:
            return
        directory = self.name if Path(self.name).is_dir() else hub_directory(self.name, "towers.text")
        load_model(self.backbone, directory, "towers.text")
        self.tokenizer = pretrained_tokenizer(directory, self.max_length, fixed_length=False)
        self._loaded = True

    def train_tokenizer(self, texts: list[str]) -> TextTokenizer:
        """A tokenizer learned from texts, as large as the model's vocabulary allows."""
        return trained_tokenizer(texts, int(self.configuration.vocab_size), self.max_length, fixed_length=False)


def longest_text(configuration: Configuration) -> int:
    """Tokens that the model's position embeddings allow; very many where it has none."""
    return int(getattr(configuration, "max_position_embeddings", 1_000_000))


def checked_length(configuration: Configuration, max_length: int) -> int:
    """The length if the model's position embeddings allow it.

    Raises:
        UserError: if not.
    """
    longest = longest_text(configuration)
    if not 3 <= max_length <= longest:
        raise UserError(f"towers.max_length: must be between 3 and the model's {longest} tokens, got {max_length}")
    return max_length


def pooling_rule(directory: str, configuration: Configuration, pooling: Pooling) -> PoolingRule:
    """The rule by which a model makes one vector of many.

    Args:
        directory: local folder of the model, or empty where there is none.
        configuration: of the model.
        pooling: the rule, or ``auto`` for the model's own: what its ``1_Pooling/config.json`` says
            (sentence-transformers), else the last token where it reads from left to right, else the first.

    Raises:
        UserError: if it is unknown.
    """
    if pooling not in get_args(Pooling):
        raise UserError(f"towers.pooling: {pooling!r} is unknown; choose one of {', '.join(get_args(Pooling))}")
    if pooling != "auto":
        return pooling
    path = Path(directory) / "1_Pooling" / "config.json"
    if directory and path.is_file():
        rules = json.loads(path.read_text(encoding="utf-8"))
        if rules.get("pooling_mode_mean_tokens"):
            return "mean"
        if rules.get("pooling_mode_cls_token"):
            return "cls"
        raise UserError(f"towers.pooling: {path} asks for another rule than cls or mean; choose cls, eos or mean")
    return "eos" if configuration.model_type in _LAST_TOKEN else "cls"
