"""How many parameters a network has, also where a library packs several of them into one number."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_count(module: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of parameters, each tensor once.

    Four-bit weights of bitsandbytes lie packed, two in a byte, and count as those that they stand for.

    Args:
        module: network.
        trainable_only: leave out those that are frozen.
    """
    return sum(_size(one) for one in module.parameters() if one.requires_grad or not trainable_only)


def _size(parameter: nn.Parameter) -> int:
    packed: Any = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if packed is None else packed.shape.numel())
