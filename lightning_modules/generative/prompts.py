"""Tokenizer and prompt of generative models.

The prompt is the pretrained tokenizer's chat template, rendered once, so that a checkpoint contains text and no code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypedDict

from lightning_modules.encoders.tokenizer import auto_tokenizer, byte_level_bpe
from vitrail.errors import UserError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

QUESTION = "{question}"

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
"""Those of Qwen2-VL; their ids in a trained tokenizer are 0, 1, …"""

CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{QUESTION}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
"""Qwen2-VL's chat template rendered for one image and one question."""


class PromptState(TypedDict):
    """State of ``Prompts`` in checkpoints."""

    pipeline: str  # JSON of the `tokenizers` library
    template: str  # with `{question}` once and, in front of it, the image token once
    image_token: str  # placeholder of one patch of the image
    end_id: int  # id of the end token


class Prompts:
    """Encodes questions and answers, and decodes answers."""

    def __init__(self, state: PromptState) -> None:
        from tokenizers import Tokenizer

        self.state = state
        self._pipeline: Tokenizer = Tokenizer.from_str(state["pipeline"])
        self._pipeline.no_truncation()
        self._pipeline.no_padding()

    @property
    def end_id(self) -> int:
        """Id of the end token."""
        return self.state["end_id"]

    def prompt(self, question: str, image_tokens: int) -> list[int]:
        """Token ids of an image and a question, up to where the answer begins."""
        before, after = self.state["template"].split(QUESTION)
        # Only in front of the question, which may contain the token itself.
        before = before.replace(self.state["image_token"], self.state["image_token"] * image_tokens)
        return self._ids(before + question + after)

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer with the end token."""
        return [*self._ids(text), self.end_id]

    def text(self, ids: Sequence[int]) -> str:
        """Text of token ids up to the end token."""
        kept = list(ids)
        if self.end_id in kept:
            kept = kept[: kept.index(self.end_id)]
        return self._pipeline.decode(kept, skip_special_tokens=True).strip()

    def _ids(self, text: str) -> list[int]:
        return list(self._pipeline.encode(text, add_special_tokens=False).ids)


def pretrained_prompts(directory: str, image_id: int, key: str) -> Prompts:
    """Load the tokenizer and the chat template of a pretrained model."""
    tokenizer = auto_tokenizer(directory, key)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    try:
        template = CHAT
        if tokenizer.chat_template:
            template = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise UserError(
            f"{key}: the chat template of {directory} cannot be used ({first_line(error)}); give another model"
        ) from error
    image_token = tokenizer.convert_ids_to_tokens(image_id)
    if tokenizer.eos_token_id is None or image_token is None:
        raise UserError(f"{key}: the tokenizer of {directory} lacks the end or the image's token; give another model")
    return Prompts(
        checked_prompts(
            {
                "pipeline": tokenizer.backend_tokenizer.to_str(),
                "template": template,
                "image_token": image_token,
                "end_id": int(tokenizer.eos_token_id),
            }
        )
    )


def trained_prompts(texts: Iterable[str], vocabulary_size: int) -> Prompts:
    """Train a byte-level BPE tokenizer with Qwen2-VL's special tokens and template, for models with random weights."""
    pipeline = byte_level_bpe([*sorted(set(texts)), CHAT], vocabulary_size, SPECIAL_TOKENS, "model")
    return Prompts(
        {
            "pipeline": pipeline.to_str(),
            "template": CHAT,
            "image_token": "<|image_pad|>",
            "end_id": SPECIAL_TOKENS.index("<|im_end|>"),
        }
    )


def checked_prompts(value: object) -> PromptState:
    """Validate a state from a file."""
    if not isinstance(value, dict) or set(value) != set(PromptState.__annotations__):
        raise UserError("the checkpoint holds no tokenizer that this version can read; use the version that wrote it")
    try:
        json.loads(value["pipeline"])
        template, token = str(value["template"]), str(value["image_token"])
        before, _ = template.split(QUESTION)
        if before.count(token) != 1:
            raise ValueError
        return {"pipeline": value["pipeline"], "template": template, "image_token": token, "end_id": value["end_id"]}
    except (TypeError, ValueError) as error:
        raise UserError(
            "model: the tokenizer or its chat template is not that of a model that attends one image and then reads a "
            "question; give another model"
        ) from error
