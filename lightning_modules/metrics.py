"""Exact averages and scores of an epoch, over samples rather than batches, and over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torchmetrics import Metric, SumMetric

from lightning_modules.distributed import is_distributed, mean_over_processes
from lightning_modules.precision import KeepsFloat32
from vitrail.types import UNKNOWN, Mix

TOP_K = (3, 5)

TIE_TOLERANCE = 1e-6
"""Tolerance for equal logits, as in ``vitrail.predictions``."""


class MeanLoss(NamedTuple):
    """A mean and the total weight of its samples, so that means of unequal batches can be combined exactly."""

    value: torch.Tensor  # float32 scalar, 0 with a gradient of 0 if the weight is 0
    weight: torch.Tensor  # float32 scalar; the number of known targets unless classes are weighted


def masked_mean(
    losses_of: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], target: torch.Tensor, mix: Mix | None
) -> MeanLoss:
    """Mean of the losses of known targets; in a mixed batch of ``lam`` of the own and the rest of the partner's.

    Args:
        losses_of: from targets of all rows to losses and weights of the same shape, both 0 where a target is unknown.
        target: of each row, ``(B, …)``.
        mix: partners and shares of a mixed batch.
    """
    losses, weights = losses_of(target)
    if mix is None:
        total, weight = losses.sum(), weights.sum()
    else:
        own = mix["lam"].to(losses.dtype).view(-1, *[1] * (losses.ndim - 1))
        other_losses, other_weights = losses_of(target[mix["partner"]])
        total = (losses * own).sum() + (other_losses * (1 - own)).sum()
        weight = (weights * own).sum() + (other_weights * (1 - own)).sum()
    # Without known targets the sum is 0 with a gradient; dividing by 1 keeps both.
    return MeanLoss(total / torch.where(weight > 0, weight, torch.ones_like(weight)), weight.detach())


def joined_losses(losses: Mapping[str, MeanLoss]) -> dict[str, MeanLoss]:
    """Losses whose mean over the processes, as DDP takes it of their gradients, is the loss of the joined batch.

    Each process divides the sum of its own losses by the mean of the weights, not by its own weight: processes differ
    in the number of known targets. A collective call, on the device.

    Args:
        losses: of this process's batch, by the same names on all processes.
    """
    if not is_distributed():
        return dict(losses)
    weights = mean_over_processes(torch.stack([loss.weight.float() for loss in losses.values()]))
    shares = {name: (loss, weight) for (name, loss), weight in zip(losses.items(), weights, strict=True)}
    return {
        name: MeanLoss(loss.value * (loss.weight / torch.where(weight > 0, weight, torch.ones_like(weight))), weight)
        for name, (loss, weight) in shares.items()
    }


class TaskScores(Metric):
    """Scores of one task, each in [0, 1], higher is better.

    - ``accuracy``: fraction of samples whose predicted class is the target.
    - ``mean_per_class``: mean recall of the classes with samples, scikit-learn's ``balanced_accuracy_score``.
    - ``top3``, ``top5``: fraction of samples whose target is among the top k; only with more than k classes.
    - ``f1_macro``: mean F1 of the classes among targets or predictions, as in scikit-learn.
    - ``f1_weighted``: mean F1 of the classes, weighted by their targets.

    Ties count against the model: other classes with the target's logit rank before it, and a sample with several
    largest logits has no predicted class (``predicted_classes``).
    """

    full_state_update = False
    support: torch.Tensor
    predictions: torch.Tensor
    hits: torch.Tensor
    within: torch.Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.top_k = [k for k in TOP_K if k < num_classes]
        # Integers, because sums in half precision stop at 256.
        for name, length in (("support", num_classes), ("predictions", num_classes), ("hits", num_classes)):
            self.add_state(name, torch.zeros(length, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("within", torch.zeros(len(self.top_k), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Count predictions.

        Args:
            logits: float ``(B, C)``.
            targets: int64 ``(B,)``, ``UNKNOWN`` where not known.
        """
        # Unknown targets have weight 0; selecting the known ones would synchronize the GPU.
        known = (targets != UNKNOWN).long()
        labels, predicted = targets.clamp(min=0), predicted_classes(logits)
        self.support.scatter_add_(0, labels, known)
        self.predictions.scatter_add_(0, predicted.clamp(min=0), known * (predicted != UNKNOWN))
        self.hits.scatter_add_(0, labels, known * (predicted == labels))
        if self.top_k:
            places = _places(logits, labels)
            self.within += torch.stack([(known * (places < k)).sum() for k in self.top_k])

    def compute(self) -> dict[str, torch.Tensor]:
        """The scores by name, float32 scalars; 0 without known targets."""
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
    """Index of the largest of the logits ``(B, C)``, int64 ``(B,)``; ``UNKNOWN`` for ties and NaN."""
    chosen = logits.argmax(dim=1)
    return chosen.masked_fill(_places(logits, chosen) > 0, UNKNOWN)


