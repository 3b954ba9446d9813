"""Which parts of an image a prediction depends on: Grad-CAM and attention rollout.

Grad-CAM (Selvaraju et al., ICCV 2017) weights the last feature map by the gradient of one score. Attention rollout
(Abnar & Zuidema, ACL 2020) multiplies attention weights up through the layers; it is the same for every score. Neither
proves a cause; the tests check that maps of random weights differ from those of trained ones (Adebayo et al., NeurIPS
2018).

The package ``grad-cam`` is not used: it brings OpenCV for what is a resize and a colour map here. Its maps of the same
layers are these to six digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from evaluation.saliency.layers import Size, map_layer, watched_attention
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK, kind_of

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
