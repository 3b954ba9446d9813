"""The rows of all processes, with gradients, so that negatives come from all of them."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist


class _Gather(torch.autograd.Function):
    """Forward: the rows of all processes. Backward: each row's gradient, summed over the processes that used it."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.count
        return gradient[start : start + ctx.count]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Joins the rows of all processes in the order of their ranks; on one process they are returned as they are.

    A gradient flows back to the process that a row came from, summed over all. A loss that is a mean over a process's
    own rows, compared with the rows of all, therefore has, averaged over processes as DDP does, the gradient of the
    same loss on the joined batch.

    Args:
        rows: ``(B, …)``, B the same on all processes; float for gradients, or whole numbers.

    Returns:
        ``(B · processes, …)``.
    """
    if not is_distributed():
        return rows
    return cast("torch.Tensor", _Gather.apply(rows))


def own_rows(count: int) -> slice:
    """Where this process's rows are among the joined ones.

    Args:
        count: rows of each process.
    """
    rank = dist.get_rank() if is_distributed() else 0
    return slice(rank * count, (rank + 1) * count)


def is_distributed() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
