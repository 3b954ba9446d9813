"""Transforms on uint8 tensors: one for evaluation, wherever that happens, and the training augmentation.

Both map uint8 ``(3, H, W)`` to uint8 ``(3, size, size)`` in any memory layout. Scaling and normalisation are the
model's. The training transform uses torch's global generator; ``datamodules.loading.dataset`` seeds it for each sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.distributions import Beta
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T

from datamodules.options import PRESETS, AugmentOptions
from vitrail.seeding import seeded_rng
from vitrail.types import CropRounding, InputOptions, Interpolation, Mix, Resampler, Resize, with_image_defaults

# ImageNet's mean colour: about 0 after every usual normalisation, as where erasing follows the normalisation.
_ERASED = [124.0, 116.0, 104.0]

# The mean color of the weights whose images have borders.
_BORDER = 128

# What is faster where channels lie one after the other.
_COLOURS = ("brightness", "contrast", "saturation", "hue")
_ON_PLANES = ("rotation", "translate", *_COLOURS, "grayscale", "blur", "erasing")

_GRAY = torch.tensor([0.2989, 0.587, 0.114])
_OWN_HUES = torch.tensor([0.0, 2.0, -2.0])[:, None, None]

_LOG_RATIO = math.log(4 / 3)
_TRIES = 10
_MOST_ENLARGED = 1 << 24
_FILTERS = {
    InterpolationMode.BILINEAR: Image.Resampling.BILINEAR,
    InterpolationMode.BICUBIC: Image.Resampling.BICUBIC,
}
_LARGEST_FACTOR = 1.5


def targets_colour(tasks: Iterable[str]) -> bool:
    """Return whether a task's name shows that its target is a colour, which hue jitter would falsify."""
    return any("colour" in task.lower() or "color" in task.lower() for task in tasks)


def eval_transform(image: InputOptions) -> nn.Module:
    """Return the one transform for validation, test, prediction, galleries and the application.

    It scales the image to ``size / crop_fraction`` by ``resize``, and crops or pads its center.
    """
    made = with_image_defaults(image)
    size, side, mode = made["size"], scaled_side(image), InterpolationMode(made["interpolation"])
    if made["resize"] == "crop":
        return _ScaledCentre(side, size, mode, made["crop_rounding"], made["resampler"])
    return nn.Sequential(_Fit(side, made["resize"], mode, made["resampler"]), _Center(size, made["crop_rounding"]))


def train_transform(image: InputOptions, augment: AugmentOptions) -> nn.Module:
    """Return the training augmentation without mixing; all off is the evaluation transform."""
    augment = augment.filled()
    if not augment.sizes:
        return _train_transform(image, augment)
    sides = {0: image["size"], **{int(first): int(side) for first, side in augment.sizes}}
    return SizedByEpoch({first: _train_transform({**image, "size": side}, augment) for first, side in sides.items()})


def _train_transform(image: InputOptions, augment: AugmentOptions) -> nn.Module:
    steps: list[nn.Module] = [_crop(image, augment)]
    if not is_light(augment):
        steps.append(_Planes())
    if augment.horizontal_flip:
        steps.append(_RandomFlip(augment.horizontal_flip))
    if augment.rotation or augment.translate:
        steps.append(_RandomShift(augment.rotation or 0.0, augment.translate or 0.0))
    if augment.policy != "none":
        steps.append(_Levels())
        steps.append(_policy(augment, image["size"]))
    if jitter := {key: value for key in _COLOURS if (value := getattr(augment, key))}:
        steps.append(_ColourJitter(jitter))
    steps.append(_Levels())
    if augment.grayscale:
        steps.append(T.RandomGrayscale(augment.grayscale))
    if augment.blur:
        steps.append(T.RandomApply([_blur(image["size"])], augment.blur))
    if augment.erasing:
        low, high = augment.erasing_scale or PRESETS["none"]["erasing_scale"]
        steps.append(T.RandomErasing(augment.erasing, scale=(low, high), value=_ERASED))
    return steps[0] if len(steps) == 1 else nn.Sequential(*steps)


def is_light(augment: AugmentOptions) -> bool:
    """Return whether images are at most cropped, scaled and mirrored; of filled options."""
    return augment.policy == "none" and not any(getattr(augment, key) for key in _ON_PLANES)


def _crop(image: InputOptions, augment: AugmentOptions) -> nn.Module:
    """What makes an image square."""
    own = with_image_defaults(image)["interpolation"]
    mode = own if augment.crop_interpolation == "image" else augment.crop_interpolation
    if scale := augment.random_resized_crop:
        return _RandomResizedCrop(image["size"], mode, (scale[0], scale[1]))
    if augment.random_crop:
        resize = T.Resize(image["size"], InterpolationMode(own), antialias=True)
        return nn.Sequential(resize, T.RandomCrop(image["size"], augment.random_crop, padding_mode="reflect"))
    return eval_transform(image)


