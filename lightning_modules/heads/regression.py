"""Regression tasks: a number, in its own units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_modules.heads.base import TaskOutput
from lightning_modules.metrics import MeanLoss, masked_mean
from vitrail.errors import UserError
from vitrail.types import Mix, TaskKind

LOG_VARIANCE_LIMIT = 10.0
"""Largest logarithm of the variance, either way, in units of the training targets' variance."""


class RegressionOutput(TaskOutput):
    """A number, float ``(B, 1)``, or with ``gaussian_nll`` also the logarithm of its variance, ``(B, 2)``.

    The head computes them for standardised targets; mean and standard deviation of the training targets are saved with
    the weights, and outputs are in the units of the data. Training losses, averaged over the known targets, in
    standardised units:

    - ``mse``: squared error.
    - ``huber``: squared up to ``delta`` standard deviations, linear beyond (Huber, 1964).
    - ``gaussian_nll``: negative log-likelihood of a normal distribution (Nix and Weigend, 1994), without constants.

    Args:
        task: name for messages.
        stats: mean and standard deviation of the training targets.
        name: of the loss.
        delta: of ``huber``.
    """

    kind: ClassVar[TaskKind] = "regression"
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, task: str, stats: Sequence[float] | None, name: str = "mse", delta: float = 1.0) -> None:
        super().__init__()
        if stats is None or len(stats) != 2:
            raise UserError(
                f"target_stats: mean and standard deviation of {task!r} are missing; use a DataModule that has "
                "target_stats, such as Table"
            )
        mean, std = map(float, stats)
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise UserError(
                f"tasks: the training targets of {task!r} do not vary (standard deviation {std:g}), so there is "
                "nothing to predict; leave the task out"
            )
        self.width = 2 if name == "gaussian_nll" else 1
        self.name, self.delta = name, delta
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """See ``TaskOutput``."""
        raw = raw.float()
        value = raw[:, :1] * self.std + self.mean
        if self.width == 1:
            return value
        log_variance = raw[:, 1:].clamp(-LOG_VARIANCE_LIMIT, LOG_VARIANCE_LIMIT) + 2 * self.std.log()
        return torch.cat([value, log_variance], dim=1)

    def loss(self, logits: torch.Tensor, target: torch.Tensor, mix: Mix | None = None) -> MeanLoss:
        """See ``TaskOutput``."""
        return self._mean(self.name, logits, target, mix)

    def evaluation_loss(self, logits: torch.Tensor, target: torch.Tensor) -> MeanLoss:
        """Squared error in units of the training targets' variance: 1 for always predicting their mean."""
        return self._mean("mse", logits, target, None)

    def scores(self) -> Metric:
        """See ``TaskOutput``."""
        return RegressionScores()

    def _mean(self, name: str, logits: torch.Tensor, target: torch.Tensor, mix: Mix | None) -> MeanLoss:
        value = (logits[:, 0] - self.mean) / self.std

        def losses_of(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            known = ~numbers.isnan()
            # An unknown target has no error; NaN times 0 would still be NaN.
            aim = torch.where(known, (numbers.to(value.dtype) - self.mean) / self.std, value.detach())
            if name == "gaussian_nll":
                variance = (logits[:, 1] - 2 * self.std.log()).exp()
                losses = F.gaussian_nll_loss(value, aim, variance, reduction="none")
            elif name == "huber":
                losses = F.huber_loss(value, aim, reduction="none", delta=self.delta)
            else:
                losses = F.mse_loss(value, aim, reduction="none")
            weights = known.to(value.dtype)
            return losses * weights, weights

        return masked_mean(losses_of, target, mix)


class RegressionScores(Metric):
    """Scores of one regression task.

    - ``mae``, ``rmse``: mean absolute and root mean squared error in the units of the data, lower is better.
    - ``r2``: share of the variance that is explained, at most 1, 0 for always predicting the split's mean
      (scikit-learn's ``r2_score``); left out where the targets do not vary.
    - ``spearman``: rank correlation, -1 to 1, ``scipy.stats.spearmanr``; left out where targets or predictions do not
      vary.
    """

    full_state_update = False
    values: list[torch.Tensor]
    targets: list[torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Keep the outputs of a batch.

        Args:
            logits: float ``(B, 1)`` or ``(B, 2)``, the value first.
            targets: float32 ``(B,)``, NaN where not known.
        """
        self.values.append(logits[:, 0].detach().float())
        self.targets.append(targets.float())

    def compute(self) -> dict[str, torch.Tensor]:
        """The scores by name, float32 scalars; those that are not defined are left out."""
        from scipy.stats import spearmanr

        # On the processor: some accelerators lack float64.
        targets = dim_zero_cat(self.targets).cpu().double()
        known = ~targets.isnan()
        targets, values = targets[known], dim_zero_cat(self.values).cpu().double()[known]
        if not len(targets):
            return {}
        errors = values - targets
        scores = {"mae": errors.abs().mean(), "rmse": errors.square().mean().sqrt()}
        if (targets != targets[0]).any():
            scores["r2"] = 1 - errors.square().sum() / (targets - targets.mean()).square().sum()
            if (values != values[0]).any():
                scores["spearman"] = torch.tensor(float(spearmanr(values.numpy(), targets.numpy()).statistic))
        return {name: one.float().to(self.device) for name, one in scores.items()}
