from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lightning_modules.generative.prompts import CHAT, Prompts, checked_prompts, pretrained_prompts, trained_prompts
from tests.lightning_modules.generative.tiny_answers import TEXTS
from tests.support.models import write_qwen2_vl
from vitrail.errors import UserError

IMAGE = 5
"""Id of the image's token in tokenizers of ours."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen2_vl(tmp_path_factory.mktemp("model"), texts=TEXTS)


def test_the_template_is_what_the_library_renders(folder: Path) -> None:
    prompts = pretrained_prompts(str(folder), IMAGE, "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    question = {"type": "text", "text": "What {it} is?"}
    chat = [{"role": "user", "content": [{"type": "image"}, question]}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    expected = tokenizer(rendered.replace("<|image_pad|>", "<|image_pad|>" * 4), add_special_tokens=False)["input_ids"]
    assert prompts.prompt("What {it} is?", 4) == expected
    assert prompts.state["template"] == CHAT
    # A question may contain anything.
    assert prompts.prompt("{question} {} \\n", 2).count(IMAGE) == 2


def test_answers_end_and_are_read_up_to_their_end() -> None:
    prompts = trained_prompts(TEXTS, 400)
    ids = prompts.answer("yellow iris")
    assert ids[-1] == prompts.end_id
    assert prompts.end_id not in ids[:-1]
    assert prompts.text([*ids, 3, 300, 7]) == "yellow iris"
    assert prompts.text(ids[:-1]) == "yellow iris"
    assert prompts.text(prompts.answer("Ein Größeres, 花")) == "Ein Größeres, 花"


def test_the_same_texts_give_the_same_tokenizer_and_a_state_is_enough() -> None:
    prompts = trained_prompts(TEXTS, 400)
    assert trained_prompts([*reversed(TEXTS), TEXTS[0]], 400).state == prompts.state
    again = Prompts(checked_prompts(json.loads(json.dumps(prompts.state))))
    assert again.prompt("What is it?", 3) == prompts.prompt("What is it?", 3)
    with pytest.raises(UserError, match="no room for 263 bytes"):
        trained_prompts(TEXTS, 200)


def test_what_is_no_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    state = trained_prompts(TEXTS, 400).state
    with pytest.raises(UserError, match="no tokenizer"):
        checked_prompts({"pipeline": "{}"})
    for wrong in ({"template": "no place"}, {"template": "{question} <|image_pad|>"}, {"pipeline": "{"}):
        with pytest.raises(UserError, match="attends one image and then reads a question"):
            checked_prompts({**state, **wrong})
    with pytest.raises(UserError, match="no tokenizer that can be read"):
        pretrained_prompts(str(tmp_path), IMAGE, "model")
