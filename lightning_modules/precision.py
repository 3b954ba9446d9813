"""Modules that stay float32 if weights are in half precision (``trainer.precision: bf16-true`` and ``16-true``).

bfloat16 has eight significant bits: near ln 100 a step of 1e-3 of the logit scale is rounded away, and sums of ones
stop at 256. Small tensors with small updates therefore stay float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Self

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from vitrail.errors import UserError

HALVES = (torch.bfloat16, torch.float16)

Conversion = Callable[[torch.Tensor], torch.Tensor]
"""The function of ``nn.Module._apply``: it moves or casts a tensor, or both."""


def not_halved(conversion: Conversion) -> Conversion:
    """The same conversion without casts to half precision."""

    def converted(tensor: torch.Tensor) -> torch.Tensor:
        made = conversion(tensor)
        return tensor.to(made.device) if made.dtype in HALVES and tensor.dtype not in HALVES else made

    return converted


class KeepsFloat32(nn.Module):
    """A module that, with its children, is never cast to half precision."""

    def _apply(self, fn: Conversion, recurse: bool = True) -> Self:
        applied: Self = super()._apply(not_halved(fn), recurse)  # type: ignore[no-untyped-call]  # torch's
        return applied


class _ComputesFloat32(KeepsFloat32):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Compute in float32."""
        features = features.to(next(self.parameters()).dtype)
        device = features.device.type
        # FLOPs are counted on the meta device, for which there is no autocast.
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            computed: torch.Tensor = super().forward(features)
        return computed


class Float32Linear(_ComputesFloat32, nn.Linear):
    """A linear layer that computes in float32: logits rounded to half precision would often be equal."""


class Float32Sequential(_ComputesFloat32, nn.Sequential):
    """A sequence of layers that computes in float32."""


def keep_small_steps(model: nn.Module, convert: Callable[[], object]) -> None:
    """Convert a model except BatchNorm and low-rank adapters, whose updates are small.

    Sharded weights of a block must be of one dtype, so they are all cast.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    small = [tensor for norm in norms for tensor in norm.parameters()]
    small += [tensor for name, tensor in model.named_parameters() if "lora_" in name]
    kept = [(tensor, tensor.data) for tensor in small if not isinstance(tensor, DTensor)]
    buffers = [(norm, name, tensor) for norm in norms for name, tensor in norm.named_buffers(recurse=False)]
    convert()
    for tensor, before in kept:
        if tensor.dtype in HALVES:
            tensor.data = before.to(tensor.device)
    for norm, name, before in buffers:
        now = norm.get_buffer(name)
        # Statistics have the dtype of the weights, if there are any.
        if now.dtype in HALVES and not any(tensor.dtype in HALVES for tensor in norm.parameters()):
            setattr(norm, name, before.to(now.device))


def check_half_precision(trainer: Trainer) -> None:
    """Warn of training in true half precision, and refuse averages of weights in it."""
    precision = str(trainer.precision)
    if precision not in ("bf16-true", "16-true"):
        return
    kind = precision.removesuffix("-true")
    if any(isinstance(callback, WeightAveraging) for callback in getattr(trainer, "callbacks", [])):
        raise UserError(
            f"trainer.precision: {precision} keeps weights in half precision, in which their moving average (EMA) "
            f"does not move; use {kind}-mixed, or leave the averaging out"
        )
    rank_zero_warn(
        f"trainer.precision: {precision} keeps weights in half precision, so updates below about 1/"
        f"{256 if kind == 'bf16' else 2048} of a weight are rounded away; the logit scale, adapters, BatchNorm, the "
        f"last layers of classifiers, pixel statistics and metrics stay float32. {kind}-mixed keeps float32 weights"
    )
