"""Ordinal tasks: one of C classes that have an order."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.heads.base import TaskOutput
from lightning_modules.heads.single_label import masked_cross_entropy
from lightning_modules.metrics import MeanLoss, TaskScores, predicted_classes
from vitrail.types import UNKNOWN, Mix, TaskKind


class OrdinalOutput(TaskOutput):
    """Log-probabilities of C ordered classes, float ``(B, C)``, from fewer numbers than classes.

    - ``corn``: C - 1 numbers, the logits of being above class k for those not below it; the probabilities of the
      classes follow by the chain rule (Shi, Cao and Raschka, 2021). Summed over these conditional tasks, the binary
      cross-entropies of CORN are the negative logarithm of the target's probability, which is the loss here.
    - ``cumulative_link``: one number, and C - 1 cutpoints that are trained; an image is at most of class k with the
      logistic function of cutpoint minus number as its probability (the proportional odds model; McCullagh, 1980).

    Args:
        num_classes: C.
        name: corn or cumulative_link.
        class_weights: float ``(C,)``; not saved.
    """

    kind: ClassVar[TaskKind] = "ordinal"
    class_weights: torch.Tensor | None

    def __init__(self, num_classes: int, name: str = "corn", class_weights: torch.Tensor | None = None) -> None:
        super().__init__()
        self.num_classes, self.name = num_classes, name
        self.width = num_classes - 1 if name == "corn" else 1
        self.register_buffer("class_weights", class_weights, persistent=False)
        if name == "cumulative_link":
            # At first all classes are equally probable for an image whose number is 0.
            cutpoints = torch.arange(1, num_classes).div(num_classes).logit()
            self.first = nn.Parameter(cutpoints[:1].clone())
            self.gaps = nn.Parameter(cutpoints.diff().expm1().log())

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """See ``TaskOutput``."""
        raw = raw.float()
        none = torch.zeros_like(raw[:, :1])
        if self.name == "corn":
            reached = torch.cat([none, F.logsigmoid(raw).cumsum(dim=1)], dim=1)
            return reached + torch.cat([F.logsigmoid(-raw), none], dim=1)
        gaps = F.softplus(self.gaps)
        margins = torch.cat([self.first, self.first + gaps.cumsum(dim=0)]) - raw
        # The difference of two logistic functions, without cancellation.
        between = torch.log(-torch.expm1(-gaps)).expand(len(raw), -1)
        return (
            torch.cat([F.logsigmoid(margins), none], dim=1)
            + torch.cat([none, F.logsigmoid(-margins)], dim=1)
            + torch.cat([none, between, none], dim=1)
        )

    def loss(self, logits: torch.Tensor, target: torch.Tensor, mix: Mix | None = None) -> MeanLoss:
        """See ``TaskOutput``."""
        return masked_cross_entropy(logits, target, self.class_weights, mix=mix)

    def evaluation_loss(self, logits: torch.Tensor, target: torch.Tensor) -> MeanLoss:
        """Cross-entropy."""
        return masked_cross_entropy(logits, target)

    def scores(self) -> OrdinalScores:
        """See ``TaskOutput``."""
        return OrdinalScores(self.num_classes)


class OrdinalScores(TaskScores):
    """Scores of one ordinal task: those of ``TaskScores``, and two that know of the order.

    - ``mae``: mean distance between predicted class and target, in classes; lower is better.
    - ``quadratic_kappa``: agreement beyond chance, weighted by the squared distance, at most 1, higher is better;
      scikit-learn's ``cohen_kappa_score`` with quadratic weights. Left out where it is not defined.

    A sample without a predicted class counts as predicted at the end that is farther from its target.
    """

    confusion: torch.Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """See ``TaskScores``."""
        super().update(logits, targets)
        last = len(self.confusion) - 1
        labels, predicted = targets.clamp(min=0), predicted_classes(logits)
        farther = torch.where(labels * 2 > last, 0, last)
        cells = labels * (last + 1) + torch.where(predicted == UNKNOWN, farther, predicted)
        self.confusion.view(-1).scatter_add_(0, cells, (targets != UNKNOWN).long())

    def compute(self) -> dict[str, torch.Tensor]:
        """See ``TaskScores``."""
        counts = self.confusion.cpu().double()
        classes = torch.arange(len(counts), dtype=torch.float64)
        distance = (classes[:, None] - classes).abs()
        total = counts.sum().clamp(min=1)
        values = {"mae": (counts * distance).sum() / total}
        by_chance = (counts.sum(dim=1)[:, None] * counts.sum(dim=0) * distance**2).sum() / total
        if by_chance > 0:
            values["quadratic_kappa"] = 1 - (counts * distance**2).sum() / by_chance
        return {**super().compute(), **{name: one.float().to(self.device) for name, one in values.items()}}
