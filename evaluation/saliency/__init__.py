"""Which parts of an image a prediction depends on: Grad-CAM and attention rollout.

Grad-CAM (Selvaraju et al., ICCV 2017) weights the last feature map by the gradient of one score. Attention rollout
(Abnar & Zuidema, ACL 2020) multiplies attention weights up through the layers; it is the same for every score. Neither
proves a cause; the tests check that maps of random weights differ from those of trained ones (Adebayo et al., NeurIPS
2018).

The package ``grad-cam`` is not used: it brings OpenCV for what is a resize and a colour map here. Its maps of the same
layers are these to six digits.

Networks are recognised by their attributes, not by name: vision transformers of ``transformers`` (CLIP, SigLIP), vision
transformers of ``timm``, and any other network of ``timm`` whose ``feature_info`` names its last stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from vitrail.errors import UserError
from vitrail.types import LABEL_TASK, kind_of

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


Method = Literal["gradcam", "rollout"]

Scores = Callable[[torch.Tensor], torch.Tensor]
"""From images uint8 ``(B, 3, H, W)`` to scores ``(B, C)``, computed by the model whose maps are wanted."""

DIRECTIONS = ("higher", "lower")
"""What stands in for the classes of a regression task: the number itself, and its negative."""

AT_A_TIME = 8
"""Images per batch, which bounds the memory."""


def explainable(model: nn.Module, task: str) -> list[str]:
    """Return the names of a task's scores: its classes or labels, or ``DIRECTIONS`` for regression."""
    is_number = kind_of(getattr(model, "task_kinds", {}), task) == "regression"
    return list(DIRECTIONS if is_number else cast("Any", model).tasks[task])