def _policy(augment: AugmentOptions, size: int) -> Any:  # torchvision has no types
    mode = InterpolationMode.BILINEAR
    if augment.policy == "randaugment":
        return T.RandAugment(augment.policy_operations, augment.policy_magnitude, interpolation=mode, fill=_ERASED)
    if augment.policy == "trivialaugment":
        return T.TrivialAugmentWide(interpolation=mode, fill=_ERASED)
    if augment.policy == "autoaugment":
        return T.AutoAugment(interpolation=mode, fill=_ERASED)
    if augment.policy == "augmix":
        return T.AugMix(interpolation=mode, fill=_ERASED)
    return T.RandomChoice([T.Grayscale(3), T.RandomSolarize(128, p=1.0), _blur(size)])


def _blur(size: int) -> Any:
    # Three standard deviations to either side; reflection needs a larger image than that.
    return T.GaussianBlur(2 * min(6, size - 1) + 1, sigma=(0.1, 2.0))


class SizedByEpoch(nn.Module):
    """Training transforms whose images grow from epoch to epoch.

    Args:
        transforms: by the first epoch that each is for, the first one 0.
    """

    def __init__(self, transforms: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self._transforms = dict(transforms)

    def at(self, epoch: int) -> nn.Module:
        """Return the transform of an epoch."""
        return self._transforms[max(first for first in self._transforms if first <= epoch)]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """As in epoch 0."""
        transformed: torch.Tensor = self.at(0)(image)
        return transformed


def scaled_side(image: InputOptions) -> int:
    """Return the length in pixels that the evaluation scales an image to, of which it keeps ``crop_fraction``."""
    # Rounded down as timm does; a fraction that was made of two lengths gives the longer one again.
    crop_fraction: float = with_image_defaults(image)["crop_fraction"]
    return math.floor(image["size"] / crop_fraction + 1e-6)


def scale_down(
    image: torch.Tensor,
    short_side: int,
    interpolation: str,
    resize: Resize = "crop",
    resampler: Resampler = "torch",
) -> torch.Tensor:
    """Scale an image, uint8 ``(3, H, W)``, down to a short side in pixels, as the evaluation does.

    With ``squash`` it is the length of both sides, with ``pad`` of the long one. A smaller image stays as it is.
    """
    mode = InterpolationMode(interpolation)
    if resize != "crop":
        return _Fit(short_side, resize, mode, resampler)(image) if image[0].numel() > short_side**2 else image
    if min(image.shape[-2:]) <= short_side:
        return image
    return _resized(image, [short_side], mode, resampler)


def _resized(image: torch.Tensor, size: list[int], mode: InterpolationMode, resampler: Resampler) -> torch.Tensor:
    """Resize uint8 ``(3, H, W)`` to height and width, or to a short side."""
    if resampler == "pillow":
        scaled = T.functional.resize(T.functional.to_pil_image(image), size, mode)
        return cast("torch.Tensor", T.functional.pil_to_tensor(scaled))
    return cast("torch.Tensor", T.functional.resize(image, size, mode, antialias=True))


def useful_short_side(image: InputOptions, augment: AugmentOptions) -> int:
    """Return the short side beyond which more pixels of an image would hardly change the input of the network.

    Without random crops it is the length that the evaluation scales to; with them the length at which the smallest
    square crop still has as many pixels as the network's input, at most half as much again.
    """
    largest: InputOptions = {**image, "size": max([image["size"], *(side for _, side in augment.sizes)])}
    short_side = scaled_side(largest)
    if not (scale := augment.filled().random_resized_crop):
        return short_side
    return max(short_side, math.ceil(largest["size"] * min(_LARGEST_FACTOR, 1 / math.sqrt(scale[0]))))


def random_crop_box(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Sample top, left, height and width of a part of an image (Szegedy et al., Going deeper with convolutions, 2015).

    As in torchvision's ``RandomResizedCrop``: the area is uniform in ``scale``, the aspect ratio log-uniform in
    [3/4, 4/3]; after ten parts that do not fit it is the largest one in the middle. All random numbers come from one
    call of torch's global generator, because single calls take a fifth of a sample's time.
    """
    draws = iter(torch.rand(2 * _TRIES + 2, dtype=torch.float64).tolist())
    for _ in range(_TRIES):
        target_area = height * width * (scale[0] + next(draws) * (scale[1] - scale[0]))
        ratio = math.exp((2 * next(draws) - 1) * _LOG_RATIO)
        part_width, part_height = round(math.sqrt(target_area * ratio)), round(math.sqrt(target_area / ratio))
        if 0 < part_width <= width and 0 < part_height <= height:
            top, left = (int(next(draws) * (room + 1)) for room in (height - part_height, width - part_width))
            return top, left, part_height, part_width
    ratio = min(max(width / height, 3 / 4), 4 / 3)
    part_width, part_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - part_height) // 2, (width - part_width) // 2, part_height, part_width


def adjust_colours(image: torch.Tensor, changes: Mapping[str, float]) -> torch.Tensor:
    """Change brightness, contrast, saturation and hue of uint8 ``(3, H, W)`` in the order given.

    Like torchvision's functions of these names one after the other, but in one pass without rounding between.

    Args:
        image: RGB.
        changes: factors of ``brightness``, ``contrast`` and ``saturation``, 0 or more, and the shift of ``hue`` in
            turns of the colour circle.
    """
    return _levels(_change_colours(image.float(), changes))


def _change_colours(pixels: torch.Tensor, changes: Mapping[str, float]) -> torch.Tensor:
    """As ``adjust_colours``, of float32 ``(3, H, W)``, contiguous, 0 to 255, in place."""
    for kind, amount in changes.items():
        if kind == "hue":
            _shift_hue(pixels, amount)
            continue
        if kind == "brightness":
            pixels.mul_(amount)
        elif kind == "contrast":
            mean = _GRAY @ pixels.mean((1, 2))
            pixels.mul_(amount).add_(mean * (1 - amount))
        else:
            red, green, blue = pixels.unbind(0)
            gray = (red * (0.2989 * (1 - amount))).add_(green, alpha=0.587 * (1 - amount))
            gray.add_(blue, alpha=0.114 * (1 - amount))
            pixels.mul_(amount).add_(gray)
        if amount > 1:  # up to 1 no value can leave the range
            pixels.clamp_(0, 255)
    return pixels


def _levels(pixels: torch.Tensor) -> torch.Tensor:
    """Round float32 pixels, which are changed, to uint8; uint8 as it is."""
    return pixels.round_().to(torch.uint8) if pixels.is_floating_point() else pixels


def _shift_hue(pixels: torch.Tensor, turns: float) -> None:
    """Shift the hue in place; as value and chroma stay, each channel follows from the distance of its hue.

    The hue in sixths of a turn lies between -3 and 3 with red at 0. Without cases: its distance from red is
    1 + (green + blue - red - least) / chroma, and it has the sign of green - blue.
    """
    red, green, blue = pixels.unbind(0)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    distance = (green + blue).sub_(red).sub_(least)
    chroma = torch.sub(value, least, out=least)
    distance.div_(chroma.clamp(min=1e-6)).add_(1)
    hue = distance.copysign_(green - blue).add_(6 * turns)
    if abs(turns) > 1 / 6:
        hue.sub_(hue.mul(1 / 6).round_().mul_(6))
    # Around the circle the distance is 3 - | |difference| - 3 |; within 1 of its own hue a channel is full.
    torch.sub(hue, _OWN_HUES, out=pixels)
    pixels.abs_().sub_(3).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).neg_().add_(value)


class _ScaledCentre(nn.Module):
    """Scales the short side to a length and crops the center."""

    def __init__(
        self,
        short_side: int,
        size: int,
        interpolation: InterpolationMode,
        rounding: CropRounding,
        resampler: Resampler,
    ) -> None:
        super().__init__()
        self._short_side, self._size, self._rounding = short_side, size, rounding
        self._interpolation, self._resampler = interpolation, resampler
        self._crop = _Center(size, rounding)
        self._filter = _FILTERS[interpolation]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        long_side = int(self._short_side * max(height, width) / min(height, width))
        if long_side * self._short_side <= max(_MOST_ENLARGED, 16 * self._short_side**2):
            scaled_image = _resized(image, [self._short_side], self._interpolation, self._resampler)
            return cast("torch.Tensor", self._crop(scaled_image))
        scaled = (self._short_side, long_side) if height <= width else (long_side, self._short_side)
        return self._only_center(image, scaled)

    def _only_center(self, image: torch.Tensor, scaled: tuple[int, int]) -> torch.Tensor:
        """The same crop without the rest of the scaled image: that of a strip would fill the memory."""
        spans = []
        for length, new_length in zip(image.shape[-2:], scaled, strict=True):
            ratio = length / new_length
            first = _half(new_length - self._size, self._rounding)
            margin = math.ceil(2 * max(ratio, 1)) + 1
            begin = max(0, math.floor(first * ratio) - margin)
            end = min(length, math.ceil((first + self._size) * ratio) + margin)
            spans.append((begin, end, first * ratio - begin, (first + self._size) * ratio - begin))
        (top, bottom, box_top, box_bottom), (left, right, box_left, box_right) = spans
        part = Image.fromarray(image[:, top:bottom, left:right].permute(1, 2, 0).contiguous().numpy())
        box = (box_left, box_top, box_right, box_bottom)
        pixels = np.array(part.resize((self._size, self._size), self._filter, box))
        return torch.from_numpy(pixels).permute(2, 0, 1)


class _Fit(nn.Module):
    """Scales both sides to a length (``squash``), or the long one (``pad``, as timm does)."""

    def __init__(self, side: int, resize: Resize, interpolation: InterpolationMode, resampler: Resampler) -> None:
        super().__init__()
        self._side, self._resize, self._interpolation, self._resampler = side, resize, interpolation, resampler

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        size = [self._side, self._side]
        if self._resize == "pad":
            ratio = max(image.shape[-2:]) / self._side
            size = [max(1, round(length / ratio)) for length in image.shape[-2:]]
        if list(image.shape[-2:]) == size:
            return image
        return _resized(image, size, self._interpolation, self._resampler)


class _Center(nn.Module):
    """Crops the center; what is smaller gets borders."""

    def __init__(self, size: int, rounding: CropRounding) -> None:
        super().__init__()
        self._size, self._rounding = size, rounding

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        spare = [self._size - length for length in image.shape[-2:]]
        if max(spare) > 0:
            vertical, horizontal = (max(0, length) for length in spare)
            left, top = horizontal // 2, vertical // 2
            image = F.pad(image, (left, horizontal - left, top, vertical - top), value=_BORDER)
        margins = [length - self._size for length in image.shape[-2:]]
        top, left = (_half(margin, self._rounding) for margin in margins)
        return image[..., top : top + self._size, left : left + self._size]


def _half(margin: int, rounding: CropRounding) -> int:
    return round(margin / 2) if rounding == "even" else margin // 2


class _ColourJitter(nn.Module):
    """Changes colours by random amounts in random order, sampled as by torchvision's ``ColorJitter``."""

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
        return _change_colours(image.float(), changes)


class _Levels(nn.Module):
    """Rounds to uint8 what the transforms before it have left as float32, so that it is rounded once."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return _levels(image)


class _RandomShift(nn.Module):
    """Rotates and shifts in one resampling, black outside: torchvision's ``RandomAffine``, to float32.

    The same random numbers and pixels; the sampling grid is a sum of a row and a column instead of a product of
    matrices, which takes a fifth of the time.

    Args:
        angle: largest rotation to either side in degrees.
        share: largest shift along each axis as a share of the side.
    """

    def __init__(self, angle: float, share: float) -> None:
        super().__init__()
        self._angle, self._share = angle, share

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width = image.shape[-2:]
        angle = math.radians(float(torch.empty(1).uniform_(-self._angle, self._angle)))
        right = down = 0
        if most := self._share:
            right = round(float(torch.empty(1).uniform_(-most * width, most * width)))
            down = round(float(torch.empty(1).uniform_(-most * height, most * height)))
        cos, sin = math.cos(angle), math.sin(angle)
        x = torch.arange(width, dtype=torch.float32).add_(0.5 - width / 2 - right)
        y = torch.arange(height, dtype=torch.float32).add_(0.5 - height / 2 - down)[:, None]
        grid = torch.empty(1, height, width, 2)
        torch.add(x * (2 * cos / width), y * (2 * sin / width), out=grid[0, ..., 0])
        torch.add(x * (-2 * sin / height), y * (2 * cos / height), out=grid[0, ..., 1])
        return F.grid_sample(image.float()[None], grid, align_corners=False)[0]


class _RandomResizedCrop(nn.Module):
    """A random part of the image, resampled to the input size of the network as by torchvision."""

    def __init__(self, size: int, mode: Interpolation | Literal["random"], scale: tuple[float, float]) -> None:
        super().__init__()
        self._size, self._mode, self._scale = size, mode, scale

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        top, left, height, width = random_crop_box(image.shape[-2], image.shape[-1], self._scale)
        part = image[:, top : top + height, left : left + width]
        if (height, width) == (self._size, self._size):
            return part
        # Torch is fastest at images whose channels are interleaved, without gaps, and with strides that show it.
        part = part.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
        size, mode = (self._size, self._size), self._mode
        if mode == "random":
            mode = "bilinear" if float(torch.rand(())) < 0.5 else "bicubic"
        return F.interpolate(part, size=size, mode=mode, align_corners=False, antialias=True)[0]


class _RandomFlip(nn.Module):
    """torchvision's ``RandomHorizontalFlip`` without handling boxes and masks, which takes longer than the flip."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self._probability = probability

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.flip(-1) if float(torch.rand(1)) < self._probability else image


class _Planes(nn.Module):
    """Makes images planar: they are read interleaved, which is the fastest layout to resize."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.contiguous()


def mix_batch(
    images: torch.Tensor,
    key: tuple[int, ...],
    *,
    mixup: float,
    cutmix: float,
    probability: float = 1.0,
    switch: float = 0.5,
    later: bool = False,
) -> tuple[torch.Tensor, Mix | None]:
    """Mix every image of a batch, uint8 ``(B, 3, H, W)``, with another one of it, all with the same share.

    mixup: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018); CutMix: Yun et al., "CutMix:
    Regularization Strategy to Train Strong Classifiers with Localizable Features" (ICCV 2019). Where both are on, each
    batch gets one of them, as in timm.

    Args:
        images: of the batch.
        key: seed of the randomness, such as (seed, epoch, id of the first sample).
        mixup: alpha of the Beta distribution of mixup's share, 0 for off.
        cutmix: alpha of the Beta distribution of CutMix's share, 0 for off.
        probability: probability that the batch is mixed at all.
        switch: where both are on, the probability of CutMix.
        later: whether the images are returned as they are, for ``mix_pending``.

    Returns:
        The mixed images and how they were mixed: None where nothing is on or the batch has one image.
    """
    size = len(images)
    if size < 2 or not (mixup or cutmix):
        return images, None
    with seeded_rng("mix", *key):
        if probability < 1 and not bool(torch.rand(()) < probability):
            return images, None
        cuts = bool(cutmix) and (not mixup or bool(torch.rand(()) < switch))
        alpha = cutmix if cuts else mixup
        share = float(Beta(alpha, alpha).sample())
        partner = torch.randperm(size)
        centre = torch.rand(2)
    height, width = images.shape[-2:]
    weight, box = round(share * 128), (0, height, 0, width)
    if cuts:
        weight, box = 0, _box(share, centre, height, width)
        # What is really left after clipping and rounding the box.
        share = 1 - (box[1] - box[0]) * (box[3] - box[2]) / (height * width)
    else:
        share = weight / 128  # for 16-bit integers, faster than floats
    mix: Mix = {"partner": partner, "lam": torch.full((size,), share, dtype=torch.float32)}
    if later:
        mix["pending"] = torch.tensor([weight, *box], dtype=torch.int16)
        return images, mix
    return _cut(images, partner, box) if cuts else _blend(images, partner, weight), mix


def mix_pending(images: torch.Tensor, mix: Mix) -> torch.Tensor:
    """Mix images on their device, uint8 ``(B, 3, H, W)``, bit by bit as ``mix_batch`` would have, without waiting."""
    weight, top, bottom, left, right = mix.pop("pending")
    rows = torch.arange(images.shape[-2], device=images.device)[:, None]
    columns = torch.arange(images.shape[-1], device=images.device)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    base = images[mix["partner"]].to(torch.int16)
    mixed = images.to(torch.int16).sub_(base).mul_(weight).add_(64).bitwise_right_shift_(7).add_(base)
    return torch.where(inside, mixed.to(torch.uint8), images)


def _blend(images: torch.Tensor, partner: torch.Tensor, weight: int) -> torch.Tensor:
    """Mixup with a share of ``weight`` / 128."""
    mixed = torch.empty_like(images)
    for row, other in enumerate(partner.tolist()):
        base = images[other].to(torch.int16)
        difference = images[row].to(torch.int16).sub_(base)
        mixed[row] = difference.mul_(weight).add_(64).bitwise_right_shift_(7).add_(base)
    return mixed


def _cut(images: torch.Tensor, partner: torch.Tensor, box: tuple[int, int, int, int]) -> torch.Tensor:
    top, bottom, left, right = box
    mixed = images.clone()
    for row, other in enumerate(partner.tolist()):
        mixed[row, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
    return mixed


def _box(share: float, centre: torch.Tensor, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of CutMix's box, clipped to the image."""
    side = (1 - share) ** 0.5
    (top, bottom), (left, right) = (
        (max(round(middle - side * length / 2), 0), min(round(middle + side * length / 2), length))
        for middle, length in ((float(centre[0]) * height, height), (float(centre[1]) * width, width))
    )
    return top, bottom, left, right
