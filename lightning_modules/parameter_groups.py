"""The groups of parameters that an optimizer treats alike: decayed or not, by part, by layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from lightning_modules.blocks import layer_scales


def parameter_groups(
    model: nn.Module,
    backbones: Mapping[str, nn.Module],
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    frozen: Collection[nn.Parameter] = (),
    temperature: Sequence[nn.Parameter] = (),
    temperature_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for the optimizer; every parameter that is ever trained is in exactly one of them.

    Biases, norms, the temperature and what an architecture names in ``no_weight_decay()`` are not decayed.

    Args:
        model: holds the backbones; all its other parameters are of the part ``head``.
        backbones: networks by the name that their groups begin with.
        weight_decay: for the other parameters.
        layer_decay: factor of the learning rate from each layer of a backbone to the one below it
            (Clark et al., ELECTRA, 2020; Bao et al., BEiT, 2021), 1 for none.
        frozen: parameters that do not train now but will, so that the optimizer never has to change its groups.
        temperature: parameters of the temperature.
        temperature_lr: their own highest learning rate, that of the heads where it is not given.

    Returns:
        Dicts with ``params``, ``weight_decay``, ``name`` (unique), ``part``, ``lr_scale`` in (0, 1], the factor of the
        group's learning rate, and ``own_lr`` where it has a highest learning rate of its own.
    """
    groups: list[dict[str, Any]] = []
    with _trainable(frozen):
        for prefix, backbone in backbones.items():
            for number, group in enumerate(_backbone_groups(backbone, prefix, weight_decay, layer_decay)):
                layer = "" if layer_decay == 1.0 else f"_{number:02d}"
                name = f"{prefix}{layer}_{'decay' if group['weight_decay'] else 'no_decay'}"
                groups.append({"lr_scale": 1.0, **group, "name": name, "part": "backbone"})
        apart = {id(parameter) for backbone in backbones.values() for parameter in backbone.parameters()}
        apart |= {id(parameter) for parameter in temperature}
        heads = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
        for name, decay in (("head_decay", weight_decay), ("head_no_decay", 0.0)):
            params = [parameter for parameter in heads if (parameter.ndim > 1) == (name == "head_decay")]
            if params:
                groups.append({"params": params, "weight_decay": decay, "lr_scale": 1.0, "name": name, "part": "head"})
    if temperature:
        group = {
            "params": list(temperature),
            "weight_decay": 0.0,
            "lr_scale": 1.0,
            "name": "temperature",
            "part": "head",
        }
        groups.append(group if temperature_lr is None else {**group, "own_lr": temperature_lr})
    return groups


def _backbone_groups(backbone: nn.Module, name: str, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    exempt: Collection[str] = cast("Any", backbone).no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
    groups: list[dict[str, Any]]
    if layer_decay == 1.0:
        groups = param_groups_weight_decay(backbone, weight_decay, no_weight_decay_list=exempt)
        return [group for group in groups if group["params"]]
    if hasattr(backbone, "group_matcher"):
        groups = param_groups_layer_decay(backbone, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
        return groups
    scales = layer_scales(backbone, name, layer_decay)
    by_kind: dict[tuple[float, float], dict[str, Any]] = {}
    for key, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            kind = {"params": [], "weight_decay": decay, "lr_scale": scales[key]}
            by_kind.setdefault((scales[key], decay), kind)["params"].append(parameter)
    return list(by_kind.values())


@contextmanager
def _trainable(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """For timm, which leaves out what does not require a gradient."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
