from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, BertConfig

from lightning_modules.encoders.dual import TwoTowers, build_towers
from lightning_modules.encoders.text import pooling_rule
from lightning_modules.options import TowerOptions
from tests.support.models import TEXTS, write_bert, write_siglip, write_text_model
from vitrail.errors import UserError

GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
MODERN = {"bos_token_id": 1, "eos_token_id": 3, "cls_token_id": 1, "sep_token_id": 3, "pad_token_id": 0}


def tower(name: Path | str, **options: Any) -> TwoTowers:
    chosen: Any = {"image": "test_resnet", "image_pretrained": False, "text": str(name), **options}
    towers = build_towers(chosen, 32)
    assert isinstance(towers, TwoTowers)
    return towers.eval()


def refusal(name: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as refused:
        tower(name, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("opt", {"word_embed_proj_dim": 24, "ffn_dim": 64}),
        ("qwen2", {"num_key_value_heads": 2}),
        ("qwen3", GROUPED),
        ("gemma", GROUPED),
        ("gemma3_text", GROUPED),
        ("bert", {"is_decoder": True}),
    ],
)
@torch.no_grad()
def test_models_that_read_from_left_to_right_are_pooled_at_the_last_token(
    tmp_path: Path, kind: str, values: dict[str, Any]
) -> None:
    from transformers import AutoModel

    folder = write_text_model(tmp_path, kind, **values)
    towers = tower(folder)
    towers.load_pretrained()
    assert towers.tokenizer is not None
    tokens = towers.tokenizer(list(TEXTS))
    # The last token is looked up by the text alone, without any padding.
    peer = AutoModel.from_pretrained(folder).eval()
    alone = [peer(input_ids=towers.tokenizer([text])["input_ids"]).last_hidden_state[0, -1] for text in TEXTS]
    torch.testing.assert_close(towers.text_features(tokens), torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert towers.text_features(tokens).std(dim=0).max() > 1e-3
    assert "from left to right" in refusal(folder, pooling="cls")


@pytest.mark.parametrize(("kind", "pooling"), [("gpt2", "eos"), ("gpt2", "mean"), ("bert", "cls")])
@torch.no_grad()
def test_tokenizers_that_pad_on_the_left_change_no_features(tmp_path: Path, kind: str, pooling: str) -> None:
    folder = write_text_model(tmp_path, kind)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}), encoding="utf-8")
    towers = tower(folder, pooling=pooling)
    towers.load_pretrained()
    assert towers.tokenizer is not None
    alone = torch.cat([towers.text_features(towers.tokenizer([text])) for text in TEXTS])
    torch.testing.assert_close(towers.text_features(towers.tokenizer(list(TEXTS))), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["eos", "mean"])
@torch.no_grad()
def test_an_empty_text_without_special_tokens_is_the_same_whatever_it_is_padded_for(
    tmp_path: Path, pooling: str
) -> None:
    folder = write_text_model(tmp_path, "gpt2")
    pipeline = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**pipeline, "post_processor": None}), encoding="utf-8")
    towers = tower(folder, pooling=pooling)
    towers.load_pretrained()
    assert towers.tokenizer is not None
    alone = towers.text_features(towers.tokenizer(["", ""]))
    together = towers.text_features(towers.tokenizer(["", "a photo of a rose"]))
    torch.testing.assert_close(together[0], alone[1])
    assert alone.abs().max() > 0


@pytest.mark.parametrize(
    ("kind", "values"), [("roberta", {}), ("deberta-v2", {}), ("mpnet", {}), ("electra", {}), ("modernbert", MODERN)]
)
def test_models_with_a_summary_token_are_pooled_there(tmp_path: Path, kind: str, values: dict[str, Any]) -> None:
    assert tower(write_text_model(tmp_path, kind, **values)).text.pooling == "cls"


def test_a_model_whose_rule_is_not_known_is_refused_until_it_is_given(tmp_path: Path) -> None:
    # EmbeddingGemma: the same kind as the causal model, but reading in both directions.
    folder = write_text_model(tmp_path, "gemma3_text", use_bidirectional_attention=True, **GROUPED)
    assert "set towers.pooling to cls, eos or mean" in refusal(folder)
    assert tower(folder, pooling="mean").text.pooling == "mean"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        *((kind, "an encoder with a decoder") for kind in ("t5", "mt5", "bart")),
        *((kind, "name it as towers.model") for kind in ("clip", "siglip")),
        *((kind, "a model of images and texts") for kind in ("siglip2", "qwen2_vl")),
        *((kind, "not a text encoder") for kind in ("siglip_text_model", "vit")),
    ],
)
def test_other_kinds_are_refused_in_one_line_before_they_are_built(tmp_path: Path, kind: str, expected: str) -> None:
    (tmp_path / "config.json").write_text(CONFIG_MAPPING[kind]().to_json_string(), encoding="utf-8")
    assert expected in refusal(tmp_path)


