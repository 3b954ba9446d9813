"""Training on several processes: gathering rows with gradients, sharded weights (FSDP2), and BatchNorm."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm

from vitrail.errors import UserError


class _Gather(torch.autograd.Function):
    """All-gather; backward sums each row's gradient over the processes."""

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
    """Concatenate the rows of all processes in the order of their ranks, with gradients.

    A row's gradient is summed over all processes. So the mean over a process's own rows, compared with the rows of all,
    has, averaged over processes as by DDP, the gradient of the same loss on the joined batch.

    Args:
        rows: ``(B, …)``, float or integer, with the same B on all processes.

    Returns:
        ``(B · processes, …)``.
    """
    return cast("torch.Tensor", _Gather.apply(rows)) if is_distributed() else rows


def own_rows(count: int) -> slice:
    """Slice of this process's rows among the gathered ones."""
    rank = dist.get_rank() if is_distributed() else 0
    return slice(rank * count, (rank + 1) * count)


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Mean of a tensor over all processes, without gradients; the CPU does not wait for it."""
    if not is_distributed():
        return values.detach()
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def is_distributed() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class FullySharded(ModelParallelStrategy):
    """Shard weights, gradients and optimizer state by ``fully_shard``; ``strategy: fsdp`` in a YAML.

    A checkpoint is one file as without sharding. Lightning's own ``fsdp`` flattens the weights of each module, in which
    norms and biases would be decayed, and needs a GPU.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        # By default Lightning shards between machines only.
        self._data_parallel_size = self.world_size

    def setup(self, trainer: Trainer) -> None:
        """As Lightning's, which leaves the sharding to the model."""
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        if not any(isinstance(module, FSDPModule) for module in self.model.modules()):
            load: Any = getattr(self.model, "load_pretrained", None)
            if load is not None and not trainer.ckpt_path:
                # Sharded weights could be loaded only from a checkpoint.
                load()
            self.model_to_device()
            shard(self.model, self.device_mesh["data_parallel"])
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)


def refuse_unfit_strategy(trainer: Trainer) -> None:
    """Refuse unsupported strategies."""
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise UserError(
            f"trainer.strategy: {type(strategy).__name__} flattens the weights, so that norms and biases would be "
            "decayed; use lightning_modules.FullySharded, in a YAML `strategy: fsdp`"
        )
    if isinstance(strategy, FullySharded) and trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise UserError("trainer.gradient_clip_algorithm: sharded weights are clipped by norm; leave it out")
    if getattr(strategy, "_layer_sync", None) is not None and strategy.root_device.type == "cpu":
        raise UserError("trainer.sync_batchnorm: torch synchronises BatchNorm on GPUs only; leave it out on CPUs")


def synchronise_batchnorm(model: nn.Module, trainer: Trainer) -> None:
    """Convert BatchNorm for ``trainer.sync_batchnorm``.

    torch's own conversion, which Lightning would use, drops the activation of timm's BatchNorm layers.
    """
    strategy = trainer.strategy
    if getattr(strategy, "_layer_sync", None) is None or trainer.state.fn != TrainerFn.FITTING:
        return
    convert_batchnorm(model)
    strategy._layer_sync = None  # type: ignore[attr-defined]  # only some strategies have it


def convert_batchnorm(model: nn.Module) -> None:
    """Replace BatchNorm by SyncBatchNorm, with its weights, statistics and activation."""
    from timm.layers import convert_sync_batchnorm

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
                setattr(parent, name, convert_sync_batchnorm(child))


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the weights, each block of a network and each layer outside of blocks as a unit.

    Scalars, such as the logit scale, are replicated; their gradients are averaged.
    """
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for scalar in scalars:
        if scalar.requires_grad:
            scalar.register_hook(_average)  # type: ignore[no-untyped-call]  # torch's
    blocks = {
        id(block) for group in model.modules() if isinstance(group, nn.ModuleList | nn.Sequential) for block in group
    }
    inside: set[int] = set()
    for module in model.modules():
        # Modules are listed from the outside in: the outermost block includes everything inside it.
        if id(module) in blocks and id(module) not in inside and any(True for _ in module.parameters()):
            inside |= {id(part) for part in module.modules()}
            fully_shard(module, mesh=mesh, ignored_params=scalars)
    for module in reversed(list(model.modules())):
        own = [parameter for parameter in module.parameters(recurse=False) if parameter not in scalars]
        if id(module) not in inside and own:
            fully_shard(module, mesh=mesh, ignored_params=scalars)


def _average(gradient: torch.Tensor) -> torch.Tensor:
    whole = gradient.clone()
    dist.all_reduce(whole)
    return whole / dist.get_world_size()
