"""Transforms on uint8 tensors: one for evaluation, wherever that happens, and the training augmentation.

Both take uint8 ``(3, H, W)`` and give uint8 ``(3, size, size)``. Scaling and normalisation are the model's. The
training transform draws from torch's global generator; ``datamodules.dataset`` seeds it for each sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T

from datamodules.options import AugmentOptions, ImageOptions, complete_augment, complete_image

# ImageNet's mean colour: about 0 after every usual normalisation, as where erasing follows the normalisation.
_ERASED = [124.0, 116.0, 104.0]


def learns_colour(tasks: Iterable[str]) -> bool:
    """Whether a task's name says that its target is a colour, which hue jitter would falsify."""
    return any("colour" in task.lower() or "color" in task.lower() for task in tasks)


def eval_transform(image: ImageOptions | None) -> nn.Module:
    """The one transform for validation, test, prediction, galleries and the application.

    Resizes the short side to ``size / crop_fraction`` and crops the centre.

    Args:
        image: size, crop fraction and interpolation.

    Raises:
        UserError: for unknown keys and values out of range.
    """
    options = complete_image(image)
    short_side = round(options["size"] / options["crop_fraction"])
    resize: nn.Module = T.Resize(short_side, interpolation=_interpolation(options), antialias=True)
    return nn.Sequential(resize, T.CenterCrop(options["size"]), _Contiguous())


def train_transform(image: ImageOptions | None, augment: AugmentOptions | None, hue_safe: bool) -> nn.Module:
    """The training augmentation without mixing; what is off costs nothing, and all off is the evaluation transform.

    Args:
        image: size, crop fraction and interpolation.
        augment: preset and overrides.
        hue_safe: whether to leave out the hue jitter of a preset, because a colour is to be learned.

    Raises:
        UserError: for unknown keys and values out of range.
    """
    options = complete_image(image)
    chosen = complete_augment(augment, hue_safe=hue_safe)
    steps: list[nn.Module] = []
    if scale := chosen["random_resized_crop"]:
        steps.append(
            T.RandomResizedCrop(
                options["size"], (scale[0], scale[1]), interpolation=_interpolation(options), antialias=True
            )
        )
        steps.append(_Contiguous())
    else:
        steps.append(eval_transform(options))
    if chosen["horizontal_flip"]:
        steps.append(T.RandomHorizontalFlip(chosen["horizontal_flip"]))
    if chosen["rotation"] or chosen["translate"]:
        # One resampling for both; two would blur twice.
        shift = (chosen["translate"], chosen["translate"]) if chosen["translate"] else None
        # Without `fill` the outside is black as with fill=0, but torchvision warps no mask along with the picture.
        steps.append(T.RandomAffine(chosen["rotation"], shift, interpolation=InterpolationMode.BILINEAR, fill=None))
    jitter = {key: chosen[key] for key in ("brightness", "contrast", "saturation", "hue") if chosen[key]}
    if jitter:
        steps.append(_ColourJitter(jitter))
    if chosen["erasing"]:
        low, high = chosen["erasing_scale"]
        steps.append(T.RandomErasing(chosen["erasing"], scale=(low, high), value=_ERASED))
    return steps[0] if len(steps) == 1 else nn.Sequential(*steps)


def adjust_colours(image: torch.Tensor, changes: Mapping[str, float]) -> torch.Tensor:
    """Changes brightness, contrast, saturation and hue in the order given.

    The same as torchvision's functions of these names one after the other, but in one pass without rounding between.

    Args:
        image: uint8 ``(3, H, W)``, RGB.
        changes: factors of ``brightness``, ``contrast`` and ``saturation``, 0 or more, and the shift of ``hue`` in
            turns of the colour circle.

    Returns:
        uint8 ``(3, H, W)``.
    """
    pixels = image.float()
    for kind, amount in changes.items():
        if kind == "hue":
            _shift_hue(pixels, amount)
        elif kind == "brightness":
            pixels.mul_(amount).clamp_(0, 255)
        else:
            grey = pixels[0] * 0.2989 + pixels[1] * 0.587 + pixels[2] * 0.114
            grey = grey.mean() if kind == "contrast" else grey
            pixels.mul_(amount).add_(grey.mul_(1 - amount)).clamp_(0, 255)
    return pixels.round_().to(torch.uint8)


def _shift_hue(pixels: torch.Tensor, turns: float) -> None:
    """Turns the hue in place and keeps saturation and value (HSV).

    Value and chroma do not change, so each channel follows from the distance between the pixel's hue and its own.
    """
    red, green, blue = pixels.unbind(0)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    scale = chroma.clamp(min=1e-6).reciprocal_()
    from_green_or_blue = torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4)
    hue = torch.where(value == red, (green - blue) * scale, from_green_or_blue).add_(6 * turns)
    for channel, own_hue in zip(pixels, (0, 2, 4), strict=True):
        distance = hue - own_hue
        distance.sub_(distance.mul(1 / 6).round_().mul_(6)).abs_()
        torch.sub(value, distance.sub_(1).clamp_(0, 1).mul_(chroma), out=channel)


class _ColourJitter(nn.Module):
    """Changes colours by random amounts in random order, drawn as torchvision's ``ColorJitter`` draws them."""

    def __init__(self, strengths: Mapping[str, float]) -> None:
        super().__init__()
        self._bounds = {
            kind: (-strength, strength) if kind == "hue" else (max(0.0, 1 - strength), 1 + strength)
            for kind, strength in strengths.items()
        }

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        kinds = list(self._bounds)
        order = [kinds[place] for place in torch.randperm(len(kinds)).tolist()]
        changes = {kind: float(torch.empty(()).uniform_(*self._bounds[kind])) for kind in order}
        return adjust_colours(image, changes)


class _Contiguous(nn.Module):
    """Lays channels one after the other: read pictures come interleaved, in which resizing is fastest."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.contiguous()


def _interpolation(options: ImageOptions) -> InterpolationMode:
    return InterpolationMode(options["interpolation"])
