"""Losses: cross-entropy per sample, and contrastive losses as functions of embeddings, with the temperature apart.

Cross-entropy leaves out unknown targets, weights rare classes, smooths targets and splits mixed images.

What a dual encoder minimises: a contrastive loss with its temperature, over the pairs of all processes.

The scale of similarities in a contrastive loss, learned or fixed, apart from the loss.

Contrastive batches larger than memory: encode in chunks, keep only the embeddings, encode again for the gradients.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache), RepL4NLP 2021. The
loss sees all embeddings at once, so its value and its gradients are those of the one large batch; gradient accumulation
over small batches would have fewer negatives. It is what gradient checkpointing (Chen et al., 2016) does with one
segment a chunk: torch replays each chunk's random state and mixed precision, and frees it before the next one. One
backward pass goes through everything, so the temperature's gradient is counted once, and DDP sums once.

BatchNorm in training mode normalises by the chunk, as in any method of this kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NamedTuple, TypedDict, get_args

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_modules.distributed import gather_rows, is_distributed, own_rows
from lightning_modules.precision import KeepsFloat32
from vitrail.errors import UserError
from vitrail.types import UNKNOWN, Mix

ClassWeighting = Literal["none", "inverse", "sqrt_inverse", "effective_number"]

ContrastiveLoss = Literal["info_nce", "label_aware", "sigmoid"]

EFFECTIVE_NUMBER_BETA = 0.999


class MeanLoss(NamedTuple):
    """A mean and what it is a mean over, so that means of unequal batches can be joined exactly.

    Attributes:
        value: float32 scalar, 0 with a gradient of 0 where ``weight`` is 0.
        weight: float32 scalar, the sum of the samples' weights; the number of known targets where classes are not
            weighted.
    """

    value: torch.Tensor
    weight: torch.Tensor


def class_weights_from_counts(
    task: str, num_classes: int, class_counts: Mapping[str, Sequence[int]] | None, scheme: ClassWeighting
) -> torch.Tensor | None:
    """Weights that make rare classes count more.

    ``inverse`` is n / (classes · count), scikit-learn's "balanced"; ``sqrt_inverse`` its square root, milder;
    ``effective_number`` is (1 - β) / (1 - β^count) with β = 0.999 (Cui et al., Class-Balanced Loss, CVPR 2019).

    Args:
        task: for messages and as key of ``class_counts``.
        num_classes: of the task.
        class_counts: training samples of each class, for each task.
        scheme: one of the above, or ``none``.

    Returns:
        float32 ``(num_classes,)`` with a mean of 1 over the training samples, 1 also for classes without any;
        nothing for ``none``.

    Raises:
        UserError: if the scheme is unknown, or needs counts that are missing or do not fit.
    """
    if scheme not in get_args(ClassWeighting):
        raise UserError(f"class_weighting: {scheme!r} is unknown; choose one of {', '.join(get_args(ClassWeighting))}")
    if scheme == "none":
        return None
    if class_counts is None or len(class_counts.get(task, ())) != num_classes:
        found = "missing" if class_counts is None or task not in class_counts else f"for {len(class_counts[task])}"
        raise UserError(
            f"class_weighting: {scheme!r} needs the training counts of the {num_classes} classes of {task!r}, they are "
            f"{found}; use a DataModule that has class_counts, or class_weighting: none"
        )
    counts = torch.tensor(class_counts[task], dtype=torch.float64)
    present = counts > 0
    weights = torch.ones_like(counts)
    if scheme == "effective_number":
        weights[present] = (1 - EFFECTIVE_NUMBER_BETA) / (1 - EFFECTIVE_NUMBER_BETA ** counts[present])
    else:
        weights[present] = counts[present] ** (-1.0 if scheme == "inverse" else -0.5)
    if present.any():
        weights[present] *= counts.sum() / (weights * counts).sum()
    return weights.float()


def masked_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    mix: Mix | None = None,
) -> MeanLoss:
    """Cross-entropy averaged over the samples whose target is known.

    As in torch, a mean with class weights divides by the sum of the targets' weights. In a mixed batch each
    image counts as ``lam`` of its own target and ``1 - lam`` of its partner's; a side that is unknown is left
    out, and the other keeps its share.

    Args:
        logits: float ``(B, C)``.
        target: int64 ``(B,)``, ``UNKNOWN`` where not known.
        class_weights: float ``(C,)``.
        label_smoothing: share of the target that is spread over all classes, in [0, 1).
        mix: how the batch was mixed, if it was.
    """
    if class_weights is not None:
        class_weights = class_weights.to(logits.dtype)
    if mix is None:
        total, weight = _sums(logits, target, torch.ones_like(logits[:, 0]), class_weights, label_smoothing)
    else:
        own, partner = mix["lam"].to(logits.dtype), target[mix["partner"]]
        total, weight = _sums(logits, target, own, class_weights, label_smoothing)
        other_total, other_weight = _sums(logits, partner, 1 - own, class_weights, label_smoothing)
        total, weight = total + other_total, weight + other_weight
    # Where nothing is known the sum is 0 with a gradient; dividing by 1 keeps both.
    return MeanLoss(total / torch.where(weight > 0, weight, torch.ones_like(weight)), weight.detach())


def _sums(
    logits: torch.Tensor,
    target: torch.Tensor,
    share: torch.Tensor,
    class_weights: torch.Tensor | None,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses and sum of the weights over the known targets, each sample by its share."""
    losses = F.cross_entropy(
        logits, target, class_weights, ignore_index=UNKNOWN, reduction="none", label_smoothing=label_smoothing
    )
    known = target != UNKNOWN
    weights = known.to(logits.dtype)
    if class_weights is not None:
        weights = weights * class_weights[target.clamp(min=0)]
    return (losses * share).sum(), (weights * share).sum()


