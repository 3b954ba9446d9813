"""The last feature map of a network, and its attention weights.

Networks are recognised by their attributes, not by name: vision transformers of ``transformers`` (CLIP, SigLIP), vision
transformers of ``timm``, and any other network of ``timm`` whose ``feature_info`` names its last stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from vitrail.errors import UserError

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class MapLayer:
    """The module whose output is a feature map.

    ``to_map`` turns its output and the size of the images into ``(B, C, h, w)``.
    """

    module: nn.Module
    to_map: Callable[[torch.Tensor, Size], torch.Tensor]


def map_layer(backbone: nn.Module) -> MapLayer:
    """The last layer of a network in which every place of the image still has features of its own.

    For convolutional and hybrid networks and pyramids of windows this is the end of the last stage, for vision
    transformers that pool all tokens the end of the last block. For those that read a class token it is the first norm
    of the last block: after that block they attend to no other token, so their gradient would be zero.

    Raises:
        UserError: if the network is of none of the known kinds.
    """
    module = cast("Any", backbone)
    if (layers := _transformers_layers(backbone)) is not None:
        last = layers[-1].layer_norm1 if hasattr(module.embeddings, "class_embedding") else layers[-1]
        return MapLayer(last, lambda output, size: _tokens_to_map(output, _patches(module, size)))
    if _is_timm_vit(backbone):
        grid = module.patch_embed.dynamic_feat_size
        # CaiT adds its class token behind these blocks.
        reads_class_token = module.global_pool == "token" and not hasattr(module, "blocks_token_only")
        last = module.blocks[-1].norm1 if reads_class_token else module.blocks[-1]
        return MapLayer(last, lambda output, size: _tokens_to_map(output, grid(size)))
    places = getattr(backbone, "feature_info", None) or [{}]
    try:
        stage = backbone.get_submodule(places[-1]["module"])
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            f"method gradcam: it is not known where {type(backbone).__name__} has its last feature map; explain a "
            "convolutional network, a vision transformer, or CLIP"
        ) from None
    channels_last = getattr(backbone, "output_fmt", None) == "NHWC"

    def to_map(output: torch.Tensor, size: Size) -> torch.Tensor:
        if getattr(output, "ndim", 0) != 4:
            raise UserError(f"method gradcam: the last stage of {type(backbone).__name__} outputs no feature map")
        return output.permute(0, 3, 1, 2) if channels_last else output

    return MapLayer(stage, to_map)


class AttentionWatch:
    """Attention rollout of a forward pass; only the product of the layers is kept, not every layer's weights."""

    def __init__(self, backbone: nn.Module) -> None:
        self._backbone = cast("Any", backbone)
        self.rollout: torch.Tensor | None = None  # (B, N, N), rows sum to 1
        self.pooling: torch.Tensor | None = None  # (B, N), how much of each token a pooling head takes

    def add(self, weights: torch.Tensor | None) -> None:
        """Multiply one layer in: the mean of its heads, half, and the residual connection, the other half."""
        square = weights is not None and weights.ndim == 4 and weights.shape[-1] == weights.shape[-2]
        if weights is None or not square or not ((weights.float().sum(-1) - 1).abs() <= 1e-2).all():
            raise no_rollout(self._backbone)
        mean = weights.float().mean(dim=1)
        layer = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
        if self.rollout is not None and self.rollout.shape != layer.shape:
            raise no_rollout(self._backbone)
        self.rollout = layer if self.rollout is None else layer @ self.rollout

    def pool(self, weights: torch.Tensor) -> None:
        """Note the weights of a pooling head."""
        self.pooling = weights[:, 0].float()

    def attended(self, size: Size) -> torch.Tensor:
        """Return how much the pooled vector takes of each patch.

        Returns:
            ``(B, 1, h, w)``; over all patches, and class tokens where there are some, it sums to 1.
        """
        assert self.rollout is not None
        backbone, rollout = self._backbone, self.rollout
        if self.pooling is not None:
            read = (self.pooling[:, None] @ rollout)[:, 0]
        elif _transformers_layers(backbone) is not None or backbone.global_pool == "token":
            # A distilled DeiT averages its two class tokens.
            read = rollout[:, : 2 if hasattr(backbone, "dist_token") else 1].mean(dim=1)
        else:
            read = rollout[:, backbone.num_prefix_tokens :].mean(dim=1)
        is_timm = _is_timm_vit(backbone)
        grid = backbone.patch_embed.dynamic_feat_size(size) if is_timm else _patches(backbone, size)
        return _tokens_to_map(read[..., None], grid)


@contextmanager
def watched_attention(backbone: nn.Module) -> Iterator[AttentionWatch]:
    """Compute attention weights openly while the block lasts, and multiply them up; afterwards all is as before.

    Raises:
        UserError: the network is no plain vision transformer.
    """
    module, watch = cast("Any", backbone), AttentionWatch(backbone)
    with ExitStack() as stack:
        if (layers := _transformers_layers(backbone)) is not None:
            stack.enter_context(_attribute(module.config, "_attn_implementation", "eager"))
            for layer in layers:
                stack.enter_context(layer.self_attn.register_forward_hook(lambda _, __, output: watch.add(output[1])))
            if (head := getattr(module, "head", None)) is not None and hasattr(head, "attention"):
                stack.enter_context(head.attention.register_forward_hook(lambda _, __, output: watch.pool(output[1])))
        elif _is_timm_vit(backbone) and module.global_pool in ("token", "avg"):
            for block in module.blocks:
                if not hasattr(block.attn, "attn_drop"):
                    raise no_rollout(backbone)
                if hasattr(block.attn, "fused_attn"):
                    stack.enter_context(_attribute(block.attn, "fused_attn", False))
                drop = block.attn.attn_drop
                stack.enter_context(drop.register_forward_pre_hook(lambda _, inputs: watch.add(inputs[0])))
        else:
            raise no_rollout(backbone)
        yield watch


def no_rollout(network: nn.Module) -> UserError:
    """Return the error that says why there is no rollout, and the fix."""
    return UserError(
        f"method rollout: {type(network).__name__} is no plain vision transformer, so attention cannot be multiplied "
        "up through its layers; use gradcam"
    )


def _transformers_layers(backbone: nn.Module) -> Any | None:
    """Layers of a vision transformer of the ``transformers`` library."""
    layers = getattr(getattr(backbone, "encoder", None), "layers", None)
    return layers if layers is not None and hasattr(layers[-1], "layer_norm1") else None


def _is_timm_vit(backbone: nn.Module) -> bool:
    blocks = getattr(backbone, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or not hasattr(backbone, "num_prefix_tokens"):
        return False
    return hasattr(blocks[-1], "norm1") and hasattr(getattr(backbone, "patch_embed", None), "dynamic_feat_size")


def _patches(backbone: Any, size: Size) -> Size:
    patch = int(backbone.config.patch_size)
    return size[0] // patch, size[1] // patch


def _tokens_to_map(tokens: torch.Tensor, grid: Size) -> torch.Tensor:
    """``(B, N, C)``, class tokens first, to ``(B, C, h, w)``."""
    height, width = grid
    prefix = tokens.shape[1] - height * width
    assert prefix >= 0, f"{tokens.shape[1]} tokens are fewer than {height} × {width} patches"
    return tokens[:, prefix:].transpose(1, 2).reshape(len(tokens), -1, height, width)


@contextmanager
def _attribute(owner: Any, name: str, value: object) -> Iterator[None]:
    """Set an attribute while the block lasts."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
