"""Several processes: their rows joined with gradients, weights sharded among them (FSDP), BatchNorm over all of them.

Of torch's two ways of sharding this is the second one, ``fully_shard`` (FSDP2). The first one, which Lightning calls
``fsdp``, makes one flat vector of the weights of each module, in which norms and biases are mixed with
decayed weights, and needs a GPU even for a test. The command line takes ``strategy: fsdp`` for the one here.
"""

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
    """Join the rows of all processes in the order of their ranks; on one process they are returned as they are.

    A gradient flows back to the process that a row came from, summed over all. A loss that is a mean over a process's
    own rows, compared with the rows of all, therefore has, averaged over processes as DDP does, the gradient of the
    same loss on the joined batch.

    Args:
        rows: ``(B, …)``, B the same on all processes; float for gradients, or integers.

    Returns:
        ``(B · processes, …)``.
    """
    if not is_distributed():
        return rows
    return cast("torch.Tensor", _Gather.apply(rows))


def own_rows(count: int) -> slice:
    """Where this process's rows are among the joined ones."""
    rank = dist.get_rank() if is_distributed() else 0
    return slice(rank * count, (rank + 1) * count)


def is_distributed() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class FullySharded(ModelParallelStrategy):
    """Shard weights, gradients and optimizer state among all processes; checkpoints are whole.

    A checkpoint is one file with the same names and values as without sharding, and loads anywhere. The task is built
    whole on each process before it is sharded.
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
                # Once sharded, weights can come from a checkpoint, but not from another file.
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
    """Refuse strategies that would silently train something else."""
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
    """Where ``trainer.sync_batchnorm`` asks for it, compute BatchNorm's statistics over the batches of all processes.

    Lightning would do it by torch's own function, which takes timm's layers of BatchNorm and activation in one for
    BatchNorm and leaves out the activation.
    """
    strategy = trainer.strategy
    if getattr(strategy, "_layer_sync", None) is None or trainer.state.fn != TrainerFn.FITTING:
        return
    convert_batchnorm(model)
    strategy._layer_sync = None  # type: ignore[attr-defined]  # only some strategies have it


def convert_batchnorm(model: nn.Module) -> None:
    """Replace BatchNorm by synchronised BatchNorm, with its weights, statistics and activation."""
    from timm.layers import convert_sync_batchnorm

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
                setattr(parent, name, convert_sync_batchnorm(child))


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the weights, each block of a network and each layer outside of blocks as a unit.

    The weights of a block are gathered right before it computes, and freed after it. Scalars, such as the logit
    scale, stay whole on every process; their gradients are averaged.
    """
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for scalar in scalars:
        if scalar.requires_grad:
            scalar.register_hook(_averaged)  # type: ignore[no-untyped-call]  # torch's
    blocks = {
        id(block) for group in model.modules() if isinstance(group, nn.ModuleList | nn.Sequential) for block in group
    }
    inside: set[int] = set()
    for module in model.modules():
        # From the outside in: the outermost block takes everything inside it.
        if id(module) in blocks and id(module) not in inside and any(True for _ in module.parameters()):
            inside |= {id(part) for part in module.modules()}
            fully_shard(module, mesh=mesh, ignored_params=scalars)
    for module in reversed(list(model.modules())):
        own = [parameter for parameter in module.parameters(recurse=False) if parameter not in scalars]
        if id(module) not in inside and own:
            fully_shard(module, mesh=mesh, ignored_params=scalars)


def _averaged(gradient: torch.Tensor) -> torch.Tensor:
    whole = gradient.clone()
    dist.all_reduce(whole)
    return whole / dist.get_world_size()