class TaskLoss(KeepsFloat32):
    """The training loss of one task; its class weights move with the model and are not saved.

    Args:
        class_weights: float32 ``(C,)`` or nothing.
        label_smoothing: in [0, 1).

    Raises:
        UserError: if the smoothing is out of range.
    """

    class_weights: torch.Tensor | None

    def __init__(self, class_weights: torch.Tensor | None, label_smoothing: float) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing: must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor, mix: Mix | None) -> MeanLoss:
        """See ``masked_cross_entropy``."""
        return masked_cross_entropy(
            logits, target, class_weights=self.class_weights, label_smoothing=self.label_smoothing, mix=mix
        )


class Pairs(NamedTuple):
    """Images and their texts as unit vectors.

    Attributes:
        image: float ``(N, D)``.
        text: float ``(N, D)``; row i describes image i.
        positive_id: int64 ``(N,)``; rows that share one are positives of each other.
    """

    image: torch.Tensor
    text: torch.Tensor
    positive_id: torch.Tensor


def info_nce(own: Pairs, scale: torch.Tensor, *, pool: Pairs | None = None, first: int = 0) -> torch.Tensor:
    """Symmetric InfoNCE: each image must find its own text among all, and each text its image.

    van den Oord et al., 2018; in this form Radford et al., "Learning Transferable Visual Models From Natural Language
    Supervision", ICML 2021. ``positive_id`` is not looked at: another image's equal caption is a negative.

    Args:
        own: B pairs of this process.
        scale: what cosines are multiplied by, 1 / temperature; scalar.
        pool: pairs of all processes to compare with; by default the own ones.
        first: place of the first own pair among them.

    Returns:
        float scalar, the mean over the own pairs and both directions; log(N) at chance.
    """
    pool = pool or own
    target = torch.arange(first, first + len(own.image), device=own.image.device)
    to_text = F.cross_entropy(scale * own.image @ pool.text.T, target)
    to_image = F.cross_entropy(scale * own.text @ pool.image.T, target)
    return (to_text + to_image) / 2


