"""The rows of all processes, with gradients, so that negatives come from all of them.

Several processes: weights shared out among them (FSDP), and BatchNorm's statistics over all of them.

Of torch's two ways of sharding this is the second one, ``fully_shard`` (FSDP2). The first one, which Lightning calls
``fsdp``, makes one flat vector of the weights of each module, in which norms and biases cannot be told from what is
decayed, and needs a GPU even to be tried. The command line takes ``strategy: fsdp`` for the one here.
"""

from __future__ import annotations

from typing import Any, Protocol, cast, runtime_checkable

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


@runtime_checkable
class LoadsPretrained(Protocol):
    """A task that fetches weights; ``lightning_modules.base.VisionTask`` does."""

    def load_pretrained(self) -> None:
        """Fetch them, once."""


class FullySharded(ModelParallelStrategy):
    """Weights, gradients and optimizer state are shared out among all processes; checkpoints are whole.

    A checkpoint is one file with the same names and values as without sharding, and loads anywhere. The task is built
    whole on each process before it is shared out.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        # By default Lightning shares out between machines only.
        self._data_parallel_size = self.world_size

    def setup(self, trainer: Trainer) -> None:
        """As Lightning's, which leaves the sharding to the model."""
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        if not any(isinstance(module, FSDPModule) for module in self.model.modules()):
            if isinstance(self.model, LoadsPretrained) and not trainer.ckpt_path:
                # Once shared out, weights can come from a checkpoint, but not from another file.
                self.model.load_pretrained()
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
    """Refuse what would train something else than was asked for.

    Raises:
        UserError: with a fix.
    """
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
    """Where ``trainer.sync_batchnorm`` asks for it, let BatchNorm see the batches of all processes while training.

    Lightning would do it by torch's own function, which takes timm's layers of BatchNorm and activation in one for
    BatchNorm and leaves out the activation.

    Args:
        model: changed in place; the names of its weights stay.
        trainer: about to fit.
    """
    strategy = trainer.strategy
    if getattr(strategy, "_layer_sync", None) is None or trainer.state.fn != TrainerFn.FITTING:
        return
    convert_batchnorm(model)
    strategy._layer_sync = None  # type: ignore[attr-defined]  # only some strategies have it


def convert_batchnorm(model: nn.Module) -> None:
    """Put BatchNorm that is synchronised in the place of BatchNorm, with its weights, statistics and activation."""
    from timm.layers import convert_sync_batchnorm

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
                setattr(parent, name, convert_sync_batchnorm(child))


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Share the weights out, each block of a network and each layer outside of blocks for itself.

    What a block holds comes together right before it computes, and goes again behind it. Scalars, such as the
    temperature, stay whole on every process; their gradients are averaged.

    Args:
        model: changed in place; its weights are there already.
        mesh: one dimension, all processes.
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
        # From the outside in: the outermost block takes all that is in it.
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
