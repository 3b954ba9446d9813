"""Single-label tasks: one of C classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, get_args

import torch
import torch.nn.functional as F
from torchmetrics import Metric

from lightning_modules.heads.base import TaskOutput
from lightning_modules.metrics import MeanLoss, TaskScores, masked_mean
from lightning_modules.options import ClassWeighting, LossOptions
from vitrail.errors import UserError
from vitrail.types import UNKNOWN, Mix, TaskKind

EFFECTIVE_NUMBER_BETA = 0.999

_OF_PRIOR = ("logit_adjusted", "balanced_softmax")


class SingleLabelOutput(TaskOutput):
    """Logits of C classes, float ``(B, C)``.

    Training losses, each averaged over the samples with a known target:

    - ``cross_entropy``.
    - ``logit_adjusted``: cross-entropy of the logits plus ``tau`` times the logarithm of the classes' share of the
      training samples (Menon et al., Long-tail learning via logit adjustment, ICLR 2021).
    - ``balanced_softmax``: the same with ``tau`` 1 (Ren et al., NeurIPS 2020).
    - ``bce``: one binary cross-entropy for each class, their mean (Wightman et al., ResNet strikes back, 2021). Above
      ``bce_threshold`` of a mixed image a class is a full target.
    - ``focal``: cross-entropy times (1 - probability of the target) to the power of ``gamma`` (Lin et al., ICCV 2017).

    Args:
        task: name for messages.
        num_classes: C.
        name: of the loss.
        options: of the loss.
        counts: training samples of each class.
        class_weights: float ``(C,)``; not saved.
    """

    kind: ClassVar[TaskKind] = "single_label"
    class_weights: torch.Tensor | None
    adjustment: torch.Tensor | None

    def __init__(
        self,
        task: str,
        num_classes: int,
        name: str = "cross_entropy",
        options: LossOptions = LossOptions(),
        counts: Sequence[int] | None = None,
        class_weights: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.width = num_classes
        self.name, self.label_smoothing = name, options.label_smoothing
        self.gamma, self.bce_threshold = options.gamma, options.bce_threshold
        self.register_buffer("class_weights", class_weights, persistent=False)
        adjustment = None
        if name in _OF_PRIOR:
            tau = options.tau if name == "logit_adjusted" else 1.0
            adjustment = tau * _log_prior(task, num_classes, counts, name)
        self.register_buffer("adjustment", adjustment, persistent=False)

    def loss(self, logits: torch.Tensor, target: torch.Tensor, mix: Mix | None = None) -> MeanLoss:
        """See ``TaskOutput``."""
        if self.name == "bce":
            return self._binary(logits, target, mix)
        if self.adjustment is not None:
            logits = logits + self.adjustment.to(logits.dtype)
        gamma = self.gamma if self.name == "focal" else 0.0
        return masked_cross_entropy(logits, target, self.class_weights, self.label_smoothing, mix, gamma)

    def evaluation_loss(self, logits: torch.Tensor, target: torch.Tensor) -> MeanLoss:
        """Plain cross-entropy."""
        return masked_cross_entropy(logits, target)

    def scores(self) -> Metric:
        """See ``TaskOutput``."""
        return TaskScores(self.width)

    def _binary(self, logits: torch.Tensor, target: torch.Tensor, mix: Mix | None) -> MeanLoss:
        classes = torch.arange(logits.shape[1], device=logits.device)
        off = self.label_smoothing / logits.shape[1]

        def losses_of(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            hits = (chosen.view(len(chosen), -1, 1) == classes).any(dim=1)
            soft = off + (1 - self.label_smoothing) * hits.to(logits.dtype)
            losses = F.binary_cross_entropy_with_logits(logits, soft, reduction="none").mean(dim=1)
            weights = (chosen.view(len(chosen), -1) != UNKNOWN).all(dim=1).to(logits.dtype)
            if self.class_weights is not None:
                of_classes = self.class_weights.to(logits.dtype)[chosen.clamp(min=0)]
                weights = weights * of_classes.view(len(chosen), -1).mean(dim=1)
            return losses * weights, weights

        if mix is None or self.bce_threshold is None:
            return masked_mean(losses_of, target, mix)
        own = mix["lam"]
        partner = torch.where(1 - own > self.bce_threshold, target[mix["partner"]], target)
        first = torch.where(own > self.bce_threshold, target, partner)
        return masked_mean(losses_of, torch.stack([first, partner], dim=1), None)


def masked_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    mix: Mix | None = None,
    gamma: float = 0.0,
) -> MeanLoss:
    """Cross-entropy averaged over the samples whose target is known.

    As in torch, a mean with class weights divides by the sum of the targets' weights. In a mixed batch each image
    counts as ``lam`` of its own target and ``1 - lam`` of its partner's; an unknown target is left out.

    Args:
        logits: float ``(B, C)``.
        target: int64 ``(B,)``, ``UNKNOWN`` where not known.
        class_weights: float ``(C,)``.
        label_smoothing: share of the target that is spread over all classes, in [0, 1).
        mix: partners and shares of a mixed batch.
        gamma: exponent of the focal loss; 0 for plain cross-entropy.
    """
    if class_weights is not None:
        class_weights = class_weights.to(logits.dtype)

    def losses_of(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses = F.cross_entropy(
            logits, labels, class_weights, ignore_index=UNKNOWN, reduction="none", label_smoothing=label_smoothing
        )
        weights = (labels != UNKNOWN).to(logits.dtype)
        if class_weights is not None:
            weights = weights * class_weights[labels.clamp(min=0)]
        if gamma:
            own = logits.log_softmax(dim=1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
            losses = losses * (-torch.expm1(own)).pow(gamma)
        return losses, weights

    return masked_mean(losses_of, target, mix)


def class_weights_from_counts(
    task: str, num_classes: int, class_counts: Mapping[str, Sequence[int]] | None, scheme: ClassWeighting
) -> torch.Tensor | None:
    """Class weights for the loss.

    ``inverse`` is n / (classes · count), scikit-learn's "balanced"; ``sqrt_inverse`` its square root;
    ``effective_number`` is (1 - β) / (1 - β^count) with β = 0.999 (Cui et al., Class-Balanced Loss, CVPR 2019).

    Returns:
        float32 ``(num_classes,)`` with a mean of 1 over the training samples, 1 also for classes without any;
        None for ``none``.
    """
    if scheme not in get_args(ClassWeighting):
        raise UserError(
            f"loss_options.class_weighting: must be one of {', '.join(get_args(ClassWeighting))}; got {scheme!r}"
        )
    if scheme == "none":
        return None
    given = None if class_counts is None else class_counts.get(task)
    counts = _checked_counts(
        task, num_classes, given, f"loss_options.class_weighting: {scheme!r}", "class_weighting: none"
    )
    present = counts > 0
    weights = torch.ones_like(counts)
    if scheme == "effective_number":
        weights[present] = (1 - EFFECTIVE_NUMBER_BETA) / (1 - EFFECTIVE_NUMBER_BETA ** counts[present])
    else:
        weights[present] = counts[present] ** (-1.0 if scheme == "inverse" else -0.5)
    if present.any():
        weights[present] *= counts.sum() / (weights * counts).sum()
    return weights.float()


def _log_prior(task: str, num_classes: int, counts: Sequence[int] | None, name: str) -> torch.Tensor:
    """Logarithm of the classes' share of the training samples, float32 ``(C,)``; classes without any count as one."""
    checked = _checked_counts(task, num_classes, counts, f"loss_options: {name!r}", "another loss")
    checked = checked.clamp(min=1)
    return (checked / checked.sum()).log().float()


def _checked_counts(task: str, num_classes: int, counts: Sequence[int] | None, what: str, fix: str) -> torch.Tensor:
    if counts is None or len(counts) != num_classes:
        found = "missing" if counts is None else f"for {len(counts)}"
        raise UserError(
            f"{what} needs the training counts of the {num_classes} classes of {task!r}, they are {found}; use a "
            f"DataModule that has class_counts, or {fix}"
        )
    return torch.tensor(counts, dtype=torch.float64)