def label_aware_info_nce(own: Pairs, scale: torch.Tensor, *, pool: Pairs | None = None) -> torch.Tensor:
    """Symmetric InfoNCE in which every pair that shares its ``positive_id`` is a positive.

    The target of a row is spread evenly over its positives (Yang et al., "Unified Contrastive Learning in
    Image-Text-Label Space", CVPR 2022; the outer sum of Khosla et al., "Supervised Contrastive Learning", 2020).
    Without repeated ids it equals ``info_nce``; with P positives of each row it cannot fall below log(P).

    Args:
        own: B pairs of this process.
        scale: what cosines are multiplied by; scalar.
        pool: pairs of all processes to compare with; by default the own ones. The own ones are among them.

    Returns:
        float scalar, the mean over the own pairs and both directions.
    """
    pool = pool or own
    positive = (own.positive_id[:, None] == pool.positive_id).to(own.image.dtype)
    target = positive / positive.sum(dim=1, keepdim=True)
    to_text = F.cross_entropy(scale * own.image @ pool.text.T, target)
    to_image = F.cross_entropy(scale * own.text @ pool.image.T, target)
    return (to_text + to_image) / 2


def sigmoid_contrastive(
    own: Pairs, scale: torch.Tensor, bias: torch.Tensor, *, pool: Pairs | None = None
) -> torch.Tensor:
    """Every pair of an image and a text is judged by itself: do they belong together?

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, with all pairs that share their
    ``positive_id`` as positives; without repeated ids it is the paper's.

    Args:
        own: B pairs of this process.
        scale: what cosines are multiplied by; scalar.
        bias: what is added then; scalar.
        pool: pairs of all processes to compare with; by default the own ones. The own ones are among them.

    Returns:
        float scalar, the sum over all texts, averaged over the own images.
    """
    pool = pool or own
    sign = (own.positive_id[:, None] == pool.positive_id).to(own.image.dtype) * 2 - 1
    return -F.logsigmoid(sign * (scale * own.image @ pool.text.T + bias)).sum(dim=1).mean()


class TemperatureOptions(TypedDict, total=False):
    """The temperature; what is left out has the value in brackets.

    Attributes:
        scale: what cosines are multiplied by at first, 1 / temperature [that of the pretrained model; 1 / 0.07 where
            there is none, 10 with the sigmoid loss].
        learned: whether it is learned [true].
        lr: highest learning rate of the temperature and bias [that of the heads].
        max_scale: it never grows beyond [100, or the scale of the pretrained model, if that is larger].
        bias: added to the scaled cosines at first; with the sigmoid loss only [that of the pretrained model, or -10].
    """

    scale: float
    learned: bool
    lr: float
    max_scale: float
    bias: float


