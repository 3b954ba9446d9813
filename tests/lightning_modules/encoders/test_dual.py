from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_modules.encoders.dual import Towers, build_towers
from lightning_modules.finetune import freeze
from lightning_modules.options import TowerOptions
from tests.support.models import TEXTS, write_bert, write_clip, write_siglip
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


def test_texts_longer_than_the_model_reads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model's 40 tokens"):
        build_towers(TowerOptions(image="test_resnet", text=str(write_bert(tmp_path)), max_length=64), 32)


def test_only_its_projections_are_trained_as_a_probe() -> None:
    with torch.device("meta"):
        small = build_towers(TowerOptions(model="openai/clip-rn50", pretrained=False, max_length=8), 64)
    assert small.train_tokenizer(["a red rose", "a white daisy"]).state["max_length"] == 8
    freeze(small, "towers")
    free = {name for name, parameter in small.named_parameters() if parameter.requires_grad}
    assert free == {"image_projection.weight", "image_projection.bias", "text_projection.weight"}


def some_images(size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def loaded(folder: Path, image_size: int = 32) -> Towers:
    towers = build_towers(TowerOptions(model=str(folder)), image_size).eval()
    towers.load_pretrained()
    return towers


@torch.no_grad()
def test_clip_gives_the_embeddings_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    folder = write_clip(tmp_path)
    towers, peer = loaded(folder), CLIPModel.from_pretrained(folder)
    image = some_images()
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    expected = peer.get_image_features(pixel_values=(image / 255 - mean) / std).pooler_output
    torch.testing.assert_close(towers.encode_image(image), expected)
    tokens = AutoTokenizer.from_pretrained(folder)(list(TEXTS), padding=True, truncation=True, return_tensors="pt")
    assert towers.tokenizer is not None
    ours = towers.encode_text(towers.tokenizer(list(TEXTS)))
    expected_text = peer.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
    torch.testing.assert_close(ours, expected_text)
    scale, bias = towers.pretrained_logit_scale()
    assert float(scale or 0) == pytest.approx(4.0)
    assert bias is None


@torch.no_grad()
def test_siglip_gives_the_embeddings_of_transformers(tmp_path: Path) -> None:
    from transformers import SiglipModel

    folder = write_siglip(tmp_path)
    towers, peer = loaded(folder), SiglipModel.from_pretrained(folder)
    image = some_images()
    expected = peer.get_image_features(pixel_values=(image / 255 - 0.5) / 0.5).pooler_output
    torch.testing.assert_close(towers.encode_image(image), expected)
    assert towers.tokenizer is not None
    tokens = towers.tokenizer(list(TEXTS))
    assert tokens["input_ids"].shape == (len(TEXTS), 12)
    torch.testing.assert_close(towers.encode_text(tokens), peer.get_text_features(tokens["input_ids"]).pooler_output)
    assert all(value is not None for value in towers.pretrained_logit_scale())
    assert towers.projections("image") == []


@torch.no_grad()
def test_other_texts_do_not_change_a_text_and_images_may_have_another_size(tmp_path: Path) -> None:
    towers = loaded(write_clip(tmp_path), image_size=48)
    assert towers.encode_image(some_images(48)).shape == (3, 16)
    assert towers.tokenizer is not None
    alone, among = (towers.encode_text(towers.tokenizer(texts)) for texts in ([TEXTS[0]], list(TEXTS)))
    torch.testing.assert_close(alone[0], among[0])


def test_a_configuration_is_enough_to_build_a_whole_model_again(tmp_path: Path) -> None:
    towers = build_towers(TowerOptions(model=str(write_clip(tmp_path / "clip"))), 32)
    again = build_towers(TowerOptions(model="/nowhere"), 32, towers.architectures)
    again.load_state_dict(towers.state_dict())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("openai/clip-vit-base-patch32", 151_277_312), ("openai/clip-vit-base-patch16", 149_620_736)],
)
def test_known_architectures_are_built_without_a_network(name: str, parameters: int) -> None:
    # As published, less the temperature.
    with torch.device("meta"):
        towers = build_towers(TowerOptions(model=name, pretrained=False), 224)
    assert sum(parameter.numel() for parameter in towers.parameters()) == parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either model, or image"),
        ({"model": "x", "text": "y"}, "text do not go with model"),
        ({"image": "resnet18", "text": "bert-base-uncased", "pretrained": False}, "towers.pretrained"),
        ({"model": "x", "colour": 1}, "unknown key 'colour'"),
        ({"model": "not a name!"}, "neither a local folder"),
    ],
)
def test_wrong_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_towers(options, 224)


def test_a_model_of_another_kind_or_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a bert"):
        build_towers(TowerOptions(model=str(write_bert(tmp_path / "bert"))), 32)
    with pytest.raises(UserError, match="patches of 8 px, 30 px"):
        build_towers(TowerOptions(model=str(write_clip(tmp_path / "clip"))), 30)


def test_without_a_network_the_fixes_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("lightning_modules.encoders.weights.reachable", lambda url, seconds: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with torch.device("meta"):
        towers = build_towers(TowerOptions(model="openai/clip-vit-base-patch32"), 224)
    with pytest.raises(UserError, match=r"towers.model: .*local folder.*pretrained: false"):
        towers.load_pretrained()


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """As long as anything is missing, nothing is copied: a network of random parts has no numbers worth a table."""
    towers = build_towers(TowerOptions(model=str(write_clip(tmp_path))), 32)
    before = {name: value.clone() for name, value in towers.state_dict().items()}
    weights = load_file(tmp_path / "model.safetensors")
    lost = "vision_model.post_layernorm.weight"
    save_file({n: v for n, v in weights.items() if n != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"does not fit: 1 missing \(vision_model\.post_layernorm\.weight\)"):
        towers.load_pretrained()
    assert all(torch.equal(value, before[name]) for name, value in towers.state_dict().items())
    assert towers.tokenizer is None
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        towers.load_pretrained()
