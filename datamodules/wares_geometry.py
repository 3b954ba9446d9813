"""Outlines from which the generated product pictures are put together.

A ware is a stack of parts, each a closed polygon in the ware's own units: x to the right, y down, the whole
ware within about [-1, 1] in both. Angles are rounded before use, so that the last bit of a platform's sine does
not reach a picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
"""``(K, 2)``, x and y."""

Role = Literal["body", "accent", "trim", "inside", "pale", "dark", "seam", "stitch", "bloom", "lit", "glow"]
"""What a part is made of: the ware's own colour and material (body), or a fixed finish."""


Form = Sequence[float]
"""Eight numbers in [0, 1] that belong to the object: proportions and trim."""


@dataclass(frozen=True)
class Aspect:
    """How a ware is looked at.

    Attributes:
        tilt: height over width of its horizontal circles, about 0.1 to 0.4.
        turn: how far it is turned about its upright axis, in [-1, 1].
        moment: what changes from picture to picture, in [0, 1]: hands of a watch, flowers in a vase.
    """

    tilt: float
    turn: float
    moment: float


@dataclass(frozen=True)
class Part:
    """One piece of a ware.

    Attributes:
        outline: ``(K, 2)``, closed, in ware units.
        role: which finish the piece has.
        relief: how round it looks, 0 (a flat sheet) to 1 (a cushion).
        profile: for a turned piece ``(K, 2)`` of height y (rising) and radius there; its roundness is exact then.
        strength: opacity in [0, 1].
        more: further outlines that are painted together with the first.
    """

    outline: Points
    role: Role = "body"
    relief: float = 0.0
    profile: Points | None = None
    strength: float = 1.0
    more: tuple[Points, ...] = ()


@lru_cache(maxsize=256)
def circle_points(start: float, stop: float, count: int) -> Points:
    """Points of the unit circle, ``(count, 2)``, from one angle to another, in radians; not to be written to."""
    angles = np.linspace(start, stop, count)
    points = np.round(np.stack([np.cos(angles), np.sin(angles)], axis=1), 9)
    points.setflags(write=False)
    return points


def ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    """An ellipse around (x, y), ``(28, 2)``."""
    return circle_points(0.0, 2 * math.pi, 28) * (rx, ry) + (x, y)


def smooth(points: Sequence[tuple[float, float]] | Points, closed: bool = True, steps: int = 6) -> Points:
    """A Catmull-Rom curve through the points.

    Returns:
        ``(steps * K, 2)`` when closed, ``(steps * (K - 1) + 1, 2)`` when open.
    """
    p1 = np.asarray(points, dtype=np.float64)
    if closed:
        p0, p2, p3 = np.roll(p1, 1, axis=0), np.roll(p1, -1, axis=0), np.roll(p1, -2, axis=0)
    else:
        padded = np.concatenate([2 * p1[:1] - p1[1:2], p1, 2 * p1[-1:] - p1[-2:-1]])
        p0, p1, p2, p3 = padded[:-3], padded[1:-2], padded[2:-1], padded[3:]
    t = (np.arange(steps) / steps)[None, :, None]
    a, b, c, d = (p[:, None, :] for p in (p0, p1, p2, p3))
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t * t + (3 * b - a - 3 * c + d) * t * t * t)
    flat: Points = curve.reshape(-1, 2)
    return flat if closed else np.concatenate([flat, np.asarray(points, dtype=np.float64)[-1:]])


def rounded_box(x0: float, y0: float, x1: float, y1: float, radius: float) -> Points:
    """A rectangle with round corners, ``(28, 2)``."""
    corners = [(x1, y1, 0.0), (x0, y1, 0.5), (x0, y0, 1.0), (x1, y0, 1.5)]
    arcs = []
    for cx, cy, turn in corners:
        centre = (cx - radius if cx == x1 else cx + radius, cy - radius if cy == y1 else cy + radius)
        arcs.append(circle_points(turn * math.pi, (turn + 0.5) * math.pi, 7) * radius + centre)
    return np.concatenate(arcs)


def ribbon(path: Sequence[tuple[float, float]] | Points, width: float | tuple[float, float]) -> Points:
    """The outline of a thick line, for handles, straps and seams.

    Args:
        path: ``(K, 2)``, the middle line.
        width: of the line, or one width for each of its ends.

    Returns:
        ``(2 K, 2)``.
    """
    middle = np.asarray(path, dtype=np.float64)
    padded = np.concatenate([middle[:1], middle, middle[-1:]])
    along = padded[2:] - padded[:-2]
    length = np.sqrt(along[:, :1] * along[:, :1] + along[:, 1:] * along[:, 1:])
    first, last = (width, width) if isinstance(width, float | int) else width
    half = first + (last - first) * np.arange(len(middle))[:, None] / (len(middle) - 1)
    across = along[:, ::-1] * (-1.0, 1.0) * (0.5 * half / np.maximum(length, 1e-9))
    return np.concatenate([middle + across, (middle - across)[::-1]])


def inset(outline: Points, share: float) -> Points:
    """The outline drawn towards its middle; 0.1 takes a tenth off."""
    centre = 0.5 * (outline.min(axis=0) + outline.max(axis=0))
    smaller: Points = centre + (outline - centre) * (1.0 - share)
    return smaller


def turned(
    profile: Sequence[tuple[float, float]] | Points, tilt: float, role: Role = "body", strength: float = 1.0
) -> Part:
    """A piece from the lathe, seen from slightly above.

    Args:
        profile: heights (top first) and radii.
        tilt: height of a horizontal circle over its width: 0 at eye level, 1 from straight above.
        role: finish.
        strength: opacity.
    """
    line = np.asarray(profile, dtype=np.float64)
    heights, radii = line[:, 0], line[:, 1]
    right = np.stack([radii, heights], axis=1)
    bottom = circle_points(0.0, math.pi, 15) * (radii[-1], radii[-1] * tilt) + (0.0, heights[-1])
    left = np.stack([-radii[::-1], heights[::-1]], axis=1)
    top = circle_points(math.pi, 2 * math.pi, 15) * (radii[0], radii[0] * tilt) + (0.0, heights[0])
    return Part(np.concatenate([right, bottom, left, top]), role, profile=line, strength=strength)


def band(profile: Points, top: float, bottom: float, tilt: float, role: Role) -> Part:
    """A stripe or label around a turned piece, between two heights; slightly outside, so that it covers the edge."""
    levels = np.linspace(top, bottom, 6)
    radii = np.interp(levels, profile[:, 0], profile[:, 1])
    front = circle_points(0.0, math.pi, 15)
    lower = front * (radii[-1], radii[-1] * tilt) + (0.0, bottom)
    upper = front[::-1] * (radii[0], radii[0] * tilt) + (0.0, top)
    left = np.stack([-radii[::-1], levels[::-1]], axis=1)
    right = np.stack([radii, levels], axis=1)
    return Part(np.concatenate([lower, left, upper, right]), role, profile=profile)
