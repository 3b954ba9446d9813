"""Freezing parts of pretrained networks, and low-rank adapters (by ``peft``) in their attention layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from lightning_modules.encoders.dual import SIDES, Side, Towers
from lightning_modules.encoders.image import ImageEncoder
from lightning_modules.optim import blocks, layer_depths
from lightning_modules.options import AdapterOptions, Freeze, LanguageLoraOptions, LoraOptions
from vitrail.errors import UserError

TRAINABLE_BLOCKS = 2
"""Blocks of each tower that ``early_layers`` leaves trainable."""


def freeze(towers: Towers, mode: Freeze) -> list[nn.Module]:
    """Freeze part of the towers. The logit scale is never frozen.

    - ``none``: everything is trainable.
    - ``text_only``: the text tower and its projection are frozen.
    - ``vision_only``: the image tower and its projection are frozen (locked-image tuning, Zhai et al., CVPR 2022).
    - ``early_layers``: only the last two blocks, what comes after them, and both projections are trainable.
    - ``towers``: only the projections are trainable, a linear probe of both towers.

    Returns:
        The modules that are frozen entirely, which must stay in evaluation mode.
    """
    if mode not in get_args(Freeze):
        raise UserError(f"freeze: must be one of {', '.join(get_args(Freeze))}; got {mode!r}")
    if mode == "none":
        return []
    if mode in {"text_only", "vision_only"}:
        side = "text" if mode == "text_only" else "image"
        frozen = [towers.backbone(side), *towers.projections(side)]  # type: ignore[arg-type]  # mypy widens the literal
    elif mode == "towers":
        frozen = [towers.backbone(side) for side in SIDES]
        if not all(towers.projections(side) for side in SIDES):
            raise UserError("freeze: towers leaves nothing to train, because this model has no projections")
    else:
        frozen = [
            module for side in SIDES for module in _freeze_early_layers(towers.backbone(side), f"the {side} tower")
        ]
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def freeze_unused(towers: Towers) -> None:
    """Freeze weights of the text tower that take no part in encoding a text.

    Such as Longformer's projections for global attention and LUKE's entities. They would never get a gradient, for
    which DDP would wait forever.
    """
    backbone = towers.backbone("text")
    if next(backbone.parameters()).is_meta:  # weights without values, for counting
        return
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    with _in_eval_mode(towers), torch.enable_grad():
        features = _encode_dummy(towers, "text", image_size=0)
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)


@contextmanager
def _in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, which moves neither random state nor statistics; each module's mode is restored."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _freeze_early_layers(backbone: nn.Module, name: str) -> list[nn.Module]:
    """Freeze everything below the last blocks; return the modules without trainable parameters."""
    depths = layer_depths(backbone, name)
    first = len(blocks(backbone, name)) + 1 - TRAINABLE_BLOCKS
    for key, parameter in backbone.named_parameters():
        # One by one, because a class token belongs to the module that holds the blocks too.
        parameter.requires_grad_(parameter.requires_grad and depths[key] >= first)
    return [
        module
        for module in backbone.modules()
        if (parameters := list(module.parameters())) and not any(parameter.requires_grad for parameter in parameters)
    ]


ATTENTION_LAYERS = frozenset(
    {"q_proj", "k_proj", "v_proj", "out_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin", "out_lin", "qkv"}
)
"""Names of the linear layers of attention in ``transformers`` and ``timm``."""

OTHER_ATTENTION_LAYERS = frozenset({"q", "k", "v", "kv", "to_q", "to_k", "to_v", "to_kv", "to_qkv"})
"""The same in networks that have none of the former, such as CaiT, PVT v2 and MobileNetV5."""

LANGUAGE_LAYERS = frozenset({*ATTENTION_LAYERS, "o_proj"})
VISION_LAYERS = frozenset({"qkv", "proj"})
"""The same in the two parts of an image-text-to-text model."""


def add_lora(towers: Towers, options: LoraOptions, image_size: int) -> None:
    """Freeze both towers and add trainable adapters, which start as zero; the projections stay trainable."""
    chosen: tuple[Side, ...] = SIDES if options.towers == "both" else (options.towers,)
    layers = {
        side: _adaptable_layers(
            towers.backbone(side),
            partial(_encode_dummy, towers, side, image_size),
            f"lora.towers: the {side} tower",
            "choose the other tower",
        )
        for side in chosen
    }
    for side in SIDES:
        towers.backbone(side).requires_grad_(False)
    for side in chosen:
        _inject(towers.backbone(side), layers[side], options)


def add_language_lora(model: Any, options: LanguageLoraOptions) -> None:
    """Freeze an image-text-to-text model and add trainable adapters, which start as zero, in float32."""
    model.requires_grad_(False)
    layers = []
    if options.parts != "vision":
        layers += [f"model.language_model.{one}" for one in _linear_layers(model.model.language_model, LANGUAGE_LAYERS)]
    if options.parts != "language":
        layers += [f"model.visual.{one}" for one in _linear_layers(model.model.visual.blocks, VISION_LAYERS, "blocks.")]
    _inject(model, layers, options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def without_base(state: Mapping[str, Any], network: str) -> dict[str, Any]:
    """State without the base weights of an adapted network: its adapters, and everything outside of it."""
    return {name: value for name, value in state.items() if "lora_" in name or not name.startswith(network)}


def _linear_layers(network: nn.Module, names: frozenset[str], prefix: str = "") -> list[str]:
    return [
        prefix + name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in names
    ]


def _adaptable_layers(network: nn.Module, encode: Callable[[], object], part: str, hint: str) -> list[str]:
    """Linear layers of a network's attention that one forward pass calls.

    Some networks read a layer's weight instead of calling it: ``nn.MultiheadAttention`` (the head of SigLIP) that of
    ``out_proj``, timm's BEiT and Swin Transformer V2 that of ``qkv``. An adapter there would have no effect and get no
    gradient, for which DDP would wait forever.
    """
    layers = _linear_layers(network, ATTENTION_LAYERS) or _linear_layers(network, OTHER_ATTENTION_LAYERS)
    if not layers:
        raise UserError(f"{part} has no attention layers to adapt; {hint}")
    called: set[str] = set()
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name in layers
    ]
    with _in_eval_mode(network), torch.no_grad():
        encode()
    for hook in hooks:
        hook.remove()
    if not called:
        raise UserError(
            f"{part} never calls its attention layers ({layers[0]}, …), it reads their weights, so adapters would have "
            f"no effect; {hint}"
        )
    return [name for name in layers if name in called]


def add_adapter(encoder: ImageEncoder, options: AdapterOptions) -> None:
    """Freeze a classifier's backbone but for new adapters, which start as zero, or its biases.

    Raises:
        UserError: the network has no layers to adapt, or no biases.
    """
    network, where = encoder.backbone, f"backbone_options.adapter.kind: {options.kind}, but {encoder.name}"
    if options.kind == "bitfit":
        if options != AdapterOptions(kind="bitfit"):
            raise UserError(
                "backbone_options.adapter.kind: bitfit trains biases, which have no rank, alpha and dropout; "
                "leave them out"
            )
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name.endswith("bias"))
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise UserError(f"{where} has no biases; choose lora, or another backbone")
        return
    size = encoder.image_size
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=next(network.parameters()).device)
    layers = _adaptable_layers(network, lambda: encoder(image), where, "choose kind: bitfit, or a vision transformer")
    network.requires_grad_(False)
    _inject(network, layers, options)


def reset_magnitudes(network: nn.Module) -> None:
    """Let the magnitudes of DoRA be those of the weights, which have been loaded since."""
    for module in network.modules():
        for name, magnitude in getattr(module, "lora_magnitude_vector", {}).items():
            layer: Any = module
            base = layer.get_base_layer().weight
            update = layer.lora_B[name].weight @ layer.lora_A[name].weight
            with torch.no_grad():
                magnitude.weight.copy_(magnitude.get_weight_norm(base, update, layer.scaling[name]))


def _encode_dummy(towers: Towers, side: Side, image_size: int) -> torch.Tensor:
    device = next(towers.backbone(side).parameters()).device
    if side == "image":
        return towers.image_features(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=device))
    ids = torch.ones(1, 3, dtype=torch.int64, device=device)
    return towers.text_features({"input_ids": ids, "attention_mask": ids})


def _inject(network: nn.Module, layers: list[str], options: LoraOptions | LanguageLoraOptions | AdapterOptions) -> None:
    # peft imports bitsandbytes, which warns of a four-bit kernel that is not used.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=layers,
        bias="none",
        use_dora=isinstance(options, AdapterOptions) and options.kind == "dora",
    )
    inject_adapter_in_model(config, network)
