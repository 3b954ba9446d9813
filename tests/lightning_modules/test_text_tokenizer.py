from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.schema import UserError
from lightning_modules.text_tokenizer import (
    SPECIAL_IDS,
    TextTokenizer,
    checked_state,
    pretrained_tokenizer,
    trained_tokenizer,
)
from tests.fakes_models import TEXTS, write_bert


def trained(max_length: int = 20, *, fixed_length: bool = False) -> TextTokenizer:
    return trained_tokenizer(TEXTS, 400, max_length, fixed_length)


def test_texts_are_framed_and_filled_up_to_the_longest() -> None:
    tokens = trained()(["a rose", "a photo of a rose."])
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    assert ids.dtype == torch.int64
    assert ids.shape == mask.shape
    assert (ids[:, 0] == SPECIAL_IDS["bos_token_id"]).all()
    for row, length in zip(ids, mask.sum(dim=1).tolist(), strict=True):
        assert row[length - 1] == SPECIAL_IDS["eos_token_id"]
        assert (row[length:] == SPECIAL_IDS["pad_token_id"]).all()
    assert mask.sum(dim=1).max() == ids.shape[1]


def test_long_texts_are_cut_and_keep_their_end() -> None:
    ids = trained(8)(["a photo of a rose. " * 50])["input_ids"]
    assert ids.shape == (1, 8)
    assert ids[0, -1] == SPECIAL_IDS["eos_token_id"]


def test_a_fixed_length_fills_every_text_up() -> None:
    assert trained(16, fixed_length=True)(["a rose"])["input_ids"].shape == (1, 16)


@pytest.mark.parametrize("text", ["", "   ", "Блакитна троянда", "🌹" * 40, "\x00\x07"])
def test_every_text_can_be_read(text: str) -> None:
    tokens = trained()([text, "a rose"])
    assert int(tokens["input_ids"].max()) < 400
    assert (tokens["attention_mask"].sum(dim=1) >= 2).all()


def test_the_same_texts_in_any_order_give_the_same_tokenizer() -> None:
    assert trained_tokenizer(reversed(TEXTS), 400, 20, fixed_length=False).state == trained().state


def test_upper_case_is_the_same_text() -> None:
    tokens = trained()(["A Rose", "a rose"])["input_ids"]
    assert torch.equal(tokens[0], tokens[1])


def test_its_state_makes_the_same_tokenizer_again() -> None:
    first = trained()
    second = TextTokenizer(checked_state(dict(first.state)))
    assert torch.equal(first(list(TEXTS))["input_ids"], second(list(TEXTS))["input_ids"])
    assert second.vocabulary_size <= 400


def test_that_of_a_pretrained_model_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = str(write_bert(tmp_path))
    peer = AutoTokenizer.from_pretrained(folder)(list(TEXTS), padding=True, truncation=True, return_tensors="pt")
    tokens = pretrained_tokenizer(folder, 20, fixed_length=False)(list(TEXTS))
    assert torch.equal(tokens["input_ids"], peer["input_ids"])
    assert torch.equal(tokens["attention_mask"], peer["attention_mask"])


def test_what_is_cut_off_is_said() -> None:
    short, words = trained(max_length=6), "a red bicycle leans against a wall"
    reading = short.reading(words)
    kept = short([words])["input_ids"][0].tolist()[1:-1]
    assert reading.known == len(kept) == 4
    assert reading.unread
    assert words.endswith(reading.unread)
    # What is read alone gives the same tokens.
    assert short([words.removesuffix(reading.unread)])["input_ids"][0].tolist()[1:-1] == kept
    assert trained().reading("a red bicycle") == (len(trained()(["a red bicycle"])["input_ids"][0]) - 2, [], "")


def test_what_a_vocabulary_does_not_have_is_said() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    whole_words = Tokenizer(models.WordLevel({"<pad>": 0, "<unknown>": 1, "red": 2, "rose": 3}, unk_token="<unknown>"))
    whole_words.pre_tokenizer = pre_tokenizers.Whitespace()
    state = {"pipeline": whole_words.to_str(), "max_length": 4, "pad_id": 0, "fixed_length": True}
    tokenizer = TextTokenizer(checked_state(state))
    assert tokenizer.reading("red rose") == (2, [], "")
    assert tokenizer.reading("red ваза rose") == (2, ["ваза"], "")
    assert tokenizer.reading("красная ваза") == (0, ["красная", "ваза"], "")
    assert tokenizer.reading("red rose red rose, ваза") == (4, [], ", ваза")
    assert tokenizer.reading(" ") == (0, [], "")
    # A tokenizer that knows every byte knows every text.
    assert trained().reading("ваза").unknown == []
    assert trained().reading("ваза").known > 0


def test_a_vocabulary_of_pieces_says_it_too() -> None:
    from tokenizers import Tokenizer, models

    pieces = Tokenizer(models.Unigram([("<unknown>", 0.0), ("r", -1.0), ("o", -1.0), ("se", -1.5)], unk_id=0))
    state = {"pipeline": pieces.to_str(), "max_length": 8, "pad_id": 0, "fixed_length": False}
    assert TextTokenizer(checked_state(state)).reading("rosew") == (3, ["w"], "")


def test_without_texts_or_room_none_can_be_trained() -> None:
    with pytest.raises(UserError, match="no captions"):
        trained_tokenizer(["", " "], 400, 20, fixed_length=False)
    with pytest.raises(UserError, match="no room"):
        trained_tokenizer(TEXTS, 100, 20, fixed_length=False)


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        pretrained_tokenizer(str(tmp_path), 20, fixed_length=False)


@pytest.mark.parametrize("state", [None, {"pipeline": "{}"}, {**trained().state, "pipeline": "no json"}])
def test_a_damaged_state_is_refused(state: Any) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        checked_state(state)
