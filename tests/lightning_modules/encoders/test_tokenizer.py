from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from lightning_modules.encoders.open_clip import Configuration, tokenizer_of
from lightning_modules.encoders.tokenizer import (
    SPECIAL_IDS,
    TextTokenizer,
    checked_state,
    pretrained_tokenizer,
    trained_tokenizer,
)
from tests.support.models import TEXTS, write_bert, write_siglip
from vitrail.errors import UserError


def trained(max_length: int = 20, *, fixed_length: bool = False) -> TextTokenizer:
    return trained_tokenizer(TEXTS, 400, max_length, fixed_length)


def test_texts_have_special_tokens_and_are_padded_to_the_longest() -> None:
    tokens = trained()(["a rose", "a photo of a rose."])
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    assert ids.dtype == torch.int64
    assert ids.shape == mask.shape
    assert (ids[:, 0] == SPECIAL_IDS["bos_token_id"]).all()
    for row, length in zip(ids, mask.sum(dim=1).tolist(), strict=True):
        assert row[length - 1] == SPECIAL_IDS["eos_token_id"]
        assert (row[length:] == SPECIAL_IDS["pad_token_id"]).all()
    assert mask.sum(dim=1).max() == ids.shape[1]


def test_texts_are_truncated_or_padded_with_their_special_tokens_kept() -> None:
    ids = trained(8)(["a photo of a rose. " * 50])["input_ids"]
    assert ids.shape == (1, 8)
    assert ids[0, -1] == SPECIAL_IDS["eos_token_id"]
    assert trained(16, fixed_length=True)(["a rose"])["input_ids"].shape == (1, 16)


