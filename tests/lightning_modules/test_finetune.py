from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_modules.encoders.dual import Towers, build_towers
from lightning_modules.finetune import add_lora, freeze, without_base
from lightning_modules.generative.model import VisionLanguageModel
from lightning_modules.options import LanguageLoraOptions, LoraOptions, MemoryOptions, TowerOptions
from tests.support.models import write_bert, write_clip, write_qwen2_vl, write_siglip
from vitrail.errors import UserError


def clip(name: str, size: int) -> Towers:
    # Without memory for the weights: only their number is asked.
    with torch.device("meta"):
        return build_towers(TowerOptions(model=name, pretrained=False), size)


def trainable(towers: Towers) -> int:
    return sum(parameter.numel() for parameter in towers.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("name", "size", "millions"),
    [("openai/clip-vit-base-patch32", 224, 21.14), ("openai/clip-vit-large-patch14-336", 336, 40.75)],
)
def test_early_layers_leaves_the_reference_numbers_of_parameters(name: str, size: int, millions: float) -> None:
    towers = clip(name, size)
    freeze(towers, "early_layers")
    assert round(trainable(towers) / 1e6, 2) == millions  # without the logit scale


def test_each_mode_leaves_its_part() -> None:
    counts = {}
    for mode in ("none", "text_only", "vision_only", "towers"):
        towers = clip("openai/clip-vit-base-patch32", 224)
        freeze(towers, mode)
        counts[mode] = trainable(towers)
    image, text = (sum(p.numel() for p in towers.backbone(side).parameters()) for side in ("image", "text"))
    assert counts["none"] == image + text + 768 * 512 + 512 * 512
    assert counts["text_only"] == image + 768 * 512
    assert counts["vision_only"] == text + 512 * 512
    assert counts["towers"] == 768 * 512 + 512 * 512


def test_a_residual_network_keeps_its_last_two_blocks() -> None:
    towers = build_towers(
        TowerOptions(image="resnet18", image_pretrained=False, text="bert-base-uncased", text_pretrained=False), 64
    )
    freeze(towers, "early_layers")
    free = {name for name, parameter in towers.backbone("image").named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in free} == {"layer4"}


def test_a_model_without_projections_has_nothing_to_train(tmp_path: Path) -> None:
    towers = build_towers(TowerOptions(model=str(write_siglip(tmp_path))), 32)
    with pytest.raises(UserError, match="nothing to train"):
        freeze(towers, "towers")


def test_adapters_are_the_only_free_weights_of_the_towers_that_were_chosen(tmp_path: Path) -> None:
    for chosen in ("both", "image", "text"):
        towers = build_towers(TowerOptions(model=str(write_clip(tmp_path)), pretrained=False), 32)
        add_lora(towers, LoraOptions(rank=3, towers=chosen), 32)
        for side in ("image", "text"):
            free = [name for name, p in towers.backbone(side).named_parameters() if p.requires_grad]
            assert all("lora_" in name for name in free)
            # Four linear layers in each of two blocks, two matrices each.
            assert len(free) == (16 if chosen in {"both", side} else 0)


def test_pretrained_weights_find_their_place_beneath_the_adapters(tmp_path: Path) -> None:
    from transformers import CLIPModel

    folder = write_clip(tmp_path)
    towers = build_towers(TowerOptions(model=str(folder)), 32)
    add_lora(towers, LoraOptions(), 32)
    towers.load_pretrained()
    peer = CLIPModel.from_pretrained(folder).state_dict()
    own = {name.replace(".base_layer.", "."): value for name, value in towers.state_dict().items()}
    for name, value in peer.items():
        assert own[f"model.{name}"].equal(value), name


def test_a_network_without_attention_cannot_be_adapted(tmp_path: Path) -> None:
    towers = build_towers(TowerOptions(image="test_resnet", image_pretrained=False, text=str(write_bert(tmp_path))), 32)
    with pytest.raises(UserError, match="image tower has no attention layers"):
        add_lora(towers, LoraOptions(), 32)
    add_lora(towers, LoraOptions(towers="text"), 32)


def test_layers_whose_weights_are_read_without_calling_them_get_no_adapters(tmp_path: Path) -> None:
    towers = build_towers(TowerOptions(model=str(write_siglip(tmp_path)), pretrained=False), 32)
    add_lora(towers, LoraOptions(rank=2), 32)
    adapted = [name for name, module in towers.named_modules() if hasattr(module, "lora_A")]
    # Four layers in each of two blocks of both towers; not the out_proj of the head's nn.MultiheadAttention.
    assert len(adapted) == 16
    assert not [name for name in adapted if "head" in name]
    assert all(module.training for module in towers.modules())


def test_a_tower_that_only_reads_its_weights_cannot_be_adapted(tmp_path: Path) -> None:
    class Reader(nn.Module):
        """As timm's BEiT and Swin Transformer V2 do."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(3, 3)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(image.mean(dim=(2, 3)), self.qkv.weight)

    towers: Any = build_towers(
        TowerOptions(image="test_resnet", image_pretrained=False, text=str(write_bert(tmp_path))), 32
    )
    towers.image.backbone = Reader()
    with pytest.raises(UserError, match=r"the image tower never calls its attention layers \(qkv"):
        add_lora(towers, LoraOptions(), 32)


@pytest.mark.parametrize(("part", "matrices"), [("language", 16), ("vision", 8), ("both", 24)])
def test_adapters_of_a_language_model_are_the_only_free_weights_and_begin_as_nothing(
    tmp_path: Path, part: Any, matrices: int
) -> None:
    folder = str(write_qwen2_vl(tmp_path))
    memory = MemoryOptions(precision="bfloat16")
    plain = VisionLanguageModel(folder, image_size=32, texts=[], memory=memory)
    adapted = VisionLanguageModel(
        folder, image_size=32, texts=[], memory=memory, lora=LanguageLoraOptions(rank=3, parts=part)
    )
    for model in (plain, adapted):
        model.load()
    free = {name: value for name, value in adapted.model.named_parameters() if value.requires_grad}
    # Two blocks with four linear layers in the language model, two in the vision tower; two matrices each.
    assert len(free) == matrices
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in free.items())
    assert {"visual" in name for name in free} == {"language": {False}, "vision": {True}, "both": {True, False}}[part]
    image = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(adapted.eval().encode_images(image).features, plain.eval().encode_images(image).features)


def test_what_a_checkpoint_needs_of_an_adapted_network() -> None:
    state = {"net.a.lora_A.weight": 1, "net.a.base_layer.weight": 2, "net.b": 3, "head.b": 4}
    assert without_base(state, "net.") == {"net.a.lora_A.weight": 1, "head.b": 4}
