"""Marks of use on the generated wares: fading, stains and scratches, which belong to the object and move with it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from datamodules.wares_random import stream
from datamodules.wares_surface import Plane, Pose, patches

_MARKS = 96
_REACH = 1.25


@lru_cache(maxsize=16)
def marks_of_use(seed: int, amount: float) -> Image.Image:
    """Fading, stains and scratches of one object, drawn once and seen in all its views.

    Args:
        seed: the object's own.
        amount: 0 for new, about 0.4 for used, 1 for worn.

    Returns:
        RGB picture of 96×96 over the ware's [-1.25, 1.25] square: fading, stains, scratches (128 = none).
    """
    rng = stream(seed, 1)
    # Fading begins in patches and ends all over.
    fading = np.clip((patches(rng.random((5, 5)), _MARKS, _MARKS) - (1.05 - 0.75 * amount)) * 2, 0.5 * amount - 0.2, 1)
    blotches = 0.7 * patches(rng.random((8, 8)), _MARKS, _MARKS) + 0.3 * patches(rng.random((20, 20)), _MARKS, _MARKS)
    stains = np.clip((blotches - (0.92 - 0.36 * amount)) * 6, 0, 1)
    lines = Image.new("L", (_MARKS * 2, _MARKS * 2), 128)
    pen = ImageDraw.Draw(lines)
    for _ in range(int(amount * (26 + 18 * rng.random()))):
        x, y, dx, dy, tone = rng.random(5)
        start = (int(x * 2 * _MARKS), int(y * 2 * _MARKS))
        stop = (start[0] + int((dx - 0.5) * 70), start[1] + int((dy - 0.5) * 70))
        pen.line([start, stop], fill=250 if tone < 0.6 else 20, width=2 + int(tone * 7) % 2)
    planes = [Image.fromarray((plane.clip(0, 1) * 255).astype(np.uint8)) for plane in (fading, stains)]
    return Image.merge("RGB", [*planes, lines.reduce(2)])


def placed_marks(marks: Image.Image, pose: Pose, resolution: int) -> Plane:
    """The marks where they fall in the picture, ``(3, H, W)`` in [0, 1]."""
    a, b, c, d = pose.inverse
    per_unit = _MARKS / (2 * _REACH)
    x0, y0 = (float(v) for v in pose.centre)
    matrix = (
        a * per_unit,
        b * per_unit,
        (_REACH - a * x0 - b * y0) * per_unit,
        c * per_unit,
        d * per_unit,
        (_REACH - c * x0 - d * y0) * per_unit,
    )
    placed = marks.transform(
        (resolution, resolution), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(0, 0, 128)
    )
    return np.asarray(placed).transpose(2, 0, 1).astype(np.float32, order="C") * np.float32(1 / 255)


def marred(colour: Plane, marks: Plane, material: str) -> Plane:
    """A colour ``(3, 1, 1)`` under the marks of use ``(3, h, w)``: ``(3, h, w)``."""
    fading, stains = marks[0] * np.float32(0.65), marks[1] * np.float32(0.8)
    dull = colour[1] * np.float32(0.4) + np.float32(0.42)
    dirt = np.array([0.45, 0.24, 0.1] if material == "metal" else [0.3, 0.24, 0.17], dtype=np.float32)
    clean = 1 - stains
    result = colour * ((1 - fading) * clean) + dirt[:, None, None] * stains
    result += dull * fading * clean + (marks[2] - np.float32(128 / 255)) * np.float32(0.85)
    marked: Plane = result.clip(0, 1)
    return marked
