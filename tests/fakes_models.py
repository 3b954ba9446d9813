"""Tiny models of the true architectures, with random weights, as directories of the ``transformers`` library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TEXTS = (
    "a photo of a rose.",
    "a photo of a tulip.",
    "a photo of a daisy.",
    "two dogs play in the snow",
    "a red bicycle leans against a wall",
)


def write_clip(folder: Path, *, image_size: int = 32, scale: float = 4.0) -> Path:
    """Writes a CLIP with two layers a tower, its byte-pair tokenizer and its preprocessing.

    Args:
        folder: made where missing.
        image_size: that it is built for, a multiple of 8.
        scale: logarithm of its temperature's inverse.

    Returns:
        The folder.
    """
    from transformers import CLIPConfig, CLIPModel

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 16,
    }
    special = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 3}
    config = CLIPConfig(
        text_config={**sizes, **special, "vocab_size": 400, "max_position_embeddings": 20},
        vision_config={**sizes, "image_size": image_size, "patch_size": 8},
        projection_dim=16,
        logit_scale_init_value=scale,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    _write_tokenizer(folder, "CLIPTokenizer", pad="<end>")
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics), encoding="utf-8")
    return folder


def write_siglip(folder: Path) -> Path:
    """Writes a SigLIP with two layers a tower and a tokenizer."""
    from transformers import SiglipConfig, SiglipModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    text = {**sizes, **special, "vocab_size": 400, "max_position_embeddings": 12, "projection_size": 32}
    torch.manual_seed(0)
    SiglipModel(
        SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8})
    ).save_pretrained(folder)
    _write_tokenizer(folder, "PreTrainedTokenizerFast", pad="<pad>")
    return folder


def write_bert(folder: Path, *, pooling: str = "", kind: str = "bert") -> Path:
    """Writes a BERT or DistilBERT with two layers, its tokenizer and, where wanted, a pooling rule.

    Args:
        folder: made where missing.
        pooling: ``mean`` or ``cls`` for a ``1_Pooling/config.json``.
        kind: ``bert`` or ``distilbert``.

    Returns:
        The folder.
    """
    from transformers import AutoModel, BertConfig, DistilBertConfig

    config: Any
    if kind == "bert":
        config = BertConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            vocab_size=400,
            max_position_embeddings=40,
        )
    else:
        config = DistilBertConfig(
            dim=24, n_layers=2, n_heads=2, hidden_dim=48, vocab_size=400, max_position_embeddings=40
        )
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)  # type: ignore[no-untyped-call]  # the library's own
    _write_tokenizer(folder, "PreTrainedTokenizerFast", pad="<pad>")
    if pooling:
        rules = {"pooling_mode_mean_tokens": pooling == "mean", "pooling_mode_cls_token": pooling == "cls"}
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(rules), encoding="utf-8")
    return folder


def _write_tokenizer(folder: Path, kind: str, *, pad: str) -> None:
    from lightning_modules.text_tokenizer import trained_tokenizer

    state = trained_tokenizer(TEXTS, 400, 20, fixed_length=False).state
    (folder / "tokenizer.json").write_text(state["pipeline"], encoding="utf-8")
    names = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": pad, "unk_token": "<unknown>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 20, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
