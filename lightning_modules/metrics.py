"""Exact averages and scores of an epoch: over samples rather than batches, over all processes, known targets only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torchmetrics import Metric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from datamodules.schema import UNKNOWN
from lightning_modules.losses import MeanLoss

TOP_K = (3, 5)


def task_scores(num_classes: int) -> MetricCollection:
    """Scores of one task, each in [0, 1], higher is better.

    - ``accuracy``: share of the samples whose first choice is right.
    - ``mean_per_class``: mean over the classes of the share of their samples that is right (macro recall), the metric
      of the Flowers-102 paper; classes count as for ``f1_macro``.
    - ``top3``, ``top5``: share of the samples whose target is among the first k choices; only where there are more
      than k classes.
    - ``f1_macro``: mean F1 of the classes, each counting the same. As in scikit-learn's default, the classes that
      occur among targets or predictions count, the others do not.
    - ``f1_weighted``: mean F1 of the classes, each counting as often as it occurs among the targets.
    """

    def accuracy(k: int) -> Metric:
        return MulticlassAccuracy(num_classes, top_k=k, average="micro", ignore_index=UNKNOWN, validate_args=False)

    def f1(average: Literal["macro", "weighted"]) -> Metric:
        return MulticlassF1Score(num_classes, average=average, ignore_index=UNKNOWN, validate_args=False)

    # validate_args=False: torchmetrics' checks of every batch would make a GPU wait, and targets are ours.
    top = {f"top{k}": accuracy(k) for k in TOP_K if k < num_classes}
    # F1 scores and recall count the same things, so they are told to share them.
    groups = [["accuracy"], ["f1_macro", "f1_weighted", "mean_per_class"], *([name] for name in top)]
    recall = MulticlassAccuracy(num_classes, average="macro", ignore_index=UNKNOWN, validate_args=False)
    f1_scores = {"f1_macro": f1("macro"), "f1_weighted": f1("weighted")}
    scores = {"accuracy": accuracy(1), **f1_scores, "mean_per_class": recall, **top}
    return MetricCollection(dict(scores), compute_groups=groups)


class SplitMetrics(nn.Module):
    """Losses and scores of all tasks over one epoch of one split.

    Args:
        tasks: class names of each task.
        task_weights: weight of each task in the total loss.
        losses_only: leave the scores out, as in training, where pictures may be mixed.
    """

    def __init__(
        self, tasks: Mapping[str, Sequence[str]], task_weights: Mapping[str, float], losses_only: bool = False
    ) -> None:
        super().__init__()
        self.task_weights = {task: task_weights[task] for task in tasks}
        # Lists, because the name of a task need not be a legal name of a module. A loss that is not a number must
        # show, hence "disable"; and sums, because with "disable" torchmetrics' MeanMetric ignores its weights (1.9).
        self.losses = nn.ModuleList(SumMetric(nan_strategy="disable") for _ in tasks)
        self.known = nn.ModuleList(SumMetric(nan_strategy="disable") for _ in tasks)
        self.scores = nn.ModuleList(task_scores(len(names)) for names in tasks.values() if not losses_only)

    def update_losses(self, losses: Mapping[str, MeanLoss]) -> None:
        """Count the mean losses of a batch, each by the weight of its samples."""
        for task, total, known in zip(self.task_weights, _all(self.losses), _all(self.known), strict=True):
            total.update(losses[task].value.detach() * losses[task].weight)
            known.update(losses[task].weight)

    def update_scores(self, logits: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> None:
        """Count the predictions of a batch.

        Args:
            logits: for each task float ``(B, C)``.
            targets: for each task int64 ``(B,)``, ``UNKNOWN`` where not known.
        """
        for task, scores in zip(self.task_weights, _all(self.scores), strict=True):
            rows, wanted = logits[task], targets[task]
            if not len(rows):
                # torchmetrics refuses a batch of nothing but padding; a row without a target counts nothing.
                rows, wanted = rows.new_zeros(1, rows.shape[1]), wanted.new_full((1,), UNKNOWN)
            scores.update(rows, wanted)

    def compute(self) -> dict[str, torch.Tensor]:
        """Values over all batches and processes since the last reset.

        Returns:
            Scalars: ``loss``, the weighted sum of the tasks' mean losses; ``<task>/loss`` where there are several
            tasks; ``<task>/<score>``. A task without any known target is left out.
        """
        # Every process computes everything, because computing is where they exchange their counts.
        totals, known, scores = (
            [metric.compute() for metric in _all(m)] for m in (self.losses, self.known, self.scores)
        )
        values: dict[str, torch.Tensor] = {"loss": torch.zeros_like(known[0])}
        for index, (task, task_weight) in enumerate(self.task_weights.items()):
            if known[index] == 0:
                continue
            loss = totals[index] / known[index]
            values["loss"] = values["loss"] + task_weight * loss
            if len(self.task_weights) > 1:
                values[f"{task}/loss"] = loss
            if scores:
                values |= {f"{task}/{name}": value for name, value in scores[index].items()}
        return values

    def reset(self) -> None:
        """Forget everything."""
        for metric in (*_all(self.losses), *_all(self.known), *_all(self.scores)):
            metric.reset()


class MeanOverSamples(nn.Module):
    """A loss averaged over samples rather than batches, over all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = SumMetric(nan_strategy="disable")
        self.weight = SumMetric(nan_strategy="disable")

    def update(self, value: torch.Tensor, samples: int) -> None:
        """Count the mean of a batch of so many samples."""
        self.total.update(value.detach() * samples)
        self.weight.update(samples)

    def compute(self) -> torch.Tensor | None:
        """The mean since the last reset, scalar; None where there was nothing."""
        # All processes have batches or none has, so all or none go on to exchange their counts.
        if not self.weight.update_called:
            return None
        total, weight = self.total.compute(), self.weight.compute()
        return total / weight if weight > 0 else None

    def reset(self) -> None:
        """Forget everything."""
        self.total.reset()
        self.weight.reset()


def _all(metrics: nn.ModuleList) -> list[Any]:
    """What torch's list only knows to be modules."""
    return list(metrics)
