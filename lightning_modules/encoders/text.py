"""Text encoders from token ids to one feature vector per text, and a cache for the features of frozen ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_modules.encoders.tokenizer import TextTokenizer, Tokens, pretrained_tokenizer, trained_tokenizer
from lightning_modules.encoders.transformers import TEXT_HEADS, Configuration, build_model, load_model
from lightning_modules.encoders.weights import WeightsOrigin, local_directory, read_json, weights_origin
from lightning_modules.options import Pooling, PoolingRule
from vitrail.errors import UserError, first_line

DEFAULT_LENGTH = 64
"""Default maximum length in tokens."""

_FIRST_TOKEN = (
    "albert bert big_bird camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie flaubert fnet "
    "ibert longformer luke megatron-bert mobilebert modernbert mpnet mra nomic_bert nystromformer rembert roberta "
    "roberta-prelayernorm roc_bert roformer squeezebert xlm xlm-roberta xlm-roberta-xl xmod yoso"
)
"""Types of models whose first token represents the whole text."""

_KNOWN_RULES: dict[str, PoolingRule] = {"sentence-transformers/all-MiniLM-L6-v2": "mean"}
"""Rules of models in ``transformers.ARCHITECTURES`` that differ from those of their type."""

_FILE_RULES: dict[str, PoolingRule] = {"cls": "cls", "lasttoken": "eos", "mean": "mean"}
_FILE_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
"""Names of rules in sentence-transformers before and since version 5.4."""


class TextEncoder(nn.Module):
    """A ``transformers`` text model with a pooling rule.

    Attributes:
        num_features: length of a feature vector.
        tokenizer: None until the weights are loaded or a tokenizer is trained.
        origin: origin of the pretrained weights, once loaded.
    """

    def __init__(
        self,
        name: str,
        configuration: Configuration,
        *,
        pretrained: bool,
        pooling: Pooling = "auto",
        max_length: int | None = None,
        directory: str = "",
        rule: PoolingRule | None = None,
    ) -> None:
        super().__init__()
        refuse_other_kinds(name, configuration)
        self.name = name
        self.pretrained = pretrained
        self.configuration = configuration
        self.backbone = build_model(configuration)
        longest = longest_text(configuration, self.backbone)
        self.max_length = checked_length(max_length or min(DEFAULT_LENGTH, longest), longest)
        if rule is None:
            causal = reads_left_to_right(self.backbone, configuration, name)
            rule = pooling_rule(directory, configuration, pooling, name=name, causal=causal)
        self.pooling = rule
        self.num_features = int(getattr(configuration, "word_embed_proj_dim", None) or configuration.hidden_size)
        self.tokenizer: TextTokenizer | None = None
        self.origin: WeightsOrigin | None = None
        self._loaded = not pretrained

    def forward(self, tokens: Tokens) -> torch.Tensor:
        """Features of texts, float ``(B, num_features)``."""
        hidden = self.backbone(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        mask = tokens["attention_mask"]
        if self.pooling == "cls":
            return cast("torch.Tensor", hidden[:, 0])
        if self.pooling == "eos":
            return cast("torch.Tensor", hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1])
        weights = mask[..., None].to(hidden.dtype)
        return cast("torch.Tensor", (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1))

    def load_pretrained(self) -> None:
        """Load the pretrained weights and their tokenizer once, if any."""
        if self._loaded:
            return
        directory = local_directory(self.name, "towers.text")
        left_out = load_model(self.backbone, directory, "towers.text", TEXT_HEADS)
        self.origin = weights_origin("towers.text", self.name, Path(directory), left_out)
        self.tokenizer = pretrained_tokenizer(directory, self.max_length, fixed_length=False)
        self._loaded = True

    def train_tokenizer(self, texts: list[str]) -> TextTokenizer:
        """Train a tokenizer on texts, as large as the model's vocabulary allows."""
        return trained_tokenizer(texts, int(self.configuration.vocab_size), self.max_length, fixed_length=False)


