"""After a backward pass every trainable weight has a gradient; DDP would stop at the second step otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_modules.base import VisionTask
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.encoders.tokenizer import trained_tokenizer
from tests.lightning_modules.generative.tiny_answers import images, tiny_answerer
from tests.support.models import (
    SIZE,
    TEXTS,
    make_batch,
    pair_batch,
    tiny_classifier,
    tiny_multitask,
    write_clip,
    write_siglip,
)

_SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
_LLAMA = {**_SIZES, "num_key_value_heads": 1}
_SLOW_TEXT, _SLOW_IMAGE = {"roberta", "distilbert", "electra", "albert", "qwen2"}, {"test_vit4", "test_efficientnet"}
TEXT_TOWERS: dict[str, dict[str, Any]] = {
    "bert": _SIZES,
    "roberta": {**_SIZES, "pad_token_id": 1},
    "distilbert": {"dim": 24, "n_layers": 3, "n_heads": 2, "hidden_dim": 48},
    "electra": {**_SIZES, "embedding_size": 16},
    "albert": {**_SIZES, "embedding_size": 16},
    # Has projections for global attention, which nothing here asks for.
    "longformer": {**_SIZES, "attention_window": 4},
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 2, "n_positions": 40},
    "qwen2": _LLAMA,
    "llama": _LLAMA,
}
IMAGE_TOWERS = ("test_vit", "test_vit4", "test_convnext", "test_resnet", "test_efficientnet")
MODES: list[dict[str, Any]] = [
    {},
    *({"freeze": mode} for mode in ("text_only", "vision_only", "early_layers", "towers")),
    *({"lora": {"rank": 2, "towers": towers}} for towers in ("both", "image", "text")),
    {"lora": {"rank": 2}, "freeze": "towers"},
    {"logit_scale": {"trainable": False}},
    {"loss": "sigmoid", "chunk_size": 2},
]


def without_gradient(task: VisionTask) -> list[str]:
    """Names of the trainable weights that got none; there must be some that got one."""
    trainable = {name: value for name, value in task.named_parameters() if value.requires_grad}
    assert trainable
    return [name for name, value in trainable.items() if value.grad is None]


def check_pair(towers: dict[str, Any], mode: dict[str, Any]) -> None:
    options: Any = {"loss": "info_nce", **mode}
    task = DualEncoder(towers, image_size=SIZE, **options)  # type: ignore[arg-type]  # plain options
    task.fetch_weights()
    task.towers.tokenizer = trained_tokenizer(TEXTS, 400, 20, fixed_length=False)
    task.train()
    task._training_loss(pair_batch([0, 1, 2, 3])).backward()  # type: ignore[no-untyped-call]  # torch's
    assert without_gradient(task) == []


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_models_that_were_pretrained_as_a_whole(kind: str, mode: dict[str, Any], tmp_path: Path) -> None:
    if kind == "siglip" and mode.get("freeze") == "towers":
        pytest.skip("SigLIP has no projections of its own: this mode is refused")
    write = write_clip if kind == "clip" else write_siglip
    check_pair({"model": str(write(tmp_path)), "pretrained": False}, mode)


def two_towers(folder: Path, image: str, text: str) -> dict[str, Any]:
    values = {"model_type": text, "vocab_size": 400, "max_position_embeddings": 40, **TEXT_TOWERS[text]}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    names = {"image": image, "image_pretrained": False, "text": str(folder), "text_pretrained": False}
    return {**names, "embed_dim": 8, "pooling": "mean"}


def marked(names: Iterable[str], slow: set[str]) -> list[Any]:
    """The names, some as slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def is_let_in(image: str, text: str, mode: dict[str, Any]) -> bool:
    """GPT-2's attention is no linear layer to torch, and convolutions have none: such adapters are refused.

    All layers of ALBERT are one, and the stages of the tiny ResNet have one block each: neither has a last two.
    """
    if (text == "albert" or image == "test_resnet") and mode.get("freeze") == "early_layers":
        return False
    chosen = mode.get("lora", {}).get("towers", "both") if "lora" in mode else ""
    return not (chosen in ("both", "text") and text == "gpt2") and not (
        chosen in ("both", "image") and "vit" not in image
    )


@pytest.mark.parametrize("text", marked(TEXT_TOWERS, _SLOW_TEXT))
def test_text_towers(text: str, tmp_path: Path) -> None:
    towers = two_towers(tmp_path, "test_vit", text)
    for mode in MODES:
        if is_let_in("test_vit", text, mode):
            check_pair(towers, mode)


@pytest.mark.parametrize("image", marked(IMAGE_TOWERS[1:], _SLOW_IMAGE))  # the first is with all texts above
def test_image_towers(image: str, tmp_path: Path) -> None:
    towers = two_towers(tmp_path, image, "bert")
    for mode in MODES:
        if is_let_in(image, "bert", mode):
            check_pair(towers, mode)


@pytest.mark.parametrize("backbone", marked(IMAGE_TOWERS, _SLOW_IMAGE))
@pytest.mark.parametrize("frozen", [False, True])
def test_classifiers(backbone: str, frozen: bool) -> None:
    for make in (tiny_classifier, tiny_multitask):
        task: VisionTask = make(backbone=backbone)
        if frozen:
            task.freeze_backbone()
        task.train()
        loss, _ = task._shared_step(make_batch([0, 1, 2]), "train")
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        assert without_gradient(task) == []
        if frozen:
            task.unfreeze_backbone()
            task._shared_step(make_batch([0, 1, 2]), "train")[0].backward()  # type: ignore[no-untyped-call]
            assert without_gradient(task) == []


@pytest.mark.parametrize("lora", [None, *({"rank": 2, "parts": part} for part in ("language", "vision", "both"))])
def test_generative_classifiers(lora: Any, tmp_path: Path) -> None:
    task = tiny_answerer(tmp_path, lora=lora)
    task.load_pretrained()
    task.train()
    label = torch.tensor([0, 1])
    batch: Any = {"image": images(2), "label": label, "attributes": {"colour": label}, "sample_id": label}
    task._shared_step(batch, "train")[0].backward()  # type: ignore[no-untyped-call]  # torch's
    assert without_gradient(task) == []


def test_a_weight_that_nothing_uses_is_found() -> None:
    task = tiny_classifier()
    task.unused = nn.Linear(2, 2)
    task.train()
    task._shared_step(make_batch([0, 1]), "train")[0].backward()  # type: ignore[no-untyped-call]  # torch's
    assert without_gradient(task) == ["unused.weight", "unused.bias"]