class Temperature(KeepsFloat32):
    """Scale (and bias) of cosines.

    The scale is learned as its logarithm and clamped at 100, as CLIP does (Radford et al., 2021), or at that of the
    pretrained model, which SigLIP's (Zhai et al., 2023), whose the bias is, exceeds.

    Args:
        options: the settings.
        with_bias: whether the loss has a bias.

    Attributes:
        log_scale: float32 scalar in every precision, a parameter, or a buffer where the temperature is fixed.
        bias: float32 scalar likewise, 0 where the loss has none.
        max_log_scale: logarithm of the largest scale; a checkpoint has to keep it.

    Raises:
        UserError: for an unknown key or a value out of range.
    """

    log_scale: torch.Tensor
    bias: torch.Tensor

    def __init__(self, options: TemperatureOptions | None, *, with_bias: bool) -> None:
        super().__init__()
        given = options or {}
        if strange := sorted(set(given) - set(TemperatureOptions.__annotations__)):
            known = ", ".join(TemperatureOptions.__annotations__)
            raise UserError(f"temperature: unknown key {strange[0]!r}; known keys are {known}")
        max_scale = given.get("max_scale", 100.0)
        scale = given.get("scale", min(10.0 if with_bias else 1 / 0.07, max_scale))
        if not 0 < scale <= max_scale:
            raise UserError(f"temperature: scale must be above 0 and at most max_scale {max_scale}, got {scale}")
        if given.get("lr", 0.0) < 0:
            raise UserError(f"temperature: lr must not be negative, got {given['lr']}")
        if "bias" in given and not with_bias:
            raise UserError("temperature: bias belongs to the loss sigmoid; leave it out")
        self.max_log_scale = math.log(max_scale)
        self._given, self._with_bias = given, with_bias
        self.learned = given.get("learned", True)
        log_scale = torch.tensor(math.log(scale))
        bias = torch.tensor(given.get("bias", -10.0) if with_bias else 0.0)
        if self.learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)
        if self.learned and with_bias:
            self.bias = nn.Parameter(bias)
        else:
            self.register_buffer("bias", bias)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and bias, float32 scalars."""
        return self.log_scale.exp(), self.bias

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the scale below its maximum; to be called after each step of the optimizer.

        Not in ``forward``, where a clamped value would have no gradient and could never come back.
        """
        self.log_scale.clamp_(max=self.max_log_scale)

    @torch.no_grad()
    def take_pretrained(self, log_scale: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        """Take over the values of a pretrained model as they are, unless the options give other ones.

        Raises:
            UserError: if the scale is beyond the ``max_scale`` of the options.
        """
        if log_scale is not None and "scale" not in self._given:
            if "max_scale" in self._given and float(log_scale) > self.max_log_scale:
                raise UserError(
                    f"temperature.max_scale: {self._given['max_scale']:g} is below the scale of the pretrained model, "
                    f"{math.exp(float(log_scale)):.6g}; raise it, or give temperature.scale"
                )
            self.log_scale.copy_(log_scale.reshape(()))
            self.max_log_scale = max(self.max_log_scale, float(log_scale))
        if bias is not None and "bias" not in self._given and self._with_bias:
            self.bias.copy_(bias.reshape(()))


class ContrastiveObjective(nn.Module):
    """A contrastive loss and its temperature.

    Args:
        loss: which one.
        temperature: the scale of the similarities.

    Raises:
        UserError: if a setting is unknown or out of range.
    """

    def __init__(self, loss: ContrastiveLoss, temperature: TemperatureOptions | None) -> None:
        super().__init__()
        if loss not in get_args(ContrastiveLoss):
            raise UserError(f"loss: {loss!r} is unknown; choose one of {', '.join(get_args(ContrastiveLoss))}")
        self.loss = loss
        self.temperature = Temperature(temperature, with_bias=loss == "sigmoid")

    def forward(self, own: Pairs, *, joined: bool) -> torch.Tensor:
        """The loss.

        Args:
            own: pairs of this process, of unit length.
            joined: whether they are compared with those of all processes, which must then all call this; the mean over
                processes has the gradient of the joined batch.

        Returns:
            float32 scalar.
        """
        pool, first = own, 0
        if joined and is_distributed():
            pool, first = Pairs(*(gather_rows(rows) for rows in own)), own_rows(len(own.image)).start
        scale, bias = self.temperature()
        # Half precision would round away the differences that are compared.
        with torch.autocast(own.image.device.type, enabled=False):
            if self.loss == "info_nce":
                return info_nce(own, scale, pool=pool, first=first)
            if self.loss == "sigmoid":
                return sigmoid_contrastive(own, scale, bias, pool=pool)
            return label_aware_info_nce(own, scale, pool=pool)


def encode_in_chunks(
    encode: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], chunk_size: int, network: nn.Module
) -> torch.Tensor:
    """Encode a batch with the memory of one chunk.

    Args:
        encode: from inputs ``(b, …)`` to embeddings ``(b, D)``.
        inputs: tensors of B rows each.
        chunk_size: rows that are encoded at a time; 0 for all at once, with nothing encoded twice.
        network: what ``encode`` computes with; its BatchNorm statistics are only moved by the first pass.

    Returns:
        ``(B, D)``.
    """
    rows = len(inputs[0])
    if chunk_size == 0 or rows <= chunk_size:
        return encode(*inputs)
    chunks = list(zip(*(torch.split(tensor, chunk_size) for tensor in inputs), strict=True))
    if not torch.is_grad_enabled():
        return torch.cat([encode(*chunk) for chunk in chunks])

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(network)

    return torch.cat([checkpoint(encode, *chunk, use_reentrant=False, context_fn=contexts) for chunk in chunks])


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Leave running means and variances as they are, so that encoding twice does not count twice."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms if norm.training]
    for norm, _, _ in kept:
        # With a momentum of 0 a batch counts nothing; the counter itself is exchanged for the time.
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, momentum, counter in kept:
            norm.momentum = momentum
            norm.num_batches_tracked = counter
