"""Low-rank adapters in the attention layers of a tower (LoRA, Hu et al., ICLR 2022), by the library ``peft``."""

from __future__ import annotations

from typing import Literal, TypedDict

from torch import nn

from datamodules.schema import UserError
from lightning_modules.towers import SIDES, Side, Towers

ATTENTION_LAYERS = frozenset(
    {"q_proj", "k_proj", "v_proj", "out_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin", "out_lin", "qkv"}
)
"""Names of the linear layers of attention in ``transformers`` and ``timm``."""


class LoraOptions(TypedDict, total=False):
    """Low-rank adapters; what is left out has the value in brackets.

    Attributes:
        rank: of each update, at least 1 [8].
        alpha: an update counts alpha / rank times [16].
        dropout: in front of each adapter, in [0, 1) [0].
        towers: ``both``, ``image`` or ``text`` [both]. A tower without adapters is frozen too.
    """

    rank: int
    alpha: int
    dropout: float
    towers: Literal["both", "image", "text"]


def add_lora(towers: Towers, options: LoraOptions) -> None:
    """Freeze both towers and add adapters that learn; projections and temperature learn as before.

    An adapter begins as zero, so the network begins as it was.

    Args:
        towers: changed in place.
        options: the settings.

    Raises:
        UserError: for an unknown key, a value out of range, or a tower without attention layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if strange := sorted(set(options) - set(LoraOptions.__annotations__)):
        raise UserError(f"lora: unknown key {strange[0]!r}; known keys are {', '.join(LoraOptions.__annotations__)}")
    rank, dropout, which = options.get("rank", 8), options.get("dropout", 0.0), options.get("towers", "both")
    if rank < 1 or not 0 <= dropout < 1 or which not in {"both", *SIDES}:
        raise UserError(f"lora: rank must be at least 1, dropout in [0, 1), towers both, image or text; got {options}")
    for side in SIDES:
        towers.backbone(side).requires_grad_(False)
    chosen: tuple[Side, ...] = SIDES if which == "both" else (which,)
    for side in chosen:
        backbone = towers.backbone(side)
        layers = [
            name
            for name, module in backbone.named_modules()
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ATTENTION_LAYERS
        ]
        if not layers:
            raise UserError(f"lora.towers: the {side} tower has no attention layers to adapt; choose the other one")
        config = LoraConfig(
            r=rank, lora_alpha=options.get("alpha", 16), lora_dropout=dropout, target_modules=layers, bias="none"
        )
        inject_adapter_in_model(config, backbone)
