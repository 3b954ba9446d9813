"""Where the generated wares stand: backgrounds, things around and in front of them, and the camera."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from datamodules.wares_geometry import ribbon, rounded_box, smooth
from datamodules.wares_random import Random, between, noise_bytes, pick
from datamodules.wares_surface import Plane, patches, polygon_mask

_WALLS = [(0.9, 0.88, 0.84), (0.72, 0.78, 0.82), (0.82, 0.74, 0.66), (0.55, 0.6, 0.56), (0.35, 0.37, 0.42)]
_WALLS += [(0.93, 0.93, 0.94), (0.78, 0.66, 0.62), (0.62, 0.68, 0.78), (0.48, 0.42, 0.38), (0.86, 0.84, 0.7)]
_WOODS = [(0.62, 0.44, 0.28), (0.78, 0.62, 0.43), (0.38, 0.26, 0.18), (0.7, 0.68, 0.64), (0.52, 0.33, 0.22)]
_THINGS = [(0.75, 0.2, 0.18), (0.15, 0.35, 0.65), (0.2, 0.5, 0.3), (0.9, 0.75, 0.2), (0.3, 0.3, 0.32)]
_THINGS += [(0.85, 0.85, 0.82), (0.5, 0.33, 0.2), (0.6, 0.45, 0.65), (0.9, 0.5, 0.25), (0.1, 0.12, 0.14)]


def _tone(rng: Random, choices: list[tuple[float, float, float]]) -> Plane:
    """One of the colours, a little lighter or darker, ``(3, 1, 1)``."""
    base = np.array(choices[pick(rng, len(choices))], dtype=np.float32)[:, None, None]
    tone: Plane = np.clip(base * np.float32(between(rng, 0.8, 1.15)), 0, 1)
    return tone


def _studio(rng: Random, resolution: int) -> Plane:
    """A plain sweep of paper, lighter in the middle."""
    colour = _tone(rng, _WALLS)
    top, bottom = between(rng, 0.85, 1.1), between(rng, 0.75, 1.05)
    glow = patches(0.4 + 0.6 * rng.random((3, 3)), resolution, resolution)
    ramp = np.linspace(top, bottom, resolution, dtype=np.float32)[:, None]
    return colour * (ramp * (0.85 + np.float32(0.22) * glow))


def _grained(rng: Random, height: int, width: int, colour: Plane) -> Plane:
    """Wood: fine lines along the width."""
    fine = patches(rng.random((max(height // 2, 2), 3)), height, width)
    broad = patches(rng.random((7, 4)), height, width)
    wood: Plane = colour * (0.78 + np.float32(0.22) * fine + np.float32(0.2) * broad)
    return wood


def _table(rng: Random, resolution: int) -> Plane:
    """A wall and a table before it."""
    horizon = int(resolution * between(rng, 0.45, 0.75))
    shadow = patches(rng.random((4, 4)), resolution, resolution)
    scene: Plane = _tone(rng, _WALLS) * (0.75 + np.float32(0.35) * shadow)
    scene[:, horizon:] = _grained(rng, resolution - horizon, resolution, _tone(rng, _WOODS))
    scene[:, horizon : horizon + max(resolution // 64, 1)] *= np.float32(0.75)
    return scene


def _planks(rng: Random, resolution: int) -> Plane:
    """Boards seen from above, along or across."""
    scene = _grained(rng, resolution, resolution, _tone(rng, _WOODS))
    boards = 3 + pick(rng, 4)
    edges = np.linspace(0, resolution, boards + 1).astype(int)
    for start, stop in itertools.pairwise(edges):
        scene[:, start:stop] *= np.float32(between(rng, 0.82, 1.12))
        scene[:, start : start + max(resolution // 80, 1)] *= np.float32(0.55)
    return scene if rng.random() < 0.5 else np.ascontiguousarray(scene.transpose(0, 2, 1))


def _cloth(rng: Random, resolution: int) -> Plane:
    """A checked or striped cloth, lying askew."""
    first, second = _tone(rng, _WALLS), _tone(rng, _THINGS) * np.float32(0.5) + np.float32(0.4)
    size, lean = between(rng, 0.12, 0.3) * resolution, between(rng, -0.5, 0.5)
    axis = np.arange(resolution, dtype=np.float32)
    along = (axis[None, :] + np.float32(lean) * axis[:, None]) / np.float32(size) % 1
    across = (axis[:, None] - np.float32(lean) * axis[None, :]) / np.float32(size) % 1
    stripes = (along < 0.5).astype(np.float32)
    share = stripes if rng.random() < 0.4 else 0.5 * stripes + 0.5 * (across < 0.5)
    folds = patches(rng.random((5, 5)), resolution, resolution)
    lit = 0.78 + np.float32(0.32) * folds
    cloth: Plane = first * lit + (second - first) * (share * lit)
    return cloth


def _room(rng: Random, resolution: int) -> Plane:
    """A room far out of focus."""
    base = _tone(rng, _WALLS)
    planes = [patches(rng.random((6, 6)), resolution, resolution) for _ in range(3)]
    light = patches(rng.random((4, 4)), resolution, resolution)
    mixed = base * np.float32(0.75) + np.stack(planes) * np.float32(0.25)
    room: Plane = mixed * (np.float32(0.6) + np.float32(0.55) * light)
    return room


_BACKGROUNDS = [_studio, _studio, _table, _table, _planks, _cloth, _room]


def background(rng: Random, resolution: int) -> Plane:
    """What is behind the ware, things standing around included, ``(3, H, W)``."""
    scene = _BACKGROUNDS[pick(rng, len(_BACKGROUNDS))](rng, resolution)
    things = int(rng.random() * rng.random() * 6)
    if things == 0:
        return scene
    picture = Image.fromarray((scene.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0).copy())
    pen = ImageDraw.Draw(picture)
    for _ in range(things):
        x, y = between(rng, -0.05, 1.05) * resolution, between(rng, 0.1, 0.95) * resolution
        w, h = between(rng, 0.05, 0.2) * resolution, between(rng, 0.08, 0.4) * resolution
        colour = tuple(int(v) for v in _tone(rng, _THINGS).ravel() * 255)
        dark = tuple(int(v * 0.7) for v in colour)
        if rng.random() < 0.6:
            pen.rectangle([x - w, y - h, x + w, y + h], fill=colour)
            pen.rectangle([x + w * 0.4, y - h, x + w, y + h], fill=dark)
        else:
            pen.ellipse([x - w, y - w, x + w, y + w], fill=colour)
    picture = picture.filter(ImageFilter.BoxBlur(resolution * between(rng, 0.01, 0.04)))
    return np.asarray(picture).transpose(2, 0, 1).astype(np.float32, order="C") * np.float32(1 / 255)


def occluder(rng: Random, resolution: int) -> tuple[Plane, Plane]:
    """Something in front of the ware: a leaf, a strap, a card or a fingertip, coming in from an edge.

    Returns:
        Colour ``(3, H, W)`` and coverage ``(H, W)``.
    """
    kind = pick(rng, 4)
    around = between(rng, 0, 2 * math.pi)
    cos, sin = round(math.cos(around), 9), round(math.sin(around), 9)
    if kind == 0:
        leaf = smooth([(0, -0.6), (0.13, -0.2), (0.1, 0.25), (0, 0.55), (-0.1, 0.25), (-0.13, -0.2)])
        shape, colour = leaf * between(rng, 0.55, 0.9), _tone(rng, [(0.2, 0.45, 0.2), (0.35, 0.5, 0.2)])
    elif kind == 1:
        shape = ribbon(smooth([(-1.2, -0.1), (-0.3, 0.08), (0.4, -0.06), (1.2, 0.1)], closed=False), 0.13)
        colour = _tone(rng, _THINGS)
    elif kind == 2:
        shape, colour = rounded_box(-0.26, -0.2, 0.26, 0.2, 0.03), _tone(rng, _WALLS + _THINGS)
    else:
        shape = smooth([(-0.2, 1.4), (-0.17, 0.0), (-0.08, -0.17), (0.08, -0.17), (0.17, 0.0), (0.2, 1.4)])
        colour = _tone(rng, [(0.87, 0.66, 0.53), (0.5, 0.34, 0.25)])
    distance = between(rng, 0.3, 0.5) if kind != 1 else between(rng, 0.12, 0.35)
    turned = shape @ np.array([[cos, sin], [-sin, cos]])
    away = np.array([-sin, cos]) * distance
    placed = (turned + away + 0.5) * resolution
    cover = np.zeros((resolution, resolution), dtype=np.float32)
    found = polygon_mask([placed], resolution)
    if found is not None:
        cover[found[1].slices] = found[0]
    light = patches(rng.random((3, 3)), resolution, resolution)
    return colour * (np.float32(0.75) + np.float32(0.4) * light), cover


def _soft(scene: Plane, share: float) -> Plane:
    """A little out of focus: each pixel gives up to a quarter of itself to each neighbour along both axes."""
    step = max(scene.shape[1] // 96, 1)
    for _ in range(2):
        # Along the columns, then along the rows by way of the transposed view; what lacks a neighbour keeps its share.
        mixed = scene * np.float32(1 - 2 * share)
        mixed[:, step:] += np.float32(share) * scene[:, :-step]
        mixed[:, :-step] += np.float32(share) * scene[:, step:]
        mixed[:, :step] += np.float32(share) * scene[:, :step]
        mixed[:, -step:] += np.float32(share) * scene[:, -step:]
        scene = mixed.transpose(0, 2, 1)
    return scene


def photographed(rng: Random, scene: Plane) -> npt.NDArray[np.uint8]:
    """The camera: exposure, colour cast, darker corners, a little blur, noise; 8 bits.

    Args:
        rng: the view's own.
        scene: ``(3, H, W)``.

    Returns:
        uint8 ``(H, W, 3)``.
    """
    resolution = scene.shape[1]
    cast = np.array([between(rng, 0.87, 1.13), between(rng, 0.94, 1.06), between(rng, 0.85, 1.13)], dtype=np.float32)
    exposure = np.float32(between(rng, 0.72, 1.18))
    lift = np.float32(between(rng, 0.0, 0.06))
    axis = np.linspace(-1, 1, resolution, dtype=np.float32)
    axis *= axis
    corners = 1 - np.float32(between(rng, 0.0, 0.1)) * (axis[:, None] + axis)
    scene = scene * (corners * (cast * exposure)[:, None, None])
    # Highlights roll off instead of being cut.
    over = np.maximum(scene - np.float32(0.85), 0)
    scene -= over
    scene += over / (1 + 3 * over)
    scene *= 1 - lift
    scene += lift
    blur = between(rng, -0.15, 0.25)
    if blur > 0:
        scene = _soft(scene, blur)
    amount = between(rng, 0.01, 0.05)
    noise = noise_bytes(rng, scene.size).reshape(scene.shape).astype(np.float32)
    noise *= np.float32(amount)
    noise += scene * np.float32(255)
    noise += np.float32(0.5 - 127.5 * amount)
    picture = noise.clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(picture.transpose(1, 2, 0))
