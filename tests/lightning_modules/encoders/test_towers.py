from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_modules.encoders.dual import build_towers
from tests.fakes_models import TEXTS, write_bert
from vitrail.errors import UserError


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@torch.no_grad()
def test_text_features_are_pooled_by_the_models_own_rule(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModel

    for pooling in ("", "mean", "cls"):
        folder = write_bert(tmp_path / (pooling or "own"), pooling=pooling, kind=kind)
        towers = build_towers({"image": "test_resnet", "image_pretrained": False, "text": str(folder)}, 32).eval()
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
    towers = build_towers({"image": "test_vit", "image_pretrained": False, "text": folder, "embed_dim": 12}, 160)
    assert towers.encode_image(torch.zeros(2, 3, 160, 160, dtype=torch.uint8)).shape == (2, 12)
    assert not towers.wholly_pretrained


def test_a_configuration_is_enough_to_build_it_again(tmp_path: Path) -> None:
    folder = str(write_bert(tmp_path, pooling="mean"))
    towers = build_towers({"image": "test_resnet", "image_pretrained": False, "text": folder}, 32)
    again = build_towers({"image": "test_resnet", "text": "/nowhere"}, 32, towers.architectures)
    again.load_state_dict(towers.state_dict())
    assert again.text.pooling == "mean"  # type: ignore[union-attr]  # a text encoder


def test_texts_longer_than_the_model_reads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model's 40 tokens"):
        build_towers({"image": "test_resnet", "text": str(write_bert(tmp_path)), "max_length": 64}, 32)
