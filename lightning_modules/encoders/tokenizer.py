"""Tokenizers of pretrained models, or trained on the training captions; checkpoints contain them as JSON."""

from __future__ import annotations

import contextlib
import json
import string
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
import torch.nn.functional as F

from vitrail.errors import UserError, first_line
from vitrail.types import TextReading

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, START, UNKNOWN_TOKEN, END = "<pad>", "<start>", "<unknown>", "<end>"
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
"""Ids of special tokens in trained tokenizers; ``transformers`` handles CLIP models with end id 2 in an older way."""

TEXTS_AT_A_TIME = 512
"""Texts that are encoded together; more are encoded in parts, which are padded to the longest."""

_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.vocab", "*vocab*.json", "*.model", "*.tiktoken", "tekken.json")
_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
"""Packages that sentencepiece models need, and their modules."""


class TokenizerState(TypedDict):
    """State of a tokenizer in checkpoints."""

    pipeline: str  # JSON of the `tokenizers` library
    max_length: int  # maximum length in tokens, special ones included
    pad_id: int  # id of padding
    fixed_length: bool  # whether every text is padded to `max_length`


class Tokens(TypedDict):
    """Texts as token ids; L is the length of the longest."""

    input_ids: torch.Tensor  # int64 `(B, L)`
    attention_mask: torch.Tensor  # int64 `(B, L)`, 0 for padding


class TextTokenizer:
    """Encodes texts as token ids; longer texts are truncated, with their special tokens kept."""

    def __init__(self, state: TokenizerState) -> None:
        from tokenizers import Tokenizer

        self.state = state
        self._pipeline: Tokenizer = Tokenizer.from_str(state["pipeline"])
        self._pipeline.enable_truncation(state["max_length"])
        length = state["max_length"] if state["fixed_length"] else None
        self.pad_token: str = self._pipeline.id_to_token(state["pad_id"]) or PAD
        direction = (self._pipeline.padding or {}).get("direction", "right")
        self._pads_left = direction == "left"
        self._pipeline.enable_padding(
            direction=direction, pad_id=state["pad_id"], pad_token=self.pad_token, length=length
        )

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._pipeline.get_vocab(with_added_tokens=True).values())

    @property
    def starts_specially(self) -> bool:
        """Whether every text begins with a special token."""
        return bool(self._pipeline.encode("a").special_tokens_mask[0])

    @property
    def end_id(self) -> int | None:
        """Id of the special token that ends every text; None where there is none."""
        encoded = self._pipeline.encode("a")
        last = max(place for place, attended in enumerate(encoded.attention_mask) if attended)
        return int(encoded.ids[last]) if encoded.special_tokens_mask[last] else None

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self._pipeline.decode(list(ids))).strip()

    def __call__(self, texts: Sequence[str], device: torch.device | None = None) -> Tokens:
        """Token ids of texts."""
        # In parts: while it encodes, the library needs some 20 times the memory of the ids.
        starts = range(0, len(texts) or 1, TEXTS_AT_A_TIME)
        parts = [self._encoded(texts[start : start + TEXTS_AT_A_TIME]) for start in starts]
        longest = max(ids.shape[-1] for ids, _ in parts)
        ids = torch.cat([self._padded(ids, longest, self.state["pad_id"]) for ids, _ in parts])
        mask = torch.cat([self._padded(mask, longest, 0) for _, mask in parts])
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    def _encoded(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = self._pipeline.encode_batch_fast(list(texts))
        ids = torch.tensor([text.ids for text in encoded], dtype=torch.int64)
        mask = torch.tensor([text.attention_mask for text in encoded], dtype=torch.int64)
        if not ids.shape[-1]:
            ids = self._padded(ids, 1, self.state["pad_id"])
            mask = self._padded(mask, 1, 0)
        # Without special tokens an empty text has none, and would depend on the texts that it is padded for.
        mask[~mask.any(dim=1), -1 if self._pads_left else 0] = 1
        return ids, mask

    def _padded(self, tokens: torch.Tensor, length: int, value: int) -> torch.Tensor:
        missing = length - tokens.shape[-1]
        return F.pad(tokens, (missing, 0) if self._pads_left else (0, missing), value=value)

    def reading(self, text: str) -> TextReading:
        """Coverage of a text, for a warning."""
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


def pretrained_tokenizer(
    directory: str, max_length: int, fixed_length: bool, *, canonical: bool = False, strip_sep: bool = False
) -> TextTokenizer:
    """Load the tokenizer of a pretrained model, with the text normalisation of its class, or that of SigLIP.

    Args:
        directory: folder of the model.
        max_length: maximum length in tokens.
        fixed_length: whether every text is padded to it.
        canonical: whether texts are normalised as in big_vision.
        strip_sep: whether id 0 takes the place of the separator at the end, as in CLIPA (Li et al., NeurIPS 2023).
    """
    if canonical or _is_siglip(directory):
        pipeline, pad_id = _siglip_pipeline(directory, spaced=canonical)
    else:
        tokenizer = auto_tokenizer(directory, "towers")
        # Texts of any length are padded behind their end: positions, first and last token are those of the text alone.
        side = tokenizer.padding_side if fixed_length else "right"
        tokenizer.backend_tokenizer.enable_padding(direction=side)
        if _json(Path(directory) / "sentence_bert_config.json").get("do_lower_case"):
            _lower_first(tokenizer.backend_tokenizer)
        if strip_sep:
            _strip_sep(tokenizer.backend_tokenizer, tokenizer.sep_token_id)
        pipeline = tokenizer.backend_tokenizer.to_str()
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    state: TokenizerState = {
        "pipeline": pipeline,
        "max_length": max_length,
        "pad_id": int(pad_id or 0),
        "fixed_length": fixed_length,
    }
    return TextTokenizer(state)


def _lower_first(pipeline: Tokenizer) -> None:
    """Lower texts before anything else, as sentence-transformers does whatever the tokenizer does."""
    from tokenizers import normalizers

    own = [pipeline.normalizer] if pipeline.normalizer else []
    pipeline.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])


