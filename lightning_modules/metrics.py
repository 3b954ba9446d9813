"""Exact averages and scores of an epoch: over samples rather than batches, over all processes, known targets only.

Checkpoints keep the sums of an unfinished epoch (``epoch_sums``). torchmetrics leaves its states out, so the averages
of an epoch that is resumed in its middle would be those of its second part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torchmetrics import Metric, SumMetric

from lightning_modules.precision import KeepsFloat32
from vitrail.types import UNKNOWN

TOP_K = (3, 5)

TIE_TOLERANCE = 1e-6
"""Logits that differ by no more are equal, as in ``vitrail.predictions``."""


class MeanLoss(NamedTuple):
    """A mean and the weight it is a mean over, so that means of unequal batches can be joined exactly.

    Attributes:
        value: float32 scalar, 0 with a gradient of 0 where ``weight`` is 0.
        weight: float32 scalar, the sum of the samples' weights; the number of known targets where classes are not
            weighted.
    """

    value: torch.Tensor
    weight: torch.Tensor


class TaskScores(Metric):
    """Scores of one task, each in [0, 1], higher is better.

    - ``accuracy``: share of the samples whose predicted class is the target.
    - ``mean_per_class``: mean of the recalls of the classes that have samples, whatever is predicted: the metric of the
      Flowers-102 paper, scikit-learn's ``balanced_accuracy_score``.
    - ``top3``, ``top5``: share of the samples whose target is among the first k choices; only where there are more
      than k classes.
    - ``f1_macro``: mean F1 of the classes, each counting the same. As in scikit-learn's default, the classes that
      occur among targets or predictions count, the others do not.
    - ``f1_weighted``: mean F1 of the classes, each counting as often as it occurs among the targets.

    Ties count against the model: classes with the target's logit rank before it, and a sample whose largest logit is
    shared by several classes has no predicted class and is wrong (``predicted_classes``).
    """

    full_state_update = False
    support: torch.Tensor
    predictions: torch.Tensor
    hits: torch.Tensor
    within: torch.Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.top_k = [k for k in TOP_K if k < num_classes]
        # Whole numbers: sums of floats would be rounded, those of half precision stop at 256.
        for name, length in (("support", num_classes), ("predictions", num_classes), ("hits", num_classes)):
            self.add_state(name, torch.zeros(length, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("within", torch.zeros(len(self.top_k), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Count predictions.

        Args:
            logits: float ``(B, C)``.
            targets: int64 ``(B,)``, ``UNKNOWN`` where not known.
        """
        # Unknown targets have weight 0; selecting the known ones would make a GPU wait for the CPU.
        known = (targets != UNKNOWN).long()
        labels, predicted = targets.clamp(min=0), predicted_classes(logits)
        self.support.scatter_add_(0, labels, known)
        self.predictions.scatter_add_(0, predicted.clamp(min=0), known * (predicted != UNKNOWN))
        self.hits.scatter_add_(0, labels, known * (predicted == labels))
        if self.top_k:
            places = _places(logits, labels)
            self.within += torch.stack([(known * (places < k)).sum() for k in self.top_k])

    def compute(self) -> dict[str, torch.Tensor]:
        """The scores by name, float32 scalars; 0 where there is no known target."""
        support, predictions, hits = self.support.float(), self.predictions.float(), self.hits.float()
        total = support.sum().clamp(min=1)
        f1 = 2 * hits / (support + predictions).clamp(min=1)
        occurs, has_samples = support + predictions > 0, support > 0
        return {
            "accuracy": hits.sum() / total,
            "f1_macro": f1.sum() / occurs.sum().clamp(min=1),
            "f1_weighted": (f1 * support).sum() / total,
            "mean_per_class": (hits / support.clamp(min=1)).sum() / has_samples.sum().clamp(min=1),
            **{f"top{k}": count / total for k, count in zip(self.top_k, self.within, strict=True)},
        }


