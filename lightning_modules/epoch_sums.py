"""The sums of an epoch that is not over yet, as part of a checkpoint.

torchmetrics keeps its states out of checkpoints, so the averages of an epoch that is resumed in its middle would be
those of its second part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from torchmetrics import SumMetric


def epoch_sums(network: nn.Module, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The sums so far.

    Args:
        network: holds metrics, all of which are sums.
        reduce: adds a scalar up over all processes.

    Returns:
        float32 scalars by the name of the metric; those that were not counted yet are left out.
    """
    return {name: reduce(metric.sum_value.clone()) for name, metric in _sums(network) if metric.update_called}


def restore_epoch_sums(network: nn.Module, sums: Mapping[str, torch.Tensor], *, is_first: bool) -> None:
    """Go on from the sums of a checkpoint.

    Args:
        network: holds the metrics.
        sums: as ``epoch_sums`` returns them.
        is_first: whether this is the first process, which gets what all have counted.
    """
    for name, metric in _sums(network):
        metric.reset()
        if name in sums:
            metric.update(sums[name] if is_first else torch.zeros_like(sums[name]))


def _sums(network: nn.Module) -> Iterator[tuple[str, SumMetric]]:
    return ((name, module) for name, module in network.named_modules() if isinstance(module, SumMetric))
