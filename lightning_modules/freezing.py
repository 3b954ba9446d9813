"""Which part of a dual encoder stands still."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from lightning_modules.blocks import blocks, layer_depths
from lightning_modules.towers import SIDES, Towers
from vitrail.errors import UserError

Freeze = Literal["none", "text_only", "vision_only", "early_layers", "towers"]

LEARNING_BLOCKS = 2
"""Blocks of each tower that ``early_layers`` leaves free."""


def freeze(towers: Towers, mode: Freeze) -> list[nn.Module]:
    """Take gradients away from part of the towers. The temperature is never frozen.

    - ``none``: everything learns.
    - ``text_only``: the text tower and its projection are frozen.
    - ``vision_only``: the image tower and its projection are frozen (locked-image tuning, Zhai et al., CVPR 2022).
    - ``early_layers``: only the last two blocks, what comes after them, and the projections of both towers learn.
    - ``towers``: only the projections learn, a linear probe of both towers.

    Args:
        towers: as they were built.
        mode: one of the above.

    Returns:
        The modules that are frozen whole, which must stay in evaluation mode.

    Raises:
        UserError: if the mode is unknown, or nothing would be left to learn.
    """
    if mode not in get_args(Freeze):
        raise UserError(f"freeze: {mode!r} is unknown; choose one of {', '.join(get_args(Freeze))}")
    if mode == "none":
        return []
    if mode in {"text_only", "vision_only"}:
        side = "text" if mode == "text_only" else "image"
        frozen = [towers.backbone(side), *towers.projections(side)]  # type: ignore[arg-type]  # mypy widens the literal
    elif mode == "towers":
        frozen = [towers.backbone(side) for side in SIDES]
        if not all(towers.projections(side) for side in SIDES):
            raise UserError("freeze: towers leaves nothing to learn, because this model has no projections")
    else:
        frozen = [
            module for side in SIDES for module in _freeze_early_layers(towers.backbone(side), f"the {side} tower")
        ]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def freeze_unused(towers: Towers) -> None:
    """Take gradients away from weights of the text tower that do not take part in encoding a text.

    Such are Longformer's projections for global attention and LUKE's entities. They would never get a gradient, for
    which DDP waits in vain.

    Args:
        towers: as they were built.
    """
    backbone = towers.backbone("text")
    some = next(backbone.parameters())
    if some.is_meta:  # where weights are only counted
        return
    ids = torch.ones(1, 3, dtype=torch.int64, device=some.device)
    training = {module: module.training for module in towers.modules()}
    # In evaluation mode, so that nothing is drawn.
    towers.eval()
    try:
        with torch.enable_grad():
            features = towers.text_features({"input_ids": ids, "attention_mask": ids})
    finally:
        for module, mode in training.items():
            module.training = mode
    reached: set[int] = set()
    seen: set[Any] = set()
    waiting = [features.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reached.add(id(getattr(node, "variable", None)))
        waiting += [following for following, _ in node.next_functions]
    for parameter in backbone.parameters():
        if id(parameter) not in reached:
            parameter.requires_grad_(False)


def _freeze_early_layers(backbone: nn.Module, name: str) -> list[nn.Module]:
    """Freeze what lies below the last blocks.

    Returns:
        The modules of which nothing learns, one by one, so that dropout and BatchNorm of those that do stay in
        training mode.
    """
    depths = layer_depths(backbone, name)
    first = len(blocks(backbone, name)) + 1 - LEARNING_BLOCKS
    for key, parameter in backbone.named_parameters():
        # One by one, because a class token belongs to the module that holds the blocks too.
        parameter.requires_grad_(parameter.requires_grad and depths[key] >= first)
    return [
        module
        for module in backbone.modules()
        if (parameters := list(module.parameters())) and not any(parameter.requires_grad for parameter in parameters)
    ]
