"""Images with faults, to measure how a model's scores fall: fifteen corruptions at five severities, and sweeps.

The corruptions follow the descriptions of Hendrycks & Dietterich, Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations (ICLR 2019, arXiv 1903.12261), and have the severities of ImageNet-C. They are computed
when they are needed, so three of them are not those of ImageNet-C to the pixel: frost is made of ridged noise instead
of photographs of frost, fog of noise with the same fall by octave instead of the diamond-square algorithm, and glass
takes each pixel from a random place nearby instead of exchanging pixels one after another. Scores on files of
ImageNet-C are not the same numbers, then; both rank models alike only as far as that was measured.

Lengths are those of ImageNet-C, whose images were scaled to 256 px before they were cropped: an image with a longer
shorter side is scaled down to ``SIDE`` first, and lengths shrink with an image that is smaller. What is random is a
function of (seed, sample, corruption, severity), so it depends neither on workers nor on order.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates
from torchvision.transforms.v2 import functional as T

from datamodules.loading.decode import decoded
from vitrail.seeding import derive_seed

SIDE = 256
"""Largest shorter side in pixels of an image that is corrupted."""

Pixels = NDArray[np.floating[Any]]
"""An image, ``(H, W, 3)`` from 0 to 1."""

Corruption = Callable[[Pixels, Any, np.random.Generator, float], Pixels]
"""Takes an image, the level, random numbers, and the length that 1 px of a 256 px image has here."""


def scaled(image: torch.Tensor) -> torch.Tensor:
    """Return the image that is corrupted, uint8 ``(3, h, w)``: scaled down where its shorter side is above ``SIDE``."""
    height, width = image.shape[1:]
    factor = SIDE / min(height, width)
    if factor >= 1:
        return image
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    resized: torch.Tensor = T.resize(image, size, T.InterpolationMode.BILINEAR, antialias=True)
    return resized


def corrupted(image: torch.Tensor, name: str, severity: int, key: Sequence[int | str] = ()) -> torch.Tensor:
    """Return a corrupted image, uint8 of the same shape.

    Args:
        image: uint8 ``(3, H, W)``, RGB, from ``scaled``.
        name: one of ``LEVELS``.
        severity: from 1 to the number of its levels.
        key: what the random numbers depend on, next to name and severity.

    Example:
        >>> image = torch.full((3, 64, 48), 128, dtype=torch.uint8)
        >>> corrupted(image, "gaussian_noise", 3, (0, 17)).float().std() > 30
        tensor(True)
    """
    level = LEVELS[name][severity - 1]
    rng = np.random.default_rng(derive_seed("corrupt", *key, name, severity))
    pixels = image.permute(1, 2, 0).numpy().astype(np.float32) / 255
    made = _CORRUPTIONS[name](pixels, level, rng, min(image.shape[1:]) / SIDE)
    return torch.from_numpy((made.clip(0, 1) * 255).round().astype(np.uint8)).permute(2, 0, 1)


# Noise.


def _gaussian_noise(image: Pixels, level: float, rng: np.random.Generator, unit: float) -> Pixels:
    return image + level * rng.standard_normal(image.shape, dtype=np.float32)


def _shot_noise(image: Pixels, level: float, rng: np.random.Generator, unit: float) -> Pixels:
    return (rng.poisson(image * level) / level).astype(np.float32)


def _impulse_noise(image: Pixels, level: float, rng: np.random.Generator, unit: float) -> Pixels:
    chance = rng.random(image.shape, dtype=np.float32)
    return np.where(chance < level / 2, 0, np.where(chance < level, 1, image)).astype(np.float32)


# Blur.


def _convolved(image: Pixels, kernel: Pixels) -> Pixels:
    """The image convolved with an odd-sized kernel, repeated at its borders."""
    rows, columns = (side // 2 for side in kernel.shape)
    planes = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[:, None]
    padded = F.pad(planes, (columns, columns, rows, rows), mode="replicate")
    weights = torch.from_numpy(kernel / kernel.sum())[None, None]
    return F.conv2d(padded, weights)[:, 0].permute(1, 2, 0).numpy()


def _offsets(reach: int) -> tuple[Pixels, Pixels]:
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float32)
    return rows, columns


def _defocus_blur(image: Pixels, level: tuple[float, float], rng: np.random.Generator, unit: float) -> Pixels:
    radius, softness = level[0] * unit, level[1] * unit
    disk = (radius + 0.5 - np.hypot(*_offsets(math.ceil(radius) + 1))).clip(0, 1)
    return _convolved(image, gaussian_filter(disk, softness))


def _glass_blur(image: Pixels, level: tuple[float, float, int], rng: np.random.Generator, unit: float) -> Pixels:
    softness, reach, rounds = level[0] * unit, level[1] * unit + 0.5, level[2]
    image = _softened(image, softness)
    rows, columns = np.indices(image.shape[:2])
    for _ in range(rounds):
        moved = [np.rint(rng.uniform(-reach, reach, rows.shape)).astype(np.int64) for _ in range(2)]
        image = image[(rows + moved[0]).clip(0, image.shape[0] - 1), (columns + moved[1]).clip(0, image.shape[1] - 1)]
    return _softened(image, softness)


def _softened(image: Pixels, deviation: float) -> Pixels:
    soft: Pixels = gaussian_filter(image, (deviation, deviation, 0))
    return soft


def _motion_kernel(radius: float, deviation: float, angle: float) -> Pixels:
    """Half a Gaussian along a line from the centre: what a moving camera leaves of a point."""
    reach = math.ceil(radius) + 1
    rows, columns = _offsets(reach)
    along = columns * math.cos(angle) + rows * math.sin(angle)
    across = np.abs(rows * math.cos(angle) - columns * math.sin(angle))
    weight = np.exp(-((along / deviation) ** 2) / 2) * (1 - across).clip(0) * ((along > -0.5) & (along < radius + 0.5))
    made: Pixels = weight.astype(np.float32)
    return made


def _motion_blur(image: Pixels, level: tuple[float, float], rng: np.random.Generator, unit: float) -> Pixels:
    angle = math.radians(rng.uniform(-45, 45))
    return _convolved(image, _motion_kernel(level[0] * unit, max(level[1] * unit, 0.1), angle))


def _zoom_blur(image: Pixels, level: tuple[float, float], rng: np.random.Generator, unit: float) -> Pixels:
    factors = torch.arange(1.0, level[0], level[1])
    theta = torch.zeros(len(factors), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / factors
    planes = torch.from_numpy(image).permute(2, 0, 1).expand(len(factors), -1, -1, -1)
    grid = F.affine_grid(theta, list(planes.shape), align_corners=False)
    zoomed = F.grid_sample(planes, grid, padding_mode="border", align_corners=False)
    return zoomed.mean(dim=0).permute(1, 2, 0).numpy()


# Weather.


def _fractal(shape: tuple[int, int], fall: float, rng: np.random.Generator) -> Pixels:
    """Noise from 0 to 1, ``(H, W)``, whose amplitude falls by the factor ``fall`` from octave to octave."""
    side = 2 ** math.ceil(math.log2(max(shape)))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = math.inf
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) / frequency ** (1 + math.log2(fall))
    noise = np.fft.irfft2(spectrum, (side, side))[: shape[0], : shape[1]]
    made: Pixels = ((noise - noise.min()) / max(np.ptp(noise), 1e-9)).astype(np.float32)
    return made


def _snow(image: Pixels, level: tuple[float, ...], rng: np.random.Generator, unit: float) -> Pixels:
    mean, deviation, zoom, threshold, radius, softness, kept = level
    height, width = image.shape[:2]
    size = [max(1, round(side / zoom / unit)) for side in (height, width)] if unit else [1, 1]
    flakes = torch.from_numpy(rng.normal(mean, deviation, (1, *size)).astype(np.float32))
    flakes = T.resize(flakes, [height, width], T.InterpolationMode.BILINEAR, antialias=True)
    layer = flakes.clamp(0, 1).permute(1, 2, 0).numpy()
    layer = np.where(layer < threshold, 0, layer).astype(np.float32)
    angle = math.radians(rng.uniform(45, 135))
    layer = _convolved(layer, _motion_kernel(radius * unit, max(softness * unit, 0.1), angle))
    grey = (image @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
    pale = kept * image + (1 - kept) * np.maximum(image, 1.5 * grey + 0.5)
    made: Pixels = pale + layer + layer[::-1, ::-1]
    return made


def _frost(image: Pixels, level: tuple[float, float], rng: np.random.Generator, unit: float) -> Pixels:
    crystals = np.zeros(image.shape[:2], np.float32)
    for strength, fall in ((0.5, 1.6), (0.3, 1.4), (0.2, 1.2)):
        ridges = 1 - np.abs(2 * _fractal(image.shape[:2], fall, rng) - 1)
        crystals += strength * ridges**4
    patches = _fractal(image.shape[:2], 2.2, rng)
    ice = (0.25 + 0.75 * crystals * (0.5 + patches)).clip(0, 1)[..., None] * np.array([0.82, 0.93, 1], np.float32)
    made: Pixels = level[0] * image + level[1] * ice
    return made


def _fog(image: Pixels, level: tuple[float, float], rng: np.random.Generator, unit: float) -> Pixels:
    brightest = float(image.max())
    foggy = image + level[0] * _fractal(image.shape[:2], level[1], rng)[..., None]
    made: Pixels = foggy * brightest / (brightest + level[0])
    return made


def _brightness(image: Pixels, level: float, rng: np.random.Generator, unit: float) -> Pixels:
    value = image.max(axis=2, keepdims=True)
    # Hue and saturation of the HSV model stay, so the channels grow alike; black has no hue and becomes grey.
    brighter = (value + level).clip(0, 1)
    made: Pixels = np.where(value > 0, image * brighter / np.maximum(value, 1e-6), brighter).astype(np.float32)
    return made


# Digital.


def _contrast(image: Pixels, level: float, rng: np.random.Generator, unit: float) -> Pixels:
    mean = image.mean(axis=(0, 1), keepdims=True)
    made: Pixels = (image - mean) * level + mean
    return made


def _elastic_transform(
    image: Pixels, level: tuple[float, float, float], rng: np.random.Generator, unit: float
) -> Pixels:
    height, width = image.shape[:2]
    short = min(height, width)
    amount, softness, jitter = (share * short for share in level)
    middle, third = np.array([height / 2, width / 2]), short / 3
    corners = middle + np.array([[third, third], [third, -third], [-third, -third]])
    moved = corners + rng.uniform(-jitter, jitter, corners.shape)
    # The affine map, two by three, that takes each moved corner back.
    affine = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners).T
    rows, columns = np.indices((height, width))
    places = np.tensordot(affine, np.stack([rows, columns, np.ones_like(rows)]), axes=1)
    for axis in range(2):
        noise = rng.uniform(-1, 1, (height, width))
        places[axis] += amount * gaussian_filter(noise, softness, mode="reflect", truncate=3)
    channels = [map_coordinates(image[..., one], places, order=1, mode="reflect") for one in range(3)]
    return np.stack(channels, axis=2)


def _pillow(image: Pixels) -> Image.Image:
    return Image.fromarray((image * 255).round().astype(np.uint8))


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image, dtype=np.float32) / 255


def _reduced(image: Pixels, factor: float, down: Image.Resampling, up: Image.Resampling) -> Pixels:
    whole = _pillow(image)
    small = whole.resize((max(1, round(whole.width * factor)), max(1, round(whole.height * factor))), down)
    return _pixels(small.resize(whole.size, up))


def _pixelate(image: Pixels, level: float, rng: np.random.Generator, unit: float) -> Pixels:
    return _reduced(image, level, Image.Resampling.BOX, Image.Resampling.NEAREST)


def _jpeg(image: Pixels, level: int, rng: np.random.Generator, unit: float) -> Pixels:
    buffer = io.BytesIO()
    _pillow(image).save(buffer, format="JPEG", quality=level)
    return _pixels(Image.fromarray(decoded(buffer.getvalue()).permute(1, 2, 0).numpy()))


def _resolution(image: Pixels, level: float, rng: np.random.Generator, unit: float) -> Pixels:
    return _reduced(image, level, Image.Resampling.BICUBIC, Image.Resampling.BICUBIC)


# Changes that should leave a prediction as it is.


def _flip(image: Pixels, level: str, rng: np.random.Generator, unit: float) -> Pixels:
    return image[:, ::-1]


def _shift(image: Pixels, level: int, rng: np.random.Generator, unit: float) -> Pixels:
    pixels = max(1, round(level * unit))
    moved = [int(step) for step in rng.choice([(0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1)])]
    rows, columns = (np.arange(side) - pixels * step for side, step in zip(image.shape, moved, strict=False))
    made: Pixels = image[rows.clip(0, len(rows) - 1)][:, columns.clip(0, len(columns) - 1)]
    return made


_CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg,
    "jpeg": _jpeg,
    "resolution": _resolution,
    "flip": _flip,
    "shift": _shift,
}

LEVELS: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation
    "shot_noise": (60, 25, 12, 5, 3),  # photons of white
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),  # share of the values
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),  # radius and softness of the disk
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),  # softness, reach, rounds
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),  # length, standard deviation
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),  # last factor and step
    # Mean and deviation of the flakes' noise, size, least strength, length, softness; how much of the image stays.
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),  # weights of image and ice
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),  # strength, fall from octave to octave
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to the value of the HSV model
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # factor
    # As shares of the shorter side: strength and softness of the displacements, jitter of the corners.
    "elastic_transform": ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # factor of the sides
    "jpeg_compression": (25, 18, 15, 10, 7),  # quality
    "jpeg": (90, 70, 50, 30, 20, 10, 5),  # quality
    "resolution": (2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8),  # factor of the sides
    "flip": ("left to right",),
    "shift": (1, 2, 4, 8, 16),  # px to the next or diagonal side
}
"""Levels of each corruption; severity 1 is the first."""