def refuse_other_kinds(name: str, configuration: Configuration) -> None:
    """Refuse models that do not encode a text alone into one vector per token."""
    from transformers.models.auto import modeling_auto as known

    kind = str(configuration.model_type)
    advice = "give a text encoder such as sentence-transformers/all-MiniLM-L6-v2"
    if getattr(configuration, "vision_config", None) is not None:
        whole = "name it as towers.model, or " if kind in ("clip", "siglip") else ""
        raise UserError(f"towers.text: {name} is a {kind}, a model of images and texts; {whole}{advice}")
    if (
        getattr(configuration, "is_encoder_decoder", False)
        or kind in known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    ):
        raise UserError(f"towers.text: {name} is a {kind}, an encoder with a decoder, which is not supported; {advice}")
    texts = {
        *known.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
        *known.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    if kind not in texts or getattr(configuration, "text_config", None) is not None:
        raise UserError(f"towers.text: {name} is a {kind}, not a text encoder that is supported; {advice}")


def longest_text(configuration: Configuration, model: nn.Module | None = None) -> int:
    """Maximum number of tokens that the model's position embeddings allow."""
    longest = int(getattr(configuration, "max_position_embeddings", None) or 1_000_000)
    for name, module in [] if model is None else model.named_modules():
        weight, padding = getattr(module, "weight", None), getattr(module, "padding_idx", None)
        if "position" in name and isinstance(weight, torch.Tensor) and padding is not None:
            longest = min(longest, len(weight) - padding - 1)
    return longest


def checked_length(max_length: int, longest: int) -> int:
    """Validate the maximum length against the model's position embeddings."""
    if not 3 <= max_length <= longest:
        raise UserError(f"towers.max_length: must be between 3 and the model's {longest} tokens; got {max_length}")
    return max_length


def pooling_rule(
    directory: str, configuration: Configuration, pooling: Pooling, *, name: str = "", causal: bool | None = None
) -> PoolingRule:
    """Resolve the pooling of a model's tokens.

    ``auto`` is the rule in its ``1_Pooling/config.json`` (sentence-transformers), otherwise the first token for known
    types, otherwise the last token for causal models.
    """
    if pooling not in get_args(Pooling):
        raise UserError(f"towers.pooling: must be one of {', '.join(get_args(Pooling))}; got {pooling!r}")
    label = name or directory or f"the {configuration.model_type}"
    rule: PoolingRule | None = None if pooling == "auto" else pooling
    if rule is None:
        rule = _rule_of_folder(directory, name) or _KNOWN_RULES.get(name)
    if rule in ("eos", "mean"):
        return rule
    summarised = configuration.model_type in _FIRST_TOKEN.split() and not getattr(configuration, "is_decoder", False)
    if summarised:
        return "cls"
    if causal is None:
        causal = reads_left_to_right(build_model(configuration), configuration, label)
    if rule == "cls" and causal:
        raise UserError(
            f"towers.pooling: cls takes the first token, but {label} reads from left to right, so all texts would get "
            "the same vector; set towers.pooling to eos or mean"
        )
    if rule is None and not causal:
        raise UserError(
            f"towers.pooling: auto, but it is not known how {label} (a {configuration.model_type}) makes one "
            "vector of a text; set towers.pooling to cls, eos or mean, see its model card"
        )
    return rule or "eos"


@torch.no_grad()
def reads_left_to_right(model: nn.Module, configuration: Configuration, name: str) -> bool:
    """Whether tokens attend only to earlier ones, tested with two texts."""
    parameter = next(model.parameters())
    if parameter.is_meta:  # built for counting
        return False
    length = min(longest_text(configuration, model), 16)
    special = {getattr(configuration, f"{one}_token_id", None) for one in ("pad", "bos", "eos", "sep", "cls", "mask")}
    plain = [number for number in range(min(int(configuration.vocab_size), 64)) if number not in special]
    texts = torch.tensor([[plain[0], *[other] * (length - 1)] for other in (plain[1], plain[2])])
    training = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            hidden = model.eval()(
                input_ids=texts.to(parameter.device), attention_mask=torch.ones_like(texts).to(parameter.device)
            ).last_hidden_state
    except Exception as error:
        raise UserError(
            f"towers.text: {name} is a {configuration.model_type}, which cannot encode a text alone "
            f"({first_line(error)}); give a text encoder such as sentence-transformers/all-MiniLM-L6-v2"
        ) from error
    finally:
        model.train(training)
    difference = (hidden[0] - hidden[1]).abs().amax(dim=-1)
    return bool(difference[0] <= 1e-6 * difference[-1] and difference[-1] > 0)


def _rule_of_folder(directory: str, name: str) -> PoolingRule | None:
    """The rule in the files of sentence-transformers, if any."""
    folder = Path(directory)
    hint = "fix it, or set towers.pooling"
    listed = bool(directory) and (folder / "modules.json").is_file()
    modules = read_json(folder / "modules.json", "towers.pooling", hint, list) if listed else []
    kinds = {str(one.get("type", "")).rpartition(".")[2]: str(one.get("path", "")) for one in modules}
    path = folder / kinds.get("Pooling", "1_Pooling") / "config.json"
    if not directory or not path.is_file():
        if directory and name.startswith("sentence-transformers/"):
            raise UserError(
                f"towers.pooling: auto, but {directory} lacks the pooling rule of {name} (1_Pooling/config.json), as "
                "of a partial download; set towers.pooling to cls, eos or mean, see its model card"
            )
        return None
    if others := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        rank_zero_warn(
            f"towers.text: {directory} has {', '.join(others)} after its pooling, which is left out; the projection "
            "head replaces it"
        )
    values = read_json(path, "towers.pooling", hint)
    if (given := values.get("pooling_mode")) is not None:
        modes = [str(one) for one in (given if isinstance(given, list | tuple) else [given])]
    else:
        modes = [mode for flag, mode in _FILE_FLAGS.items() if values.get(flag)]
    if len(modes) == 1 and modes[0] in _FILE_RULES:
        return _FILE_RULES[modes[0]]
    found = f"concatenates {' and '.join(modes)}" if len(modes) > 1 else f"asks for {(modes or ['no rule'])[0]}"
    raise UserError(
        f"towers.pooling: {path} {found}, which is not supported; must be one of {', '.join(_FILE_RULES)}; set "
        "towers.pooling to cls, eos or mean to overrule it"
    )


class TextCache:
    """Features, float ``(n, D)``, of n different texts."""

    def __init__(self, texts: Sequence[str], features: torch.Tensor) -> None:
        self._rows = {text: row for row, text in enumerate(texts)}
        self._features = features

    def get(self, texts: Sequence[str]) -> torch.Tensor | None:
        """Features of texts, float ``(B, D)``; None if one of them is not cached."""
        rows = [self._rows.get(text) for text in texts]
        if None in rows:
            return None
        return self._features[torch.tensor(rows, dtype=torch.int64, device=self._features.device)]
