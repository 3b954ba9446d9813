"""Losses: cross-entropy per sample, and contrastive losses as functions of embeddings, with the temperature apart.

Cross-entropy leaves out unknown targets, weights rare classes, smooths targets and splits mixed pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F

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
    picture counts as ``lam`` of its own target and ``1 - lam`` of its partner's; a side that is unknown is left
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
    """Pictures and their texts as unit vectors.

    Attributes:
        image: float ``(N, D)``.
        text: float ``(N, D)``; row i describes picture i.
        positive_id: int64 ``(N,)``; rows that share one are positives of each other.
    """

    image: torch.Tensor
    text: torch.Tensor
    positive_id: torch.Tensor


def info_nce(own: Pairs, scale: torch.Tensor, *, pool: Pairs | None = None, first: int = 0) -> torch.Tensor:
    """Symmetric InfoNCE: each picture must find its own text among all, and each text its picture.

    van den Oord et al., 2018; in this form Radford et al., "Learning Transferable Visual Models From Natural Language
    Supervision", ICML 2021. ``positive_id`` is not looked at: another picture's equal caption is a negative.

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
    """Every pair of a picture and a text is judged by itself: do they belong together?

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, with all pairs that share their
    ``positive_id`` as positives; without repeated ids it is the paper's.

    Args:
        own: B pairs of this process.
        scale: what cosines are multiplied by; scalar.
        bias: what is added then; scalar.
        pool: pairs of all processes to compare with; by default the own ones. The own ones are among them.

    Returns:
        float scalar, the sum over all texts, averaged over the own pictures.
    """
    pool = pool or own
    sign = (own.positive_id[:, None] == pool.positive_id).to(own.image.dtype) * 2 - 1
    return -F.logsigmoid(sign * (scale * own.image @ pool.text.T + bias)).sum(dim=1).mean()