@pytest.mark.parametrize("side", ["left", "right"])
def test_parts_of_many_texts_are_padded_to_the_longest_of_all(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained_tokenizer(["one two three four five"], 400, 12, fixed_length=False).state
    pipeline = Tokenizer.from_str(state["pipeline"])
    pipeline.enable_padding(direction=side)
    tokenizer = TextTokenizer({**state, "pipeline": pipeline.to_str()})
    texts = ["one", "two three", "one two three four five", "four"]
    whole = tokenizer(texts)
    monkeypatch.setattr("lightning_modules.encoders.tokenizer.TEXTS_AT_A_TIME", 2)
    parts = tokenizer(texts)
    assert torch.equal(whole["input_ids"], parts["input_ids"])
    assert torch.equal(whole["attention_mask"], parts["attention_mask"])
    assert bool(parts["attention_mask"][0, 0]) == (side == "right")


@pytest.mark.parametrize("text", ["", "   ", "Блакитна троянда", "🌹" * 40, "\x00\x07"])
def test_every_text_can_be_encoded(text: str) -> None:
    tokens = trained()([text, "a rose"])
    assert int(tokens["input_ids"].max()) < 400
    assert (tokens["attention_mask"].sum(dim=1) >= 2).all()


def test_order_and_case_of_the_texts_do_not_matter_and_a_state_is_enough() -> None:
    first = trained()
    assert trained_tokenizer(reversed(TEXTS), 400, 20, fixed_length=False).state == first.state
    upper, lower = first(["A Rose", "a rose"])["input_ids"]
    assert torch.equal(upper, lower)
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


def canonical(text: str) -> str:
    """SigLIP's text, as big_vision makes it."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


SPOKEN = ("A Photo of a ROSE!", "a  photo,\tof (a) rose...", "don't_stop — [rose]", "", "?!")


@pytest.mark.parametrize("kind", ["SiglipTokenizer", None])
def test_siglips_own_tokenizer_is_read_from_its_file_with_canonical_text(tmp_path: Path, kind: str | None) -> None:
    from tokenizers import Tokenizer

    folder = write_siglip(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = kind
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    tokens = pretrained_tokenizer(str(folder), 12, fixed_length=True)(list(SPOKEN))["input_ids"]
    peer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    peer.enable_truncation(12)
    peer.enable_padding(length=12, pad_id=0, pad_token="<pad>")
    assert tokens.tolist() == [text.ids for text in peer.encode_batch([canonical(text) for text in SPOKEN])]


@pytest.mark.parametrize("options", [{}, {"strip_sep_token": True}, {"clean": "canonicalize"}])
def test_tokenizers_of_open_clip_are_prepared_as_there(tmp_path: Path, options: dict[str, Any]) -> None:
    from open_clip.tokenizer import HFTokenizer

    write_siglip(tmp_path) if "clean" in options else write_bert(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "sep_token": settings["eos_token"]}))
    text = {"context_length": 12, "hf_tokenizer_name": "owner/name", "tokenizer_kwargs": options}
    texts = [*TEXTS, "a red_rose!", "a photo of a rose. " * 9]
    tokens = tokenizer_of(Configuration({"text_cfg": text}, {}), str(tmp_path))(texts)["input_ids"]
    assert tokens.tolist() == HFTokenizer(str(tmp_path), 12, **options)(texts).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"clean": "lower"}, "clean: lower"), ({"reduction_mask": "syntax"}, "reduction_mask: syntax")],
)
def test_other_preparations_of_open_clip_are_refused(options: dict[str, Any], message: str) -> None:
    text = {"tokenizer_kwargs": options}
    with pytest.raises(UserError, match=rf"towers\.model: its tokenizer needs {message}, which is not supported"):
        tokenizer_of(Configuration({"text_cfg": text}, {}), "")


@pytest.mark.parametrize("lowers", [True, False])
def test_texts_are_lowered_where_sentence_transformers_does(tmp_path: Path, lowers: bool) -> None:
    write_bert(tmp_path)
    pipeline = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**pipeline, "normalizer": None}), encoding="utf-8")
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9, "do_lower_case": lowers}))
    upper, lower = pretrained_tokenizer(str(tmp_path), 20, fixed_length=False)(["A ROSE", "a rose"])["attention_mask"]
    assert torch.equal(upper, lower) == lowers


def write_sentencepiece(folder: Path, kind: str) -> None:
    pieces = pytest.importorskip("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join([*TEXTS] * 20), encoding="utf-8")
    pieces.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        pad_id=-1,
        bos_id=-1,
        eos_id=1,
        unk_id=2,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "config.json").write_text('{"model_type": "siglip"}', encoding="utf-8")
    settings = {"tokenizer_class": kind, "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def test_a_sentencepiece_model_alone_gives_siglips_tokens(tmp_path: Path) -> None:
    from transformers import SiglipTokenizer

    write_sentencepiece(tmp_path, "SiglipTokenizer")
    peer = SiglipTokenizer.from_pretrained(tmp_path)
    expected = peer(list(SPOKEN), padding="max_length", max_length=12, truncation=True)["input_ids"]
    assert pretrained_tokenizer(str(tmp_path), 12, fixed_length=True)(list(SPOKEN))["input_ids"].tolist() == expected


@pytest.mark.parametrize("kind", ["SiglipTokenizer", "GemmaTokenizer"])
def test_without_sentencepiece_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    write_sentencepiece(tmp_path, kind)
    (tmp_path / "tokenizer.model").write_bytes((tmp_path / "spiece.model").read_bytes())
    (tmp_path / "spiece.vocab").unlink()

    def absent(*_: object, **__: object) -> None:
        raise ImportError("\nrequires sentencepiece\nwhich is not there")

    monkeypatch.setattr("lightning_modules.encoders.tokenizer.find_spec", lambda name: None)
    monkeypatch.setattr("transformers.SiglipTokenizer.from_pretrained", absent)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", absent)
    with pytest.raises(UserError, match=r"^towers: .* pip install sentencepiece protobuf, or add its tokenizer.json$"):
        pretrained_tokenizer(str(tmp_path), 12, fixed_length=True)


def test_a_class_that_cannot_be_made_gives_way_to_the_file(tmp_path: Path) -> None:
    folder = write_bert(tmp_path)
    expected = pretrained_tokenizer(str(folder), 20, fixed_length=False)(list(TEXTS))["input_ids"]
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "T5Tokenizer"}))
    tokens = pretrained_tokenizer(str(folder), 20, fixed_length=False)(list(TEXTS))["input_ids"]
    assert torch.equal(tokens, expected)


def test_a_model_without_vocabulary_is_refused(tmp_path: Path) -> None:
    """``transformers`` makes a tokenizer of five special tokens for it, to which every word is unknown."""
    folder = write_bert(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', encoding="utf-8")
    with pytest.raises(UserError, match=f"{folder} .*no vocabulary file"):
        pretrained_tokenizer(str(folder), 20, fixed_length=False)


def test_the_truncated_end_is_reported() -> None:
    short, words = trained(max_length=6), "a red bicycle leans against a wall"
    reading = short.reading(words)
    kept = short([words])["input_ids"][0].tolist()[1:-1]
    assert reading.known == len(kept) == 4
    assert reading.unread
    assert words.endswith(reading.unread)
    # What is read alone gives the same tokens.
    assert short([words.removesuffix(reading.unread)])["input_ids"][0].tolist()[1:-1] == kept
    assert trained().reading("a red bicycle") == (len(trained()(["a red bicycle"])["input_ids"][0]) - 2, [], "")


def test_unknown_words_are_reported() -> None:
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
    pieces = Tokenizer(models.Unigram([("<unknown>", 0.0), ("r", -1.0), ("o", -1.0), ("se", -1.5)], unk_id=0))
    state = {"pipeline": pieces.to_str(), "max_length": 8, "pad_id": 0, "fixed_length": False}
    assert TextTokenizer(checked_state(state)).reading("rosew") == (3, ["w"], "")
    # A tokenizer with every byte knows every text.
    assert trained().reading("ваза").unknown == []
    assert trained().reading("ваза").known > 0


def test_without_texts_or_room_none_can_be_trained() -> None:
    with pytest.raises(UserError, match="no captions"):
        trained_tokenizer(["", " "], 400, 20, fixed_length=False)
    with pytest.raises(UserError, match="no room"):
        trained_tokenizer(TEXTS, 100, 20, fixed_length=False)


@pytest.mark.parametrize("state", [None, {"pipeline": "{}"}, {**trained().state, "pipeline": "no json"}])
def test_a_damaged_state_is_refused(state: Any) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        checked_state(state)
