"""Options of the models: their defaults and ranges, which ``--help`` shows.

Checkpoints keep them as plain dictionaries. The ranges are annotations, which jsonargparse drops where a module
postpones them.
"""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter, ValidationError

from vitrail.errors import UserError

Count = Annotated[int, Ge(1)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Rate = Annotated[float, Ge(0), Lt(1)]
Factor = Annotated[float, Gt(0), Le(1)]

ScheduleName = Literal["constant", "cosine", "step", "onecycle"]
LrScaling = Literal["none", "linear", "sqrt"]
PoolingRule = Literal["cls", "eos", "mean"]
Pooling = Literal["auto", "cls", "eos", "mean"]
ClassWeighting = Literal["none", "inverse", "sqrt_inverse", "effective_number"]
ContrastiveLoss = Literal["info_nce", "label_aware", "sigmoid"]
Freeze = Literal["none", "text_only", "vision_only", "early_layers", "towers"]


@dataclass(frozen=True)
class OptimOptions:
    """The rarer settings of AdamW and its schedule.

    Attributes:
        betas: AdamW's two decay rates.
        eps: AdamW's epsilon.
        backbone_lr: learning rate of the backbone, by default that of the heads.
        layer_decay: factor of the learning rate from each layer to the one below it, 1 for none.
        warmup_epochs: epochs of linear warm-up in front of the schedule, step by step, may be a fraction. With
            ``onecycle`` they are the length of its rise, which is 30 % of the run where this is 0.
        min_lr: where ``cosine`` ends.
        step_size: epochs between the drops of ``step``.
        gamma: factor of each drop of ``step``.
        lr_scaling: how all learning rates grow with the samples of a step, those of all processes and accumulated
            batches together: ``none``; ``linear`` (Goyal et al., 2017, for SGD; it needs ``warmup_epochs``); ``sqrt``,
            the rule for Adam and its kind (Krizhevsky, 2014; Malladi et al., 2022, who also change ``betas`` and
            ``eps``, which is not done here).
        lr_base_batch: samples of a step that the learning rates were chosen for, by default 256.
    """

    betas: tuple[Rate, Rate] = (0.9, 0.999)
    eps: Positive = 1e-8
    backbone_lr: NonNegative | None = None
    layer_decay: Factor = 1.0
    warmup_epochs: NonNegative = 0.0
    min_lr: NonNegative = 0.0
    step_size: Count = 10
    gamma: Factor = 0.1
    lr_scaling: LrScaling = "none"
    lr_base_batch: Count | None = None


@dataclass(frozen=True)
class LogitScaleOptions:
    """The scale (and bias) of cosine similarities.

    Attributes:
        scale: initial factor of the cosines, by default that of the pretrained model; 1 / 0.07 where there is none, 10
            with the sigmoid loss.
        trainable: whether it is trained.
        lr: highest learning rate of scale and bias, by default that of the heads.
        max_scale: upper bound, by default 100, or the scale of the pretrained model, if that is larger.
        bias: added to the scaled cosines; with the sigmoid loss only; by default that of the pretrained model, or -10.
    """

    scale: Positive | None = None
    trainable: bool = True
    lr: NonNegative | None = None
    max_scale: Positive | None = None
    bias: float | None = None


@dataclass(frozen=True)
class _AdapterOptions:
    rank: Count = 8
    alpha: int = 16
    dropout: Rate = 0.0


@dataclass(frozen=True)
class LoraOptions(_AdapterOptions):
    """Low-rank adapters (Hu et al., ICLR 2022) in the towers of a dual encoder.

    Attributes:
        rank: of each update.
        alpha: an update is scaled by alpha / rank.
        dropout: in front of each adapter.
        towers: which get adapters. The other tower is frozen too.
    """

    towers: Literal["both", "image", "text"] = "both"


@dataclass(frozen=True)
class LanguageLoraOptions(_AdapterOptions):
    """Low-rank adapters (Hu et al., ICLR 2022) in an image-text-to-text model.

    Attributes:
        rank: of each update.
        alpha: an update is scaled by alpha / rank.
        dropout: in front of each adapter.
        parts: which get adapters. The other part is frozen too.
    """

    parts: Literal["language", "vision", "both"] = "language"


@dataclass(frozen=True)
class TowerOptions:
    """Which encoders: either ``model``, or ``image`` and ``text``.

    Attributes:
        model: a whole pretrained dual encoder (CLIP, SigLIP): local folder or name on the hub.
        pretrained: whether ``model`` has its pretrained weights.
        image: name of the image tower in timm.
        image_pretrained: true for the weights on the hub, false for random ones, or a weights file.
        text: the text tower: local folder or name on the hub.
        text_pretrained: whether it has its pretrained weights; otherwise a tokenizer is trained on the captions.
        pooling: how the text tower's tokens become one vector: cls, eos (the last token), mean, or auto, the model's
            own rule, refused where it is not known.
        max_length: longest text in tokens; by default 64, or the model's longest, if that is shorter; with ``model``
            its longest.
        embed_dim: length of the embeddings that both towers are projected to.
        projection_dropout: dropout of the projection heads.
    """

    model: str | None = None
    pretrained: bool = True
    image: str | None = None
    image_pretrained: bool | str = True
    text: str | None = None
    text_pretrained: bool = True
    pooling: Pooling = "auto"
    max_length: Count | None = None
    embed_dim: Count = 256
    projection_dropout: Rate = 0.1


@dataclass(frozen=True)
class AnswerOptions:
    """How the answers of a generative model become logits over labels.

    Attributes:
        how: ``scores`` takes the log-likelihood of each label; ``constrained`` generates one of the labels; ``free``
            generates anything and looks for the label that it names.
        length_normalised: whether a label's score is the mean over its tokens, or their sum.
        content_free: ``grey`` subtracts from each label its score for a grey image, the model's prior (Zhao et al.,
            ICML 2021; Holtzman et al., EMNLP 2021).
        max_tokens: longest free answer.
        synonyms: further names of labels, by label, for free answers.
    """

    how: Literal["scores", "constrained", "free"] = "scores"
    length_normalised: bool = True
    content_free: Literal["none", "grey"] = "none"
    max_tokens: Count = 16
    synonyms: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryOptions:
    """What the generative model takes of the memory.

    Attributes:
        precision: of the model's own weights. Adapters are always float32.
        four_bit: keep the model's own weights in four bits (NF4; Dettmers et al., QLoRA, 2023), which needs
            ``bitsandbytes``, pretrained weights and, to train, ``lora``.
        gradient_checkpointing: recompute activations instead of keeping them (Chen et al., 2016).
    """

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    four_bit: bool = False
    gradient_checkpointing: bool = False


Options = TypeVar("Options")

_FORMER_KEYS = {"learned": "trainable"}
_FORMER_ARGUMENTS = {"temperature": "logit_scale"}


def checked(kind: type[Options], value: Options | Mapping[str, Any] | None, key: str) -> Options:
    """Options with every value in its range.

    Args:
        kind: their dataclass.
        value: an instance, a mapping such as a checkpoint keeps, or None for the defaults.
        key: of the argument, for messages.

    Raises:
        UserError: names an unknown key, or a value of another type or out of range.
    """
    given = asdict(cast("Any", value)) if is_dataclass(value) else dict(cast("Mapping[str, Any]", value or {}))
    given = {_FORMER_KEYS.get(name, name): entry for name, entry in given.items()}
    known = [one.name for one in fields(kind)]  # type: ignore[arg-type]  # all kinds are dataclasses
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"{key}: unknown key {unknown[0]!r}; must be one of {', '.join(known)}")
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([key, *map(str, first["loc"][:1])])
        reason = first["msg"].replace("Input should", "must")
        if first["type"] == "literal_error":
            reason = f"must be one of {first['ctx']['expected'].replace(' or ', ', ').replace(chr(39), '')}"
        raise UserError(f"{place}: {reason}; got {given.get(str(first['loc'][0]))!r}") from None


def current_arguments(task_class: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a task, as a checkpoint of any version keeps them, by their current names and with all options."""
    hints: dict[str, Any] = get_type_hints(cast("Any", task_class).__init__)
    parameters = inspect.signature(task_class).parameters
    found = {}
    for name, value in arguments.items():
        current = name if name in parameters else _FORMER_ARGUMENTS.get(name, name)
        kinds: list[Any] = [one for one in (hints.get(current), *get_args(hints.get(current))) if is_dataclass(one)]
        optional = type(None) in get_args(hints.get(current))
        found[current] = value
        if kinds and not (optional and value is None):
            found[current] = asdict(checked(kinds[0], value, current))
    return found