def class_scores(model: nn.Module, task: str | None = None) -> Scores:
    """Return a function to a task's logits; of a dual encoder to the scaled similarities to the classes' prompts.

    Of a regression task they are the number and its negative.

    Raises:
        UserError: the model does not have the task, or has no classes at all.
    """
    tasks: dict[str, list[str]] = getattr(model, "tasks", {})
    if not tasks:
        raise UserError(f"{type(model).__name__}: has no classes to explain; explain the likeness to a text (--text)")
    name = task or next(iter(tasks))
    if name not in tasks:
        raise UserError(f"task {name!r}: the model has {', '.join(tasks)}; choose one of them")
    task_model = cast("Any", model)
    if hasattr(model, "class_embeddings") and name == LABEL_TASK:
        if getattr(model, "few_shot", None) is not None:
            return lambda image: task_model.classify(task_model.encode_image(image))
        with _undisturbed(model), torch.no_grad():
            # A copy: what was computed in inference mode before cannot take part in a gradient.
            embeddings = task_model.class_embeddings() * task_model.objective.logit_scale()[0]
        return lambda image: task_model.encode_image(image) @ embeddings.T
    if hasattr(model, "classify"):

        def scores(image: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = task_model.classify(task_model.image_features(image))[name].float()
            is_number = kind_of(getattr(model, "task_kinds", {}), name) == "regression"
            return torch.cat([outputs[:, :1], -outputs[:, :1]], dim=1) if is_number else outputs

        return scores
    raise UserError(f"{type(model).__name__}: explains neither classes nor texts; use a classifier or a dual encoder")


def text_scores(model: nn.Module, texts: list[str]) -> Scores:
    """Return a function to cosine similarities to texts.

    Raises:
        UserError: the model has no text encoder.
    """
    if not hasattr(model, "encode_text"):
        raise UserError(f"--text: {type(model).__name__} has no text encoder; use a dual encoder, or leave --text out")
    dual_encoder = cast("Any", model)
    with _undisturbed(model), torch.no_grad():
        embeddings = dual_encoder.encode_text(texts)
    return lambda image: dual_encoder.encode_image(image) @ embeddings.T


def grad_cam(model: nn.Module, scores: Scores, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Compute Grad-CAM of some scores of each image; the model is left as it was.

    Args:
        model: a task, on the device to compute on.
        scores: computed by the model.
        images: uint8 ``(B, 3, H, W)``, RGB.
        classes: int64 ``(B, K)``, which scores of each image.

    Returns:
        float32 ``(B, K, H, W)`` in [0, 1], on the CPU. The largest value of a map is 1; where nothing in the
        image contributes to a class its map is 0 everywhere.

    Raises:
        UserError: the network is of no known kind, or its scores are not finite.
    """
    layer, size = map_layer(image_backbone(model)), _size(images)
    kept: list[torch.Tensor] = []

    def begin_here(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        leaf = output.detach().requires_grad_()
        kept.append(leaf)
        # A copy, because what follows may work in place.
        return leaf.clone()

    parts = []
    with _undisturbed(model), layer.module.register_forward_hook(begin_here):
        for chunk, wanted in zip(torch.split(images, AT_A_TIME), torch.split(classes, AT_A_TIME), strict=True):
            kept.clear()
            found = scores(chunk.to(_device(model)))
            _check_finite(found, model)
            # A copy, because an index that was made in inference mode cannot take part in a gradient.
            picked = found.gather(1, wanted.to(found.device).clone())
            maps = []
            for place in range(picked.shape[1]):
                [gradient] = torch.autograd.grad(picked[:, place].sum(), kept[0], retain_graph=True)
                features, slopes = (layer.to_map(part.float(), size) for part in (kept[0].detach(), gradient))
                maps.append(F.relu((slopes.mean(dim=(2, 3), keepdim=True) * features).sum(dim=1)))
            parts.append(_scaled(torch.stack(maps, dim=1), size).cpu())
    return torch.cat(parts)


def attention_rollout(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Compute how much attention flows from each place into the pooled vector; the same for every class and text.

    Each layer counts as the mean of its heads, half, and its residual connection, the other half.

    Returns:
        float32 ``(B, 1, H, W)`` in [0, 1], on the CPU; smallest and largest value of each map are 0 and 1.

    Raises:
        UserError: the network is no plain vision transformer.
    """
    backbone, size, parts = image_backbone(model), _size(images), []
    for chunk in torch.split(images, AT_A_TIME):
        with _undisturbed(model), torch.no_grad(), watched_attention(backbone) as watch:
            cast("Any", model).image_features(chunk.to(_device(model)))
            attended = watch.attended(size)
        # The residual connections give every place something alike; what differs is above the least.
        parts.append(_scaled(attended, size, from_least=True).cpu())
    return torch.cat(parts)


def score_images(model: nn.Module, scores: Scores, images: torch.Tensor) -> torch.Tensor:
    """Compute the scores themselves, float32 ``(B, C)``, on the CPU.

    Raises:
        UserError: they are not finite.
    """
    parts = []
    for chunk in torch.split(images, AT_A_TIME):
        with _undisturbed(model), torch.no_grad():
            parts.append(scores(chunk.to(_device(model))).float().cpu())
            _check_finite(parts[-1], model)
    return torch.cat(parts)


def check_method(model: nn.Module, method: Method) -> None:
    """Refuse at once what would fail later.

    Raises:
        UserError: the method does not go with the model's network.
    """
    backbone = image_backbone(model)
    if method == "gradcam":
        map_layer(backbone)
    else:
        with watched_attention(backbone):
            pass


def image_backbone(model: nn.Module) -> nn.Module:
    """Return the image encoder's network.

    Raises:
        UserError: the model has none.
    """
    towers = getattr(model, "towers", None)
    backbone = towers.backbone("image") if towers is not None else getattr(model, "backbone", None)
    if not isinstance(backbone, nn.Module):
        raise UserError(f"{type(model).__name__}: has no image backbone")
    return backbone


def _scaled(maps: torch.Tensor, size: Size, *, from_least: bool = False) -> torch.Tensor:
    """``(B, K, h, w)``, not negative, as large as the images and with 1 as the largest value of each map."""
    large = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    if from_least:
        large = large - large.amin(dim=(2, 3), keepdim=True)
    highest = large.amax(dim=(2, 3), keepdim=True)
    return torch.where(highest > 0, large / highest.clamp(min=torch.finfo(large.dtype).tiny), 0.0)


def _check_finite(scores: torch.Tensor, model: nn.Module) -> None:
    if not bool(torch.isfinite(scores).all()):
        raise UserError(
            f"{type(model).__name__}: its scores are not finite, so nothing can be explained; use another checkpoint"
        )


def _size(images: torch.Tensor) -> Size:
    return int(images.shape[-2]), int(images.shape[-1])


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Freeze the model, in evaluation mode and full precision; at the end it is as before.

    In a frozen network no layer keeps what only a gradient needs, except from the watched map on.
    """
    # A compiled network does not see hooks that come later: it runs as it is written.
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    stance: Any = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module, _ in modes:
        module.training = False
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        autocast = torch.autocast(_device(model).type, enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), autocast, stance:
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
