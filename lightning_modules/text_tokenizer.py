"""Text to token ids: the tokenizer of a pretrained model, or one that is trained on the captions of the training split.

Either is a ``tokenizers`` pipeline that is kept as JSON inside the checkpoint, so a checkpoint alone can read text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch

from datamodules.schema import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, START, UNKNOWN_TOKEN, END = "<pad>", "<start>", "<unknown>", "<end>"
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
"""Where a tokenizer of ours has its special tokens. Not 2 for the end: ``transformers`` takes CLIP models with that id
for early ones, in which the end was the largest id of the text."""


class TokenizerState(TypedDict):
    """What a checkpoint keeps of a tokenizer.

    Attributes:
        pipeline: JSON of the ``tokenizers`` library.
        max_length: longest sequence in tokens, special ones included.
        pad_id: id that fills up shorter texts.
        fixed_length: whether every text is filled up to ``max_length``.
    """

    pipeline: str
    max_length: int
    pad_id: int
    fixed_length: bool


class Tokens(TypedDict):
    """Texts as token ids; L is the length of the longest.

    Attributes:
        input_ids: int64 ``(B, L)``.
        attention_mask: int64 ``(B, L)``, 0 where a text is filled up.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


class TextReading(NamedTuple):
    """What a tokenizer makes of a text.

    Attributes:
        known: number of its tokens that stand for themselves, special ones left out.
        unknown: parts of the text that it has no token for, in order.
        unread: the end of the text that is cut off, empty where all is read.
    """

    known: int
    unknown: list[str]
    unread: str


class TextTokenizer:
    """Makes token ids of texts.

    Longer texts are cut, with their special tokens kept. An empty text is its special tokens alone.

    Args:
        state: as ``state`` of another one gives it.
    """

    def __init__(self, state: TokenizerState) -> None:
        from tokenizers import Tokenizer

        self.state = state
        self._pipeline: Tokenizer = Tokenizer.from_str(state["pipeline"])
        self._pipeline.enable_truncation(state["max_length"])
        length = state["max_length"] if state["fixed_length"] else None
        self.pad_token: str = self._pipeline.id_to_token(state["pad_id"]) or PAD
        self._pipeline.enable_padding(pad_id=state["pad_id"], pad_token=self.pad_token, length=length)

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._pipeline.get_vocab(with_added_tokens=True).values())

    def __call__(self, texts: Sequence[str], device: torch.device | None = None) -> Tokens:
        """Token ids of texts.

        Args:
            texts: B texts.
            device: of the result.
        """
        encoded = self._pipeline.encode_batch(list(texts))
        return {
            "input_ids": torch.tensor([text.ids for text in encoded], device=device),
            "attention_mask": torch.tensor([text.attention_mask for text in encoded], device=device),
        }

    def reading(self, text: str) -> TextReading:
        """What is read of a text, so that people can be told."""
        encoded = self._pipeline.encode(text)
        content = [place for place, is_special in enumerate(encoded.special_tokens_mask) if not is_special]
        model = json.loads(self.state["pipeline"])["model"]
        stand_in = model.get("unk_id") if model.get("unk_token") is None else model["vocab"].get(model["unk_token"])
        unknown = [place for place in content if encoded.ids[place] == stand_in]
        end = max((encoded.offsets[place][1] for place in content), default=0)
        return TextReading(
            known=len(content) - len(unknown),
            unknown=[text[slice(*encoded.offsets[place])] for place in unknown],
            unread=text[end:].strip() if encoded.overflowing else "",
        )


def pretrained_tokenizer(directory: str, max_length: int, fixed_length: bool) -> TextTokenizer:
    """The tokenizer of a pretrained model.

    Args:
        directory: local folder of the model.
        max_length: longest sequence in tokens.
        fixed_length: whether every text is filled up to it.

    Raises:
        UserError: if there is none, or one that only exists as Python code.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        pipeline = tokenizer.backend_tokenizer.to_str()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"towers: {directory} has no tokenizer that can be read ({reason}); add its tokenizer.json"
        ) from error
    pad_id = tokenizer.pad_token_id
    state: TokenizerState = {
        "pipeline": pipeline,
        "max_length": max_length,
        "pad_id": int(tokenizer.eos_token_id or 0) if pad_id is None else int(pad_id),
        "fixed_length": fixed_length,
    }
    return TextTokenizer(state)


def trained_tokenizer(texts: Iterable[str], vocabulary_size: int, max_length: int, fixed_length: bool) -> TextTokenizer:
    """A byte-level BPE tokenizer (Sennrich et al., ACL 2016; Radford et al., GPT-2, 2019) learned from texts.

    It is lower-cased, and knows every byte, so no text is unknown to it. The same texts give the same tokenizer.

    Args:
        texts: what to learn from.
        vocabulary_size: largest number of tokens.
        max_length: longest sequence in tokens.
        fixed_length: whether every text is filled up to it.

    Raises:
        UserError: if there is no text, or no room for all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    ordered = sorted({text for text in texts if text.strip()})
    if not ordered:
        raise UserError(
            "towers: there are no captions to train a tokenizer on; use data with captions or class prompts"
        )
    special = [PAD, START, UNKNOWN_TOKEN, END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary_size < len(special) + len(alphabet):
        raise UserError(
            f"towers: a vocabulary of {vocabulary_size} has no room for {len(special) + len(alphabet)} bytes and "
            "special tokens; use a text configuration with a larger vocab_size"
        )
    pipeline = Tokenizer(models.BPE())
    pipeline.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        min_frequency=2,
        show_progress=False,
    )
    pipeline.train_from_iterator(ordered, trainer)
    pipeline.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(START, SPECIAL_IDS["bos_token_id"]), (END, SPECIAL_IDS["eos_token_id"])],
    )
    state: TokenizerState = {
        "pipeline": pipeline.to_str(),
        "max_length": max_length,
        "pad_id": SPECIAL_IDS["pad_token_id"],
        "fixed_length": fixed_length,
    }
    return TextTokenizer(state)


def checked_state(value: object) -> TokenizerState:
    """A tokenizer's state from a file, which may hold anything.

    Raises:
        UserError: if it is none.
    """
    if not isinstance(value, dict) or set(value) != set(TokenizerState.__annotations__):
        raise UserError("the checkpoint holds no tokenizer that this version can read; use the version that wrote it")
    try:
        json.loads(value["pipeline"])
    except (TypeError, ValueError) as error:
        raise UserError("the checkpoint's tokenizer is damaged; use another checkpoint") from error
    return {
        "pipeline": value["pipeline"],
        "max_length": int(value["max_length"]),
        "pad_id": int(value["pad_id"]),
        "fixed_length": bool(value["fixed_length"]),
    }
