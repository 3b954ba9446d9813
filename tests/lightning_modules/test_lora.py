from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.schema import UserError
from lightning_modules.lora import add_lora
from lightning_modules.towers import build_towers
from tests.fakes_models import write_bert, write_clip


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
