from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.schema import UserError
from lightning_modules.lora import add_lora, without_base
from lightning_modules.towers import build_towers
from lightning_modules.vision_language import VisionLanguageModel
from tests.fakes_models import write_bert, write_clip, write_qwen2_vl


def test_adapters_are_the_only_free_weights_of_the_towers_that_were_chosen(tmp_path: Path) -> None:
    for chosen in ("both", "image", "text"):
        towers = build_towers({"model": str(write_clip(tmp_path)), "pretrained": False}, 32)
        add_lora(towers, {"rank": 3, "towers": chosen})
        for side in ("image", "text"):
            free = [name for name, p in towers.backbone(side).named_parameters() if p.requires_grad]
            assert all("lora_" in name for name in free)
            # Four linear layers in each of two blocks, two matrices each.
            assert len(free) == (16 if chosen in {"both", side} else 0)


def test_pretrained_weights_find_their_place_beneath_the_adapters(tmp_path: Path) -> None:
    from transformers import CLIPModel

    folder = write_clip(tmp_path)
    towers = build_towers({"model": str(folder)}, 32)
    add_lora(towers, {})
    towers.load_pretrained()
    peer = CLIPModel.from_pretrained(folder).state_dict()
    own = {name.replace(".base_layer.", "."): value for name, value in towers.state_dict().items()}
    for name, value in peer.items():
        assert own[f"model.{name}"].equal(value), name


def test_a_network_without_attention_cannot_be_adapted(tmp_path: Path) -> None:
    towers = build_towers({"image": "test_resnet", "image_pretrained": False, "text": str(write_bert(tmp_path))}, 32)
    with pytest.raises(UserError, match="image tower has no attention layers"):
        add_lora(towers, {})
    add_lora(towers, {"towers": "text"})


@pytest.mark.parametrize(("part", "matrices"), [("language", 16), ("vision", 8), ("both", 24)])
def test_adapters_of_a_language_model_are_the_only_free_weights_and_begin_as_nothing(
    tmp_path: Path, part: Any, matrices: int
) -> None:
    folder = str(write_qwen2_vl(tmp_path))
    memory: Any = {"precision": "bfloat16"}
    plain = VisionLanguageModel(folder, image_size=32, texts=[], memory=memory)
    adapted = VisionLanguageModel(folder, image_size=32, texts=[], memory=memory, lora={"rank": 3, "parts": part})
    for model in (plain, adapted):
        model.load()
    free = {name: value for name, value in adapted.model.named_parameters() if value.requires_grad}
    # Two blocks with four linear layers in the language model, two in the vision tower; two matrices each.
    assert len(free) == matrices
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in free.items())
    assert {"visual" in name for name in free} == {"language": {False}, "vision": {True}, "both": {True, False}}[part]
    image = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(adapted.eval().encode_pictures(image).features, plain.eval().encode_pictures(image).features)


def test_what_a_checkpoint_needs_of_an_adapted_network() -> None:
    state = {"net.a.lora_A.weight": 1, "net.a.base_layer.weight": 2, "net.b": 3, "head.b": 4}
    assert without_base(state, "net.") == {"net.a.lora_A.weight": 1, "head.b": 4}