def predicted_classes(logits: torch.Tensor) -> torch.Tensor:
    """The class with the largest logit.

    Args:
        logits: float ``(B, C)``.

    Returns:
        int64 ``(B,)``; ``UNKNOWN`` where several classes share the largest logit, within ``TIE_TOLERANCE``: picking
        one would be chance. Likewise where a logit is NaN.
    """
    chosen = logits.argmax(dim=1)
    return chosen.masked_fill(_places(logits, chosen) > 0, UNKNOWN)


def _places(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """How many other classes come before one, those with the same logit included, int64 ``(B,)``."""
    own = logits.gather(1, classes[:, None])
    # Not "larger or equal": a comparison with NaN is false, which would put it last or make it a hit.
    return (~(logits < own - TIE_TOLERANCE)).sum(dim=1) - 1


class SplitMetrics(KeepsFloat32):
    """Losses and scores of all tasks over one epoch of one split."""

    def __init__(
        self, tasks: Mapping[str, Sequence[str]], task_weights: Mapping[str, float], losses_only: bool = False
    ) -> None:
        super().__init__()
        self.task_weights = {task: task_weights[task] for task in tasks}
        # Lists, because the name of a task need not be a legal name of a module. A NaN loss must show,
        # hence "disable"; and sums, because with "disable" torchmetrics' MeanMetric ignores its weights (1.9).
        self.losses = nn.ModuleList(SumMetric(nan_strategy="disable") for _ in tasks)
        self.known = nn.ModuleList(SumMetric(nan_strategy="disable") for _ in tasks)
        self.scores = nn.ModuleList(TaskScores(len(names)) for names in tasks.values() if not losses_only)

    def update_losses(self, losses: Mapping[str, MeanLoss]) -> None:
        """Add the mean losses of a batch, each by the weight of its samples."""
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
            scores.update(logits[task], targets[task])

    def compute(self) -> dict[str, torch.Tensor]:
        """Values over all batches and processes since the last reset.

        Returns:
            Scalars: ``loss``, the weighted sum of the tasks' mean losses; ``<task>/loss`` where there are several
            tasks; ``<task>/<score>``. A task without any known target is left out; without any at all the loss is NaN.
        """
        # Every process computes everything, because computing is where they exchange their sums.
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
        if not any(known):
            values["loss"] = torch.full_like(known[0], float("nan"))
        return values

    def reset(self) -> None:
        """Reset all sums."""
        for metric in (*_all(self.losses), *_all(self.known), *_all(self.scores)):
            metric.reset()


class MeanOverSamples(KeepsFloat32):
    """A loss averaged over samples rather than batches, over all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = SumMetric(nan_strategy="disable")
        self.weight = SumMetric(nan_strategy="disable")

    def update(self, value: torch.Tensor, samples: int) -> None:
        """Add the mean of a batch of ``samples`` samples."""
        self.total.update(value.detach() * samples)
        self.weight.update(samples)

    def compute(self) -> torch.Tensor | None:
        """The mean since the last reset, scalar; None where there was nothing."""
        # All processes have batches or none has, so all or none exchange their sums below.
        if not self.weight.update_called:
            return None
        total, weight = self.total.compute(), self.weight.compute()
        return total / weight if weight > 0 else None

    def reset(self) -> None:
        """Reset all sums."""
        self.total.reset()
        self.weight.reset()


def _all(metrics: nn.ModuleList) -> list[Any]:
    return list(metrics)  # untyped: torch's list only knows modules


def epoch_sums(network: nn.Module, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums so far.

    Returns:
        float32 scalars by the name of the metric; those that were not counted yet are left out.
    """
    return {name: reduce(metric.sum_value.clone()) for name, metric in _sums(network) if metric.update_called}


def restore_epoch_sums(network: nn.Module, sums: Mapping[str, torch.Tensor], *, is_first: bool) -> None:
    """Go on from the sums of a checkpoint."""
    for name, metric in _sums(network):
        metric.reset()
        if name in sums:
            metric.update(sums[name] if is_first else torch.zeros_like(sums[name]))


def _sums(network: nn.Module) -> Iterator[tuple[str, SumMetric]]:
    return ((name, module) for name, module in network.named_modules() if isinstance(module, SumMetric))
