"""What every task shares whose outputs are logits over named classes: losses and scores of each split, logged alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_modules.base import LoggedSplit, VisionTask
from lightning_modules.losses import MeanLoss, masked_cross_entropy
from lightning_modules.metrics import SplitMetrics


class ScoredTask(VisionTask):
    """A task that is judged by its logits. A subclass calls ``keep_scores`` once it knows its tasks.

    Attributes:
        tasks: class names of each task.
        task_weights: weight of each task's loss in the sum.
    """

    def keep_scores(self, tasks: dict[str, list[str]], task_weights: Mapping[str, float] | None = None) -> None:
        """Makes the metrics of all splits.

        Args:
            tasks: class names of each task.
            task_weights: weight of each task's loss in the sum, by default 1.
        """
        self.tasks = tasks
        self.task_weights = {**dict.fromkeys(tasks, 1.0), **(task_weights or {})}
        self.train_metrics = SplitMetrics(tasks, self.task_weights, losses_only=True)
        self.val_metrics = SplitMetrics(tasks, self.task_weights)
        self.test_metrics = SplitMetrics(tasks, self.task_weights)

    @property
    def train_sums(self) -> nn.Module:
        """See ``VisionTask``."""
        return self.train_metrics

    def log_epoch(self, split: LoggedSplit) -> None:
        """Log the averages and scores of the epoch."""
        values = {f"{split}/{name}": value for name, value in self.epoch_values(split).items()}
        # The values are the same on all processes already; sync_dist only keeps Lightning from doubting it.
        self.log_dict(values, sync_dist=True)

    def epoch_values(self, split: LoggedSplit) -> dict[str, Any]:
        """Averages and scores of the epoch, which are counted anew from here."""
        metrics = self._metrics_of(split)
        values = dict(metrics.compute())
        metrics.reset()
        return values

    def plain_losses(
        self, logits: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
    ) -> dict[str, MeanLoss]:
        """Cross-entropy of each task, the loss that all runs are compared by in evaluation.

        Args:
            logits: by task float ``(B, C)``.
            targets: by task int64 ``(B,)``, -1 where unknown.
        """
        return {task: masked_cross_entropy(logits[task], targets[task]) for task in self.tasks}

    def count(
        self,
        split: LoggedSplit,
        means: Mapping[str, MeanLoss],
        logits: Mapping[str, torch.Tensor],
        targets: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Counts the losses of a batch and, in evaluation, its scores.

        Args:
            split: that the batch is of.
            means: loss of each task.
            logits: by task float ``(B, C)``; not read in training, where pictures may be mixed.
            targets: by task int64 ``(B,)``, -1 where unknown.

        Returns:
            The weighted sum of the losses, a scalar.
        """
        metrics = self._metrics_of(split)
        metrics.update_losses(means)
        if split != "train":
            metrics.update_scores(logits, targets)
        return torch.stack([self.task_weights[task] * mean.value for task, mean in means.items()]).sum()

    def _metrics_of(self, split: LoggedSplit) -> SplitMetrics:
        return {"train": self.train_metrics, "val": self.val_metrics, "test": self.test_metrics}[split]