def _strip_sep(pipeline: Tokenizer, sep_id: int | None) -> None:
    """Let texts end with id 0 instead of the separator."""
    from tokenizers import processors

    encoded = pipeline.encode("a")
    ids = [0 if number == sep_id else number for number in encoded.ids]
    special = {str(pipeline.id_to_token(number)): number for number in ids}
    around = zip(ids, encoded.special_tokens_mask, strict=True)
    pieces = [str(pipeline.id_to_token(number)) if is_special else "$A" for number, is_special in around]
    pipeline.post_processor = processors.TemplateProcessing(
        single=list(dict.fromkeys(pieces)), special_tokens=list(special.items())
    )


def auto_tokenizer(directory: str, key: str) -> Any:
    """Load the tokenizer of a folder by ``transformers``, as a pipeline of the ``tokenizers`` library."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(directory)
    _refuse_missing_vocabulary(folder, key)
    try:
        # By default `transformers` asks on the terminal whether to run the folder's own code.
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        tokenizer.backend_tokenizer.to_str()
        return tokenizer
    except Exception as error:
        if (folder / "tokenizer.json").is_file():
            # The folder's class may need further packages, the file does not.
            with contextlib.suppress(Exception):
                return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        raise _unreadable(folder, key, error) from error


def _refuse_missing_vocabulary(folder: Path, key: str) -> None:
    """Without files, ``transformers`` returns a tokenizer of special tokens only."""
    if not any(file.is_file() for pattern in _VOCABULARIES for file in folder.glob(pattern)):
        raise UserError(f"{key}: {folder} has no tokenizer that can be read (no vocabulary file); add tokenizer.json")


def _is_siglip(directory: str) -> bool:
    """Whether the tokenizer is SigLIP's, which ``transformers`` only has in Python."""
    kind = _json(Path(directory) / "tokenizer_config.json").get("tokenizer_class")
    if kind is None:
        return _json(Path(directory) / "config.json").get("model_type") in ("siglip", "siglip_text_model")
    return str(kind).removesuffix("Fast") == "SiglipTokenizer"