def _places(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Rank of each row's class, int64 ``(B,)``, from 0; equal logits of other classes rank before it."""
    own = logits.gather(1, classes[:, None])
    # Not ">=": a comparison with NaN is false and would count as a hit.
    return (~(logits < own - TIE_TOLERANCE)).sum(dim=1) - 1


class SplitMetrics(KeepsFloat32):
    """Losses and scores of all tasks over one epoch of one split.

    Args:
        tasks: class names of each task.
        task_weights: weight of each task's loss in the sum.
        losses_only: whether scores are left out.
        scores: of each task, by default ``TaskScores``.
    """

    def __init__(
        self,
        tasks: Mapping[str, Sequence[str]],
        task_weights: Mapping[str, float],
        losses_only: bool = False,
        scores: Sequence[Metric] | None = None,
    ) -> None:
        super().__init__()
        self.task_weights = {task: task_weights[task] for task in tasks}
        # Lists, because the name of a task need not be a legal name of a module. "disable" keeps NaN losses; with it
        # torchmetrics' MeanMetric ignores its weights (1.9), hence sums.
        self.losses = nn.ModuleList(SumMetric(nan_strategy="disable") for _ in tasks)
        self.known = nn.ModuleList(SumMetric(nan_strategy="disable") for _ in tasks)
        scores = [TaskScores(len(names)) for names in tasks.values()] if scores is None else scores
        self.scores = nn.ModuleList([] if losses_only else scores)

    def update_losses(self, losses: Mapping[str, MeanLoss]) -> None:
        """Add the mean losses of a batch."""
        for task, total, known in zip(self.task_weights, _all(self.losses), _all(self.known), strict=True):
            total.update(losses[task].value.detach() * losses[task].weight)
            known.update(losses[task].weight)

    def update_scores(self, logits: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> None:
        """Count the predictions of a batch.

        Args:
            logits: for each task float ``(B, C)``.
            targets: for each task its target, see ``vitrail.types.Batch``.
        """
        for task, scores in zip(self.task_weights, _all(self.scores), strict=True):
            scores.update(logits[task], targets[task])

    def compute(self) -> dict[str, torch.Tensor]:
        """Values over all batches and processes since the last reset.

        Returns:
            Scalars: ``loss``, the weighted sum of the tasks' mean losses; ``<task>/loss`` if there are several tasks;
            ``<task>/<score>``. A task without known targets is left out; without any the loss is NaN.
        """
        # Every process computes everything, because compute() is collective.
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

    def update(self, value: torch.Tensor, samples: int | torch.Tensor) -> None:
        """Add the mean of a batch of ``samples`` samples."""
        self.total.update(value.detach() * samples)
        self.weight.update(samples)

    def compute(self) -> torch.Tensor | None:
        """The mean since the last reset, scalar; None without samples."""
        # compute() is collective: all processes have batches, or none has.
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
    """Sums of an unfinished epoch for checkpoints, float32 scalars by name; torchmetrics does not save them."""
    return {name: reduce(metric.sum_value.clone()) for name, metric in _sums(network) if metric.update_called}


def restore_epoch_sums(network: nn.Module, sums: Mapping[str, torch.Tensor], *, is_first: bool) -> None:
    """Continue from the sums of a checkpoint."""
    for name, metric in _sums(network):
        metric.reset()
        if name in sums:
            metric.update(sums[name] if is_first else torch.zeros_like(sums[name]))


def _sums(network: nn.Module) -> Iterator[tuple[str, SumMetric]]:
    return ((name, module) for name, module in network.named_modules() if isinstance(module, SumMetric))
