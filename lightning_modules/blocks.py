"""The blocks of a network, found by their shape: what "the last two blocks" and "each layer" mean anywhere."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from vitrail.errors import UserError


def blocks(network: nn.Module, name: str) -> list[nn.Module]:
    """The blocks that a network is mainly made of, in the order of computation.

    They are the children of the module with most parameters among those whose children, two or more, are all of one
    class: the layers of a transformer, the blocks of a ResNet's last stage.

    Args:
        network: transformer or convolutional network.
        name: of the network, for messages.

    Raises:
        UserError: if there are no such blocks.
    """
    best: list[nn.Module] = []
    best_size = 0
    for module in network.modules():
        children = list(module.children())
        if len(children) < 2 or len({type(child) for child in children}) > 1:
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > best_size:
            best, best_size = children, size
    if not best:
        raise UserError(f"{name} has no blocks that repeat; choose another freeze mode")
    return best


def layer_depths(network: nn.Module, name: str) -> Mapping[str, int]:
    """How deep in the network each parameter lies.

    Args:
        network: its n blocks are found by ``blocks``.
        name: of the network, for messages.

    Returns:
        For each parameter's name 0 before the blocks, 1 to n in them, n + 1 after them.
    """
    layers = blocks(network, name)
    inside = {id(parameter): index + 1 for index, block in enumerate(layers) for parameter in block.parameters()}
    depths: dict[str, int] = {}
    # Parameters are registered in the order of computation: what is seen before the first block lies below it.
    outside = 0
    for key, parameter in network.named_parameters():
        depths[key] = inside.get(id(parameter), outside)
        if id(parameter) in inside:
            outside = len(layers) + 1
    return depths


def layer_scales(network: nn.Module, name: str, decay: float) -> Mapping[str, float]:
    """How much slower each parameter learns under layer-wise decay.

    What comes after the blocks has 1, the last block ``decay``, each one before ``decay`` times less, what comes
    before the blocks least (Clark et al., ELECTRA, 2020; Bao et al., BEiT, 2021).

    Args:
        network: its blocks are found by ``blocks``.
        name: of the network, for messages.
        decay: factor from each layer to the one below it, in (0, 1].

    Returns:
        For each parameter's name a factor in (0, 1].
    """
    top = len(blocks(network, name)) + 1
    return {key: decay ** (top - depth) for key, depth in layer_depths(network, name).items()}


def stands_still(network: nn.Module) -> bool:
    """Whether a network always gives the same for the same input: nothing in it learns, dropout and statistics rest."""
    learns = any(parameter.requires_grad for parameter in network.parameters())
    return not learns and not any(module.training for module in network.modules())
