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
from vitrail.types import TaskKind

Count = Annotated[int, Ge(1)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Rate = Annotated[float, Ge(0), Lt(1)]
Factor = Annotated[float, Gt(0), Le(1)]

ScheduleName = Literal["constant", "cosine", "polynomial", "exponential", "step", "onecycle", "plateau"]
LrScaling = Literal["none", "linear", "sqrt"]
PoolingRule = Literal["cls", "eos", "mean"]
Pooling = Literal["auto", "cls", "eos", "mean"]
ClassWeighting = Literal["none", "inverse", "sqrt_inverse", "effective_number"]
SingleLabelLoss = Literal["cross_entropy", "logit_adjusted", "balanced_softmax", "bce", "focal"]
MultiLabelLoss = Literal["bce", "focal", "asymmetric"]
OrdinalLoss = Literal["corn", "cumulative_link"]
RegressionLoss = Literal["mse", "huber", "gaussian_nll"]
Balance = Literal["fixed", "uncertainty"]
ContrastiveLoss = Literal["info_nce", "label_aware", "sigmoid"]
FewShotMethod = Literal[
    "prototypes", "linear_probe", "lp_plus_plus", "tip_adapter", "tip_adapter_f", "clip_adapter", "coop", "cocoop"
]
Freeze = Literal["none", "text_only", "vision_only", "early_layers", "towers"]


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimizer; its parameter groups are the same for all.

    Attributes:
        name: ``adamw`` (Loshchilov and Hutter, ICLR 2019), or another one of timm's: ``sgd`` (with Nesterov momentum),
            ``lamb`` (You et al., ICLR 2020), ``lion`` (Chen et al., NeurIPS 2023), ``muon`` (Jordan et al., 2024),
            ``adan``, ``nadamw``, ``madgrad`` and so on; ``lookahead_NAME`` for Lookahead (Zhang et al., NeurIPS 2019).
        options: further arguments of the optimizer, such as ``{momentum: 0.9}``; its own defaults otherwise.
    """

    name: str = "adamw"
    options: dict[str, bool | int | float | str | list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class PlateauOptions:
    """When the schedule ``plateau`` lowers the learning rate.

    Attributes:
        monitor: a validation metric.
        mode: whether a lower (``min``) or a higher value (``max``) is better.
        patience: validations in a row that may pass without a new best value.
    """

    monitor: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    patience: Annotated[int, Ge(0)] = 5


@dataclass(frozen=True)
class FinetuningPhase:
    """A phase of training.

    Attributes:
        head_lr: peak learning rate of the heads.
        backbone_lr: peak learning rate of the backbone; with 0 it is frozen, BatchNorm's statistics included.
        epochs: length; the last phase, which has none, lasts until training ends.
        schedule: learning-rate schedule within the phase.
        min_lr: final learning rate, by default that of the callback.
        warmup_epochs: epochs of linear warm-up, by default those of the callback.
    """

    head_lr: NonNegative
    backbone_lr: NonNegative = 0.0
    epochs: Count | None = None
    schedule: ScheduleName = "cosine"
    min_lr: NonNegative | None = None
    warmup_epochs: NonNegative | None = None


@dataclass(frozen=True)
class OptimOptions:
    """The optimizer, and further settings of its schedule.

    Attributes:
        optimizer: which optimizer, by default AdamW.
        betas: betas of AdamW; those of other optimizers are in ``optimizer.options``.
        eps: epsilon of AdamW, likewise.
        backbone_lr: peak learning rate of the backbone, by default that of the heads.
        layer_decay: factor of the learning rate from each layer to the one below it.
        warmup_epochs: epochs of linear warm-up, may be a fraction. With ``onecycle`` the length of its rise, by default
            30 % of the run.
        cooldown_epochs: last epochs of the run, with the learning rate ``min_lr``; may be a fraction.
        min_lr: final learning rate of ``cosine`` and ``polynomial``, smallest one of ``exponential`` and ``plateau``,
            and that of the cooldown.
        step_size: epochs between the drops of ``step``, and in which ``exponential`` falls by ``gamma``.
        gamma: factor of each drop of ``step`` and ``plateau``, and of ``exponential`` in ``step_size`` epochs.
        power: exponent of ``polynomial``; 1 for a linear descent.
        plateau: what ``plateau`` waits for.
        lr_scaling: scaling of all learning rates with the samples of a step on all processes and in all accumulated
            batches: ``none``; ``linear`` (Goyal et al., 2017, for SGD with ``warmup_epochs``); ``sqrt``, for Adam and
            the like (Krizhevsky, 2014; Malladi et al., 2022, who also scale ``betas`` and ``eps``).
        lr_base_batch: samples of a step that the learning rates are given for, by default 256.
    """

    optimizer: OptimizerOptions = OptimizerOptions()
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    eps: Positive = 1e-8
    backbone_lr: NonNegative | None = None
    layer_decay: Factor = 1.0
    warmup_epochs: NonNegative = 0.0
    cooldown_epochs: NonNegative = 0.0
    min_lr: NonNegative = 0.0
    step_size: Count = 10
    gamma: Factor = 0.1
    power: Positive = 1.0
    plateau: PlateauOptions = PlateauOptions()
    lr_scaling: LrScaling = "none"
    lr_base_batch: Count | None = None


@dataclass(frozen=True)
class CaptioningOptions:
    """A decoder that writes each image's caption, and its loss (CoCa: Yu et al., TMLR 2022).

    Attributes:
        weight: of the captioning loss; the contrastive one has 1.
        layers: of the decoder.
        width: of the decoder.
        queries: number of vectors that an image's tokens are pooled to.
    """

    weight: Positive = 2.0
    layers: Count = 2
    width: Count = 256
    queries: Count = 32


@dataclass(frozen=True)
class ContrastiveOptions:
    """Variants of the contrastive loss.

    Attributes:
        matryoshka: shorter lengths of the embeddings, ``[64, 128]``, whose first numbers are trained to be embeddings
            by themselves; the loss is the mean over all lengths (Kusupati et al., NeurIPS 2022).
        hard_negatives: how much more similar negatives count, 0 for all alike (HN-NCE: Radenovic et al., CVPR 2023);
            not for the sigmoid loss.
        captioning: a second loss, of captions that are written from the image.
    """

    matryoshka: list[Count] = field(default_factory=list)
    hard_negatives: NonNegative = 0.0
    captioning: CaptioningOptions | None = None


@dataclass(frozen=True)
class _AdapterOptions:
    rank: Count = 8
    alpha: int = 16
    dropout: Rate = 0.0


@dataclass(frozen=True)
class AdapterOptions(_AdapterOptions):
    """Parameter-efficient training of a classifier's backbone; its other weights are frozen, the heads are trained.

    Attributes:
        kind: ``lora``, low-rank updates of the attention layers (Hu et al., ICLR 2022); ``dora``, which also trains the
            magnitudes of their weights (Liu et al., ICML 2024); ``bitfit``, all biases (Ben Zaken et al., ACL 2022),
            which has no other option.
        rank: rank of each update.
        alpha: updates are scaled by alpha / rank.
        dropout: dropout before each adapter.
    """

    kind: Literal["lora", "dora", "bitfit"] = "lora"


@dataclass(frozen=True)
class BackboneOptions:
    """A classifier's backbone.

    Attributes:
        timm: arguments of the network in timm, such as ``{drop_path_rate: 0.1, global_pool: avg}``.
        gradient_checkpointing: recompute the activations in the backward pass: less memory, more time.
        adapter: train low-rank adapters or biases instead of the weights.
    """

    timm: dict[str, Any] = field(default_factory=dict)
    gradient_checkpointing: bool = False
    adapter: AdapterOptions | None = None


@dataclass(frozen=True)
class DistillOptions:
    """A teacher, and how a classifier learns from it; the loss is (1 - weight) · labels + weight · teacher.

    Attributes:
        teacher: run directory or checkpoint, or name in timm.
        kind: ``logits``, its softened probabilities (Hinton et al., 2015); ``features``, its features by a linear
            projection (Romero et al., ICLR 2015); ``hard``, its predicted classes (DeiT: Touvron et al., ICML 2021).
        weight: share of the teacher in the loss.
        temperature: by which logits are divided, with ``logits``.
        distance: of features: mean squared error, or 1 - cosine.
        pretrained: weights of a teacher in timm: true for those on the hub, or a weights file.
    """

    teacher: str
    kind: Literal["logits", "features", "hard"] = "logits"
    weight: Factor = 0.5
    temperature: Positive = 4.0
    distance: Literal["mse", "cosine"] = "mse"
    pretrained: bool | str = True


@dataclass(frozen=True)
class LossOptions:
    """Losses of a classifier's tasks; ``lightning_modules.heads`` has their definitions and papers.

    Attributes:
        single_label: loss of tasks with one of several classes; ``bce`` is for mixup and CutMix, ``logit_adjusted`` and
            ``balanced_softmax`` for rare classes, without ``class_weighting``.
        multi_label: loss of tasks with any of several labels; ``asymmetric`` where most labels rarely apply.
        ordinal: model of tasks with ordered classes.
        regression: loss of tasks with a number; ``huber`` for outliers, ``gaussian_nll`` also predicts a standard
            deviation.
        by_task: loss of single tasks, which must be one of their kind.
        label_smoothing: share of the target that is spread over all classes in training, of single-label tasks.
        class_weighting: weighting of rare classes in training, of single-label and ordinal tasks.
        balance: how the losses of several tasks are added: ``fixed`` by ``task_weights``, ``uncertainty`` also by the
            inverse of a noise that is trained for each task (Kendall, Gal and Cipolla, CVPR 2018).
        gamma: exponent of ``focal``.
        gamma_positive: exponent of ``asymmetric`` for labels that apply.
        gamma_negative: exponent of ``asymmetric`` for labels that do not.
        margin: probability below which ``asymmetric`` ignores labels that do not apply.
        tau: strength of ``logit_adjusted``.
        delta: standard deviations of the target up to which ``huber`` is quadratic.
        bce_threshold: share of a mixed image above which single-label ``bce`` takes a class as a full target, by
            default none: classes count by their shares.
        distill: a teacher to learn from as well.
    """

    single_label: SingleLabelLoss = "cross_entropy"
    multi_label: MultiLabelLoss = "bce"
    ordinal: OrdinalLoss = "corn"
    regression: RegressionLoss = "mse"
    by_task: dict[str, str] = field(default_factory=dict)
    label_smoothing: Rate = 0.0
    class_weighting: ClassWeighting = "none"
    balance: Balance = "fixed"
    gamma: NonNegative = 2.0
    gamma_positive: NonNegative = 0.0
    gamma_negative: NonNegative = 4.0
    margin: Rate = 0.05
    tau: Positive = 1.0
    delta: Positive = 1.0
    bce_threshold: Rate | None = None
    distill: DistillOptions | None = None

    def loss_of(self, task: str, kind: TaskKind) -> str:
        """Return the name of a task's loss.

        Raises:
            UserError: ``by_task`` names one of another kind.
        """
        known = get_args(_LOSSES[kind])
        name = str(self.by_task.get(task, getattr(self, kind)))
        if name not in known:
            raise UserError(
                f"loss_options.by_task: the loss of {task!r} ({kind}) must be one of {', '.join(known)}; got {name!r}"
            )
        return name


_LOSSES: dict[TaskKind, Any] = {
    "single_label": SingleLabelLoss,
    "multi_label": MultiLabelLoss,
    "ordinal": OrdinalLoss,
    "regression": RegressionLoss,
}


@dataclass(frozen=True)
class LogitScaleOptions:
    """The scale (and bias) of cosine similarities.

    Attributes:
        scale: initial scale, by default that of the pretrained model, otherwise 1 / 0.07, or 10 with the sigmoid loss.
        trainable: whether it is trained.
        lr: peak learning rate of scale and bias, by default that of the heads.
        max_scale: maximum scale, by default 100, or that of the pretrained model, if larger.
        bias: initial bias of the sigmoid loss, by default that of the pretrained model, otherwise -10.
    """

    scale: Positive | None = None
    trainable: bool = True
    lr: NonNegative | None = None
    max_scale: Positive | None = None
    bias: float | None = None


@dataclass(frozen=True)
class LoraOptions(_AdapterOptions):
    """Low-rank adapters (Hu et al., ICLR 2022) in the towers of a dual encoder.

    Attributes:
        rank: rank of each update.
        alpha: updates are scaled by alpha / rank.
        dropout: dropout before each adapter.
        towers: towers with adapters; the other one is frozen, too.
    """

    towers: Literal["both", "image", "text"] = "both"


@dataclass(frozen=True)
class FewShotOptions:
    """A classifier that is solved on the features of the frozen encoder; ``lightning_modules.few_shot`` has the papers.

    Attributes:
        method: ``linear_probe`` and ``prototypes`` for any encoder; ``lp_plus_plus``, ``tip_adapter``,
            ``tip_adapter_f``, ``clip_adapter``, ``coop`` and ``cocoop`` for those with a text tower.
        select: where what the method leaves open is chosen: on held-out parts of the training images (``shots``), or on
            the validation split (``val``).
        steps: most steps of ``tip_adapter_f``, ``clip_adapter``, ``coop`` and ``cocoop``; fewer are chosen likewise.
        context: number of context vectors of ``coop`` and ``cocoop``.
        seed: of random starts.
    """

    method: FewShotMethod = "linear_probe"
    select: Literal["shots", "val"] = "shots"
    steps: Count = 100
    context: Count = 4
    seed: int = 0


@dataclass(frozen=True)
class LanguageLoraOptions(_AdapterOptions):
    """Low-rank adapters (Hu et al., ICLR 2022) in an image-text-to-text model.

    Attributes:
        rank: rank of each update.
        alpha: updates are scaled by alpha / rank.
        dropout: dropout before each adapter.
        parts: parts with adapters; the other one is frozen, too.
    """

    parts: Literal["language", "vision", "both"] = "language"


@dataclass(frozen=True)
class TowerOptions:
    """The encoders: either ``model``, or ``image`` and ``text``.

    Attributes:
        model: a pretrained dual encoder of transformers (CLIP, SigLIP …) or open_clip: local folder or name on the hub.
        pretrained: whether to load the pretrained weights of ``model``.
        image: name of the image tower in timm.
        image_pretrained: true for the weights on the hub, false for random ones, or a weights file.
        image_options: arguments of the image tower in timm, such as ``{drop_path_rate: 0.1}``.
        text: the text tower: local folder or name on the hub.
        text_pretrained: whether to load its pretrained weights; otherwise a tokenizer is trained on the captions.
        pooling: pooling of the text tower's tokens: cls, eos (the last token), mean, or auto, the model's own if known.
        max_length: maximum length of a text in tokens, by default the model's, at most 64 with ``text``.
        embed_dim: length of the embeddings.
        projection_dropout: dropout of the projection heads.
        patch_dropout: share of an image's patches that a training step leaves out, of vision transformers (FLIP: Li et
            al., CVPR 2023).
        gradient_checkpointing: recompute the activations of both towers in the backward pass (Chen et al., 2016).
    """

    model: str | None = None
    pretrained: bool = True
    image: str | None = None
    image_pretrained: bool | str = True
    image_options: dict[str, Any] | None = None
    text: str | None = None
    text_pretrained: bool = True
    pooling: Pooling = "auto"
    max_length: Count | None = None
    embed_dim: Count = 256
    projection_dropout: Rate = 0.1
    patch_dropout: Rate = 0.0
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class AnswerOptions:
    """Questions to a generative model, and from its answers to logits over labels.

    Attributes:
        questions: the question of each task; tasks without one are left out. ``{labels}`` stands for the list of the
            labels. By default that of the main task is "What is shown in this image? …".
        how: ``scores`` takes the log-likelihood of each label; ``constrained`` generates one of the labels; ``free``
            generates any text and finds the label in it.
        length_normalised: whether a label's score is the mean over its tokens instead of their sum.
        content_free: ``grey`` subtracts each label's score for a gray image, the model's prior (Zhao et al., ICML 2021;
            Holtzman et al., EMNLP 2021).
        max_tokens: maximum length of a free answer.
        synonyms: further names of each label, for free answers.
    """

    questions: dict[str, str] | None = None
    how: Literal["scores", "constrained", "free"] = "scores"
    length_normalised: bool = True
    content_free: Literal["none", "grey"] = "none"
    max_tokens: Count = 16
    synonyms: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryOptions:
    """Memory usage of the generative model.

    Attributes:
        precision: precision of the base weights; adapters are float32.
        four_bit: base weights in four bits (NF4; Dettmers et al., QLoRA, 2023), which needs ``bitsandbytes``,
            pretrained weights and, to train, ``lora``.
        gradient_checkpointing: recompute activations in the backward pass (Chen et al., 2016).
    """

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    four_bit: bool = False
    gradient_checkpointing: bool = False


Options = TypeVar("Options")

_FORMER_KEYS = {"learned": "trainable"}
_FORMER_ARGUMENTS = {"temperature": "logit_scale"}


def checked(kind: type[Options], value: Options | Mapping[str, Any] | None, key: str) -> Options:
    """Validate options.

    Args:
        kind: the dataclass.
        value: an instance, a mapping such as from a checkpoint, or None for the defaults.
        key: name of the argument in messages.

    Raises:
        UserError: names an unknown key, or a value of another type or out of range.
    """
    given = asdict(cast("Any", value)) if is_dataclass(value) else dict(cast("Mapping[str, Any]", value or {}))
    given = {_FORMER_KEYS.get(name, name): entry for name, entry in given.items()}
    known = [one.name for one in fields(kind)]  # type: ignore[arg-type]  # all kinds are dataclasses
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"{key}: unknown key {unknown[0]!r}; must be one of {', '.join(known)}")
    # pydantic would ignore unknown keys of options within options.
    for name, group in _groups(kind).items():
        if name in given:
            given[name] = _checked_group(group, given[name], f"{key}.{name}")
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
    """Convert a task's arguments from a checkpoint of any version to their current names with all options."""
    constructor = cast("Any", task_class).__init__
    parameters, groups = inspect.signature(task_class).parameters, _groups(constructor)
    options = {option.name: name for name, (kind, _) in groups.items() for option in fields(kind)}
    given = {name if name in parameters else _FORMER_ARGUMENTS.get(name, name): v for name, v in arguments.items()}
    found = {name: value for name, value in given.items() if name in parameters or name not in options}
    for name in given.keys() - found.keys():
        if given[name] is not None:
            # An argument of an earlier version that is an option now.
            group = options[name]
            found[group] = {**(found.get(group) or {}), name: given[name]}
    for name in groups.keys() & found:
        value = _checked_group(groups[name], found[name], name)
        found[name] = None if value is None else asdict(value)
    return found


def _groups(owner: Any) -> dict[str, tuple[Any, bool]]:
    """The options of a dataclass, or arguments of a function, that are dataclasses, and whether they may be None."""
    hints = get_type_hints(owner).items()
    kinds = {name: [one for one in (hint, *get_args(hint)) if is_dataclass(one)] for name, hint in hints}
    return {name: (kinds[name][0], type(None) in get_args(hint)) for name, hint in hints if kinds[name]}


def _checked_group(group: tuple[Any, bool], value: Any, key: str) -> Any:
    kind, is_optional = group
    return None if value is None and is_optional else checked(kind, value, key)