def _siglip_pipeline(directory: str, *, spaced: bool) -> tuple[str, int]:
    """SigLIP's tokenizer with its text normalisation: lower case, no punctuation, single spaces.

    ``transformers`` removes underscores, big_vision and open_clip (``spaced``) make spaces of them.
    """
    from tokenizers import Regex, Tokenizer, normalizers, processors

    folder = Path(directory)
    _refuse_missing_vocabulary(folder, "towers")
    try:
        if (folder / "tokenizer.json").is_file():
            pipeline = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            pipeline = _converted_sentencepiece(directory)
    except Exception as error:
        raise _unreadable(folder, "towers", error) from error
    settings = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    end = pipeline.token_to_id(_token(settings.get("eos_token"), "</s>"))
    pad = pipeline.token_to_id(_token(settings.get("pad_token"), "</s>"))
    if end is None or pad is None:
        raise UserError(
            f"towers: the tokenizer of {directory} lacks its eos_token or pad_token; fix its tokenizer.json"
        )
    canonical: list[Any] = [normalizers.Lowercase()] if settings.get("do_lower_case", True) else []
    if spaced:
        canonical.append(normalizers.Replace("_", " "))
    punctuation = "".join(f"\\{mark}" for mark in string.punctuation)
    canonical += [
        normalizers.Replace(Regex(f"[{punctuation}]"), ""),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    pipeline.normalizer = normalizers.Sequence([*canonical, *([pipeline.normalizer] if pipeline.normalizer else [])])
    if pipeline.encode("a").ids[-1:] != [end]:
        name = pipeline.id_to_token(end)
        pipeline.post_processor = processors.TemplateProcessing(single=f"$A {name}", special_tokens=[(name, end)])
    return pipeline.to_str(), int(pad)


def _converted_sentencepiece(directory: str) -> Tokenizer:
    """Convert a sentencepiece model; needs ``sentencepiece`` and ``protobuf``."""
    from transformers import SiglipTokenizer
    from transformers.convert_slow_tokenizer import SpmConverter

    slow = SiglipTokenizer.from_pretrained(directory, local_files_only=True)
    pipeline: Tokenizer = cast("Any", SpmConverter)(slow).converted()
    return pipeline


def _unreadable(folder: Path, key: str, error: Exception) -> UserError:
    lacking = [name for name, module in _SENTENCEPIECE.items() if not _importable(module)]
    if lacking and not (folder / "tokenizer.json").is_file() and any(folder.glob("*.model")):
        return UserError(
            f"{key}: the tokenizer of {folder} is a sentencepiece model, which needs {' and '.join(lacking)}; "
            f"pip install {' '.join(lacking)}, or add its tokenizer.json"
        )
    reason = first_line(error)
    return UserError(f"{key}: {folder} has no tokenizer that can be read ({reason}); add its tokenizer.json")


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _token(value: object, default: str) -> str:
    """A special token's text, which files have plain or with attributes."""
    return str(value.get("content", default) if isinstance(value, dict) else value or default)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def trained_tokenizer(texts: Iterable[str], vocabulary_size: int, max_length: int, fixed_length: bool) -> TextTokenizer:
    """Train a lower-case byte-level BPE tokenizer (Sennrich et al., ACL 2016; Radford et al., GPT-2, 2019).

    The same texts in any order give the same tokenizer.
    """
    from tokenizers import normalizers, processors

    ordered = sorted({text for text in texts if text.strip()})
    if not ordered:
        raise UserError(
            "towers: there are no captions to train a tokenizer on; use data with captions or class prompts"
        )
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    special = [PAD, START, UNKNOWN_TOKEN, END]
    pipeline = byte_level_bpe(
        ordered, vocabulary_size, special, "towers", normalizer=normalizer, prefix_space=True, min_frequency=2
    )
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


def byte_level_bpe(
    texts: Iterable[str],
    vocabulary_size: int,
    special: Sequence[str],
    key: str,
    *,
    normalizer: Any = None,
    prefix_space: bool = False,
    **settings: Any,
) -> Tokenizer:
    """Train a ``tokenizers`` pipeline, with the special tokens as its first ids; ``key`` is for messages."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary_size < len(special) + len(alphabet):
        raise UserError(
            f"{key}: a vocabulary of {vocabulary_size} has no room for {len(special) + len(alphabet)} bytes and "
            "special tokens; use a text configuration with a larger vocab_size"
        )
    pipeline = Tokenizer(models.BPE())
    if normalizer is not None:
        pipeline.normalizer = normalizer
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(special),
        initial_alphabet=alphabet,
        show_progress=False,
        **settings,
    )
    pipeline.train_from_iterator(texts, trainer)
    return pipeline


def checked_state(value: object) -> TokenizerState:
    """Validate a tokenizer's state from a file."""
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
