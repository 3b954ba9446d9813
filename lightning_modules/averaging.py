"""Averages and interpolations of trained weights, with BatchNorm statistics that fit them.

The mean of BatchNorm's running statistics is not the statistics of the mean network, so those are recomputed on
training images, unless all members share them (a backbone with frozen BatchNorm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_modules.encoders.weights import misfits
from vitrail.errors import UserError

State = dict[str, torch.Tensor]


def averaged_weights(states: Sequence[State]) -> State:
    """Return the mean of weights of the same names and shapes, computed in float64.

    Integers (counters, positions) are the first member's.
    """
    mean = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            mean[name] = torch.stack([state[name].double() for state in states]).mean(0).to(first.dtype)
        else:
            mean[name] = first
    return mean


def interpolated_weights(start: State, end: State, alpha: float) -> State:
    """Return (1 - α) · start + α · end (WiSE-FT: Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022).

    An adapter's update is a product of two matrices, the second of which begins as zero: that one alone is scaled, so
    that the sum of base and update is what is interpolated.

    Args:
        start: weights at the beginning.
        end: weights at the end, of the same names and shapes.
        alpha: 0 for the beginning, 1 for the end.

    Raises:
        UserError: the names or shapes differ.
    """
    if wrong := misfits(end, start):
        raise UserError(f"the end's weights do not fit the start: {wrong}; give the start and the end of one run")
    mixed = {}
    for name, last in end.items():
        if not last.is_floating_point() or ".lora_A." in name:
            mixed[name] = last
        else:
            mixed[name] = torch.lerp(start[name].double(), last.double(), alpha).to(last.dtype)
    return mixed


def differing_batchnorm(network: nn.Module, states: Sequence[State]) -> list[_BatchNorm]:
    """Return the BatchNorm layers whose running statistics are not the same in all members."""
    return [
        module
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
        if any(
            not torch.equal(states[0][key], state[key])
            for key in (f"{name}.running_mean", f"{name}.running_var")
            for state in states[1:]
        )
    ]


@torch.no_grad()
def refresh_batchnorm(
    network: nn.Module,
    layers: Sequence[_BatchNorm],
    features: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[torch.Tensor],
) -> None:
    """Recompute BatchNorm's running statistics as their mean over all batches.

    Unlike ``torch.optim.swa_utils.update_bn`` it leaves all other layers, and dropout, in evaluation mode.

    Args:
        network: all of it.
        layers: whose statistics are recomputed.
        features: runs the part of the network that has these layers.
        batches: images uint8 ``(B, 3, H, W)``, on the network's device.

    Raises:
        UserError: no batch reached a layer.
    """
    network.eval()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean instead of a moving one
        layer.train()
    for images in batches:
        if len(images) > 1:  # one image alone may have no variance
            features(images)
    network.eval()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        if not layer.num_batches_tracked:
            raise UserError(
                "BatchNorm of this network cannot be recomputed on images alone (or there are fewer than two); "
                "train with frozen BatchNorm (fixed_batchnorm) for a soup"
            )
