from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_modules.encoders.dual import Towers, build_towers
from lightning_modules.finetune import freeze
from tests.fakes_models import write_siglip
from vitrail.errors import UserError


def clip(name: str, size: int) -> Towers:
    # Without memory for the weights: only their number is asked.
    with torch.device("meta"):
        return build_towers({"model": name, "pretrained": False}, size)


def trainable(towers: Towers) -> int:
    return sum(parameter.numel() for parameter in towers.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("name", "size", "millions"),
    [("openai/clip-vit-base-patch32", 224, 21.14), ("openai/clip-vit-large-patch14-336", 336, 40.75)],
)
def test_early_layers_leaves_the_reference_numbers_of_parameters(name: str, size: int, millions: float) -> None:
    towers = clip(name, size)
    freeze(towers, "early_layers")
    assert round(trainable(towers) / 1e6, 2) == millions  # the temperature, one more, is counted apart


def test_each_mode_leaves_its_part() -> None:
    counts = {}
    for mode in ("none", "text_only", "vision_only", "towers"):
        towers = clip("openai/clip-vit-base-patch32", 224)
        freeze(towers, mode)
        counts[mode] = trainable(towers)
    towers = clip("openai/clip-vit-base-patch32", 224)
    image, text = (sum(p.numel() for p in towers.backbone(side).parameters()) for side in ("image", "text"))
    assert counts["none"] == image + text + 768 * 512 + 512 * 512
    assert counts["text_only"] == image + 768 * 512
    assert counts["vision_only"] == text + 512 * 512
    assert counts["towers"] == 768 * 512 + 512 * 512


def test_a_residual_network_keeps_its_last_two_blocks() -> None:
    towers = build_towers(
        {"image": "resnet18", "image_pretrained": False, "text": "bert-base-uncased", "text_pretrained": False}, 64
    )
    freeze(towers, "early_layers")
    free = {name for name, parameter in towers.backbone("image").named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in free} == {"layer4"}


def test_a_model_without_projections_has_nothing_left_to_learn(tmp_path: Path) -> None:
    towers = build_towers({"model": str(write_siglip(tmp_path))}, 32)
    with pytest.raises(UserError, match="nothing to learn"):
        freeze(towers, "towers")
