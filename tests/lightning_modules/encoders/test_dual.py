""""""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_modules.encoders.dual import RESNETS, SIDES, Towers, build_towers
from lightning_modules.finetune import freeze
from lightning_modules.options import TowerOptions
from tests.support.models import TEXTS, write_bert
from vitrail.errors import UserError


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@torch.no_grad()
def test_text_features_are_pooled_by_the_models_own_rule(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModel

    for pooling in ("", "mean", "cls"):
        folder = write_bert(tmp_path / (pooling or "own"), pooling=pooling, kind=kind)
        towers = build_towers(TowerOptions(image="test_resnet", image_pretrained=False, text=str(folder)), 32).eval()
        towers.load_pretrained()
        assert towers.tokenizer is not None
        tokens = towers.tokenizer(list(TEXTS))
        hidden = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        expected = (hidden * mask).sum(1) / mask.sum(1) if pooling == "mean" else hidden[:, 0]
        torch.testing.assert_close(towers.text(tokens), expected)  # type: ignore[operator]  # a module


@torch.no_grad()
def test_the_last_token_can_be_chosen(tmp_path: Path) -> None:
    options = {"image": "test_resnet", "image_pretrained": False, "text": str(write_bert(tmp_path)), "pooling": "eos"}
    towers = build_towers(options, 32).eval()  # type: ignore[arg-type]  # a plain dictionary
    towers.load_pretrained()
    assert towers.tokenizer is not None
    alone, among = (towers.encode_text(towers.tokenizer(texts)) for texts in ([TEXTS[0]], list(TEXTS)))
    torch.testing.assert_close(alone[0], among[0])


def test_embeddings_have_the_length_that_was_asked_for(tmp_path: Path) -> None:
    folder = str(write_bert(tmp_path))
    towers = build_towers(TowerOptions(image="test_vit", image_pretrained=False, text=folder, embed_dim=12), 160)
    assert towers.encode_image(torch.zeros(2, 3, 160, 160, dtype=torch.uint8)).shape == (2, 12)
    assert not towers.wholly_pretrained


def test_a_configuration_is_enough_to_build_it_again(tmp_path: Path) -> None:
    folder = str(write_bert(tmp_path, pooling="mean"))
    towers = build_towers(TowerOptions(image="test_resnet", image_pretrained=False, text=folder), 32)
    again = build_towers(TowerOptions(image="test_resnet", text="/nowhere"), 32, towers.architectures)
    again.load_state_dict(towers.state_dict())
    assert again.text.pooling == "mean"  # type: ignore[union-attr]  # a text encoder


def test_texts_longer_than_the_model_reads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model's 40 tokens"):
        build_towers(TowerOptions(image="test_resnet", text=str(write_bert(tmp_path)), max_length=64), 32)


SIZES = {"rn50": 224, "rn101": 224, "rn50x4": 288, "rn50x16": 384, "rn50x64": 448}


def numbers(towers: Towers) -> tuple[int, int]:
    """Parameters of the image side and of the text side."""
    parts = [[towers.backbone(side), *towers.projections(side)] for side in SIDES]
    image, text = (sum(p.numel() for part in side for p in part.parameters()) for side in parts)
    return image, text


@pytest.mark.parametrize("name", RESNETS)
def test_towers_are_as_large_as_open_clip_has_them(name: str) -> None:
    import open_clip
    from open_clip.model import CLIP

    kind = name.removeprefix("openai/clip-")
    values = open_clip.get_model_config(kind.upper().replace("X", "x"))
    with torch.device("meta"):
        peer = CLIP(**values)
        towers = build_towers(TowerOptions(model=name, pretrained=False), SIZES[kind])
    total = sum(p.numel() for p in peer.parameters()) - 1  # without the temperature
    image = sum(p.numel() for p in peer.visual.parameters())
    assert numbers(towers) == (image, total - image)
    assert towers.embed_dim == values["embed_dim"]
    assert towers.input_options["size"] == values["vision_cfg"]["image_size"] == SIZES[kind]


@pytest.fixture(scope="module")
def small() -> Towers:
    return build_towers(TowerOptions(model="openai/clip-rn50", pretrained=False, max_length=8), 64)


def test_both_sides_meet_in_one_space_and_texts_end_where_they_end(small: Towers) -> None:
    small.eval()
    ids = torch.tensor([[1, 5, 6, 3, 0, 0, 0, 0], [1, 5, 6, 3, 9, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]])
    with torch.no_grad():
        images = small.encode_image(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
        texts = small.encode_text({"input_ids": ids, "attention_mask": mask})
    assert images.shape == texts.shape == (2, 1024)
    assert torch.isfinite(images).all()
    # The summary is read at the end token, and what follows it is not seen from there.
    torch.testing.assert_close(texts[0], texts[1])


def test_its_tokenizer_is_trained(small: Towers) -> None:
    tokenizer = small.train_tokenizer(["a red rose", "a white daisy"])
    assert tokenizer.state["max_length"] == 8


def test_a_probe_leaves_the_two_maps_into_the_space(small: Towers) -> None:
    freeze(small, "towers")
    free = {name for name, parameter in small.named_parameters() if parameter.requires_grad}
    assert free == {"image_projection.weight", "image_projection.bias", "text_projection.weight"}


def test_pretrained_weights_are_refused() -> None:
    with pytest.raises(UserError, match="pretrained: false"):
        build_towers(TowerOptions(model="openai/clip-rn50"), 224)