def test_an_inconsistent_configuration_is_refused_in_one_line(tmp_path: Path) -> None:
    values = {"model_type": "qwen2", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    values |= {"num_key_value_heads": 32, "vocab_size": 400, "intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    assert "is a qwen2, which cannot encode a text alone" in refusal(tmp_path)
    values |= {"num_key_value_heads": 2, "pad_token_id": 400}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    assert "no qwen2 can be built" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "mpnet", "ibert"])
@torch.no_grad()
def test_positions_behind_the_padding_shorten_what_can_be_read(tmp_path: Path, kind: str) -> None:
    values = {"model_type": kind, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    values |= {"vocab_size": 400, "intermediate_size": 64, "max_position_embeddings": 40, "pad_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    towers = tower(tmp_path)
    assert towers.text.max_length == 38
    tokens = torch.full((1, 38), 7)
    assert towers.encode_text({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}).isfinite().all()
    assert "the model's 38 tokens; got 40" in refusal(tmp_path, max_length=40)


def write_pooling(folder: Path, values: Any, path: str = "1_Pooling") -> None:
    (folder / path).mkdir(parents=True, exist_ok=True)
    (folder / path / "config.json").write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 384}, "eos"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "eos"),
    ],
)
def test_pooling_files_of_every_age_are_read(tmp_path: Path, values: dict[str, Any], rule: str) -> None:
    write_pooling(tmp_path, values)
    assert pooling_rule(str(tmp_path), BertConfig(), "auto") == rule
    assert pooling_rule(str(tmp_path), BertConfig(), "mean") == "mean"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "concatenates cls and mean"),
        ({"pooling_mode": ["mean", "max"]}, "concatenates mean and max"),
        ({"pooling_mode": "weightedmean"}, "asks for weightedmean"),
        ({"pooling_mode_max_tokens": True}, "asks for max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "asks for mean_sqrt_len_tokens"),
        ({"embedding_dimension": 384}, "asks for no rule"),
        ([], "cannot be read"),
    ],
)
def test_rules_that_are_not_supported_are_named(tmp_path: Path, values: Any, expected: str) -> None:
    write_pooling(tmp_path, values)
    with pytest.raises(UserError, match=expected):
        pooling_rule(str(tmp_path), BertConfig(), "auto")


def test_the_list_of_modules_names_the_rule_and_unused_modules(tmp_path: Path) -> None:
    write_pooling(tmp_path, {"pooling_mode": "mean"}, "2_Pooling")
    kinds = {"": "Transformer", "2_Pooling": "Pooling", "3_Dense": "Dense", "4_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (tmp_path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    with pytest.warns(UserWarning, match="has Dense after its pooling"):
        assert pooling_rule(str(tmp_path), BertConfig(), "auto") == "mean"


def test_the_rule_of_a_sentence_model_is_known_or_read_but_not_guessed(tmp_path: Path) -> None:
    name = "sentence-transformers/all-MiniLM-L6-v2"
    assert pooling_rule("", BertConfig(), "auto", name=name) == "mean"
    with pytest.raises(UserError, match="partial download"):
        pooling_rule(str(tmp_path), BertConfig(), "auto", name="sentence-transformers/paraphrase-MiniLM-L3-v2")


def test_a_checkpoint_keeps_its_rule(tmp_path: Path) -> None:
    folder = write_text_model(tmp_path, "qwen3", **GROUPED)
    again = build_towers(TowerOptions(image="test_resnet", text="/nowhere"), 32, tower(folder).architectures)
    assert isinstance(again, TwoTowers)
    assert again.text.pooling == "eos"


def test_towers_of_whole_models_and_texts_are_not_confused(tmp_path: Path) -> None:
    assert "name it as towers.model" in refusal(write_siglip(tmp_path / "siglip"))
    with pytest.raises(UserError, match=r"give towers.image and towers.text"):
        build_towers(TowerOptions(model=str(write_bert(tmp_path / "bert"))), 32)
