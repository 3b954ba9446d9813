"""Renders one generated ware: a function of the object (``WareSpec``) and of a number that stands for the view.

The shading is Blinn's ("Models of light reflection for computer synthesized images", SIGGRAPH 1977). Images are equal
on every platform: they are built with additions, multiplications, divisions and square roots, which are rounded alike
everywhere, and of NumPy's generators only ``random()`` and the raw words of PCG64 are used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from datamodules.wares import outlines
from datamodules.wares.outlines import Aspect, Part, Points, Role, ribbon, rounded_box, smooth

Plane = npt.NDArray[np.float32]
"""``(H, W)``, or ``(3, H, W)`` where it is coloured; mostly 0 to 1."""

Random = np.random.Generator
Colour = tuple[float, float, float]
"""RGB in [0, 1]."""

_SURROUNDING = [0.1, 0.4, 1.05, 0.6, 0.12, 0.45, 0.9, 0.25, 0.15, 0.75, 1.15, 0.45, 0.1]
_CHROME = np.interp(np.linspace(-1, 1, 129), np.linspace(-1, 1, 13), _SURROUNDING).astype(np.float32)


@dataclass(frozen=True)
class Pose:
    """Placement of a ware in the image: pixel = ``matrix`` · point + ``centre``."""

    matrix: Points
    centre: Points

    def to_image(self, points: Points) -> Points:
        """Map ware units to pixels, ``(K, 2)`` to ``(K, 2)``."""
        placed: Points = (
            points[:, :1] * self.matrix[:, 0][None] + points[:, 1:] * self.matrix[:, 1][None] + self.centre[None]
        )
        return placed

    @property
    def inverse(self) -> tuple[float, float, float, float]:
        """Matrix from pixels relative to the centre to ware units, row by row."""
        (a, b), (c, d) = self.matrix
        determinant = a * d - b * c
        return float(d / determinant), float(-b / determinant), float(-c / determinant), float(a / determinant)

    def to_ware(self, box: Box) -> tuple[Plane, Plane]:
        """Return ware coordinates x and y of each pixel in a box, two ``(h, w)``."""
        a, b, c, d = self.inverse
        x = np.arange(box.left, box.right, dtype=np.float32)[None, :] + np.float32(0.5 - self.centre[0])
        y = np.arange(box.top, box.bottom, dtype=np.float32)[:, None] + np.float32(0.5 - self.centre[1])
        return np.float32(a) * x + np.float32(b) * y, np.float32(c) * x + np.float32(d) * y


class Box(NamedTuple):
    """A part of the image in pixels, right and bottom excluded."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


@dataclass(frozen=True)
class Light:
    """A lamp in a direction (x to the right, y down, z to the viewer, length 1), and the ambient light of the room."""

    direction: tuple[float, float, float]
    ambient: float
    power: float


def polygon_mask(polygons: Sequence[Points], resolution: int) -> tuple[Plane, Box] | None:
    """Return the anti-aliased coverage of polygons ``(K, 2)`` in pixels, and its box; None outside the image."""
    fine = 3 if resolution <= 128 else 2
    points = polygons[0] if len(polygons) == 1 else np.concatenate(polygons)
    (x0, y0), (x1, y1) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    left, top = max(math.floor(x0) - 1, 0), max(math.floor(y0) - 1, 0)
    box = Box(left, top, min(math.ceil(x1) + 1, resolution), min(math.ceil(y1) + 1, resolution))
    size = (box.right - box.left, box.bottom - box.top)
    if min(size) <= 0:
        return None
    canvas = Image.new("L", (size[0] * fine, size[1] * fine))
    pen = ImageDraw.Draw(canvas)
    for polygon in polygons:
        # Whole numbers, so that no platform's last bit moves an edge.
        pen.polygon(((polygon - (left, top)) * fine).round().ravel().tolist(), fill=255)
    return np.asarray(canvas.reduce(fine), dtype=np.float32) / np.float32(255), box


def blurred(plane: Plane, radius: float) -> Plane:
    """Blur a plane ``(H, W)`` in [0, 1]; the radius is in pixels."""
    image = Image.fromarray((plane * np.float32(255)).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(image, dtype=np.float32) * np.float32(1 / 255)


def patches(values: npt.NDArray[np.float64], height: int, width: int) -> Plane:
    """Return smooth noise: a small array of numbers in [0, 1] enlarged to ``(height, width)``."""
    small = Image.fromarray((values * 255).astype(np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / np.float32(255)


_LADDER = np.linspace(0, 1, 160)
_FLAT = np.array([0, 0, 1], dtype=np.float32)[:, None, None]


def normals(part: Part, mask: Plane, place: tuple[Plane, Plane], pose: Pose) -> Plane:
    """Return the normals ``(3, h, w)`` of a part with coverage ``(h, w)``; ``(3, 1, 1)`` where it is flat.

    They have length 1: x to the right, y down, z to the viewer. ``place`` are ware coordinates x and y of each pixel.
    """
    if part.profile is not None:
        x, y = place
        heights, radii = part.profile[:, 0], part.profile[:, 1]
        slope = (radii[1:] - radii[:-1]) / np.maximum(heights[1:] - heights[:-1], 1e-3)
        # Profile and slope on a fine ladder of heights, looked up for all pixels at once.
        ladder = heights[0] + (heights[-1] - heights[0]) * _LADDER
        step = (np.float32(159 / (heights[-1] - heights[0])) * (y - np.float32(heights[0]))).astype(np.int32)
        rung = step.clip(0, 159)
        radius = np.interp(ladder, heights, radii).astype(np.float32)[rung]
        side = (x / radius).clip(-0.98, 0.98)
        lean = np.interp(ladder, heights[:-1], (-slope).clip(-1.2, 1.2)).astype(np.float32)[rung]
        lengths = np.sqrt((pose.matrix * pose.matrix).sum(axis=0))
        across, up = (pose.matrix / lengths).astype(np.float32).T
        nx, ny = across[0] * side + up[0] * lean, across[1] * side + up[1] * lean
        nz = np.sqrt(1 - side * side)
    elif part.relief == 0:
        return _FLAT
    else:
        radius_px = max(0.13 * min(mask.shape), 0.8)
        padded = np.pad(mask, 1)
        soft = blurred(padded, radius_px)
        bulge = np.float32(part.relief * radius_px * 2.6)
        nx = (soft[1:-1, :-2] - soft[1:-1, 2:]) * 0.5 * bulge
        ny = (soft[:-2, 1:-1] - soft[2:, 1:-1]) * 0.5 * bulge
        nz = np.ones_like(nx)
    faced = np.empty((3, *mask.shape), dtype=np.float32)
    inverse = 1 / np.sqrt(nx * nx + ny * ny + nz * nz)
    for plane, component in zip(faced, (nx, ny, nz), strict=True):
        np.multiply(component, inverse, out=plane)
    return faced


def _power(values: Plane, doublings: int) -> Plane:
    for _ in range(doublings):
        values = values * values
    return values


@dataclass(frozen=True)
class Finish:
    """Surface of a part after the marks of use.

    Attributes:
        material: plastic, metal, glass, fabric, leather or matte (paper, shadow, thread).
        albedo: ``(3, h, w)`` or ``(3, 1, 1)``, its colour without light.
        gloss: 1 for new, less for worn.
        grain: 0 to 1, size of weave or mottling.
    """

    material: str
    albedo: Plane
    gloss: float
    grain: float


def shade(finish: Finish, normal: Plane, light: Light, place: tuple[Plane, Plane], behind: Plane) -> Plane:
    """Return the colour of a part with some normals, over 1 in highlights; glass shows what is behind it."""
    x, y, z = light.direction
    # How much of the lamp falls on each point, and how near its mirror image is, both (h, w) in [0, 1].
    diffuse = np.maximum(normal[0] * x + normal[1] * y + normal[2] * z, 0).astype(np.float32)
    halfway = (x * x + y * y + (z + 1) * (z + 1)) ** 0.5
    mirror = np.maximum((normal[0] * x + normal[1] * y + normal[2] * (z + 1)) / halfway, 0).astype(np.float32)
    level = light.ambient + light.power * diffuse
    if finish.material == "metal":
        return _metal(finish, normal, mirror, light, place[1])
    if finish.material == "glass":
        return _glass(finish, normal, mirror, behind)
    if finish.material == "fabric":
        # Brighter towards the edges, where the fibres catch the light.
        soft = (light.ambient * 1.1 + light.power * 0.6 * diffuse) * (np.float32(1.4) - np.float32(0.4) * normal[2])
        woven: Plane = finish.albedo * (soft * _weave(place, finish.grain))
        return woven
    if finish.material == "matte":
        flat: Plane = finish.albedo * level
        return flat
    if finish.material == "leather":
        sheen = (0.35 * finish.gloss * light.power) * _power(mirror, 3)
        # Darker towards the edges, as worked leather is, with a coarse grain.
        burnished = level * (np.float32(0.3) + np.float32(0.65) * normal[2]) * _pebbles(place, finish.grain)
        leather: Plane = finish.albedo * burnished + sheen
        return leather
    bright = np.float32(0.95 * finish.gloss * light.power) * (_power(mirror, 4) + np.float32(0.3) * _power(mirror, 3))
    smooth: Plane = finish.albedo * level + bright
    return smooth


def _metal(finish: Finish, normal: Plane, mirror: Plane, light: Light, y: Plane) -> Plane:
    """Bright and dark bands of a painted surrounding, tinted, with a brushed grain."""
    across = 2 * normal[2] * normal[0] * 0.5 + 0.3 * light.direction[0] + 0.35 * normal[1]
    bands = _CHROME[(across * 64 + 64).clip(0, 128).astype(np.int32)]
    brushed = np.abs((y * (60 + 40 * finish.grain)) % 1 - 0.5) * 0.12 - 0.03
    sky = 0.25 * np.maximum(-normal[1], 0)
    surrounding = (light.ambient + light.power * 0.9) * (0.12 + 1.05 * bands + sky + brushed) * 0.85
    tint = finish.albedo * np.float32(0.75) + np.float32(0.2)
    polished: Plane = tint * surrounding + (0.9 * finish.gloss) * _power(mirror, 6)
    return polished


def _glass(finish: Finish, normal: Plane, mirror: Plane, behind: Plane) -> Plane:
    """The background bent and tinted, dark towards the edge, with sharp highlights."""
    height, width = behind.shape[1:]
    rows = np.arange(height)[:, None] - (normal[1] * 0.25 * height).astype(np.int32)
    columns = np.arange(width)[None, :] - (normal[0] * 0.35 * width).astype(np.int32)
    bent = behind[:, rows.clip(0, height - 1), columns.clip(0, width - 1)]
    edge = 1 - normal[2]
    tint = np.float32(0.42) + np.float32(0.62) * finish.albedo
    colour = bent * (tint * (1 - np.float32(0.7) * edge)) + np.float32(0.12) * finish.albedo
    window = np.clip(1 - np.abs(normal[0] + 0.45) * 9, 0, 1) + 0.5 * np.clip(1 - np.abs(normal[0] - 0.7) * 12, 0, 1)
    shine = _power(mirror, 6) * 1.1 + 0.55 * window + 0.35 * _power(edge, 2)
    clear: Plane = colour + finish.gloss * shine
    return clear


def _weave(place: tuple[Plane, Plane], grain: float) -> Plane:
    """Over and under of threads, around 1."""
    density = np.float32(5 + 4 * grain)
    a, b = (place[0] * density) % 1, (place[1] * density) % 1
    threads = np.where((a < 0.5) == (b < 0.5), np.float32(1.0), np.float32(-1.0))
    ridge = 1 - 2 * np.abs(a - 0.5) - np.abs(b - 0.5)
    woven: Plane = 1 + np.float32(0.22) * threads + np.float32(0.18) * ridge
    return woven


def _pebbles(place: tuple[Plane, Plane], grain: float) -> Plane:
    """The grain of leather, around 1: two slanting waves that do not meet."""
    density = np.float32(7 + 5 * grain)
    a = (place[0] + np.float32(0.43) * place[1]) * density % 1
    b = (place[1] - np.float32(0.31) * place[0]) * density % 1
    pebbled: Plane = np.float32(0.93) + np.float32(0.5) * (a - a * a) * (b - b * b) * 4
    return pebbled


def stream(*numbers: int) -> Random:
    """Return a generator that depends on the numbers (each 0 or more) only, in every process and on every platform."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers)))


def pick(rng: Random, count: int) -> int:
    """Return a whole number in [0, count)."""
    return min(int(rng.random() * count), count - 1)


def between(rng: Random, low: float, high: float) -> float:
    """Return a number in [low, high)."""
    return low + (high - low) * float(rng.random())


_WALLS = [(0.9, 0.88, 0.84), (0.72, 0.78, 0.82), (0.82, 0.74, 0.66), (0.55, 0.6, 0.56), (0.35, 0.37, 0.42)]
_WALLS += [(0.93, 0.93, 0.94), (0.78, 0.66, 0.62), (0.62, 0.68, 0.78), (0.48, 0.42, 0.38), (0.86, 0.84, 0.7)]
_WOODS = [(0.62, 0.44, 0.28), (0.78, 0.62, 0.43), (0.38, 0.26, 0.18), (0.7, 0.68, 0.64), (0.52, 0.33, 0.22)]
_THINGS = [(0.75, 0.2, 0.18), (0.15, 0.35, 0.65), (0.2, 0.5, 0.3), (0.9, 0.75, 0.2), (0.3, 0.3, 0.32)]
_THINGS += [(0.85, 0.85, 0.82), (0.5, 0.33, 0.2), (0.6, 0.45, 0.65), (0.9, 0.5, 0.25), (0.1, 0.12, 0.14)]


def _tone(rng: Random, choices: list[Colour]) -> Plane:
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
    """Draw what is behind the ware, things standing around included, ``(3, H, W)``."""
    scene = _BACKGROUNDS[pick(rng, len(_BACKGROUNDS))](rng, resolution)
    things = int(rng.random() * rng.random() * 6)
    if things == 0:
        return scene
    image = Image.fromarray((scene.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0).copy())
    pen = ImageDraw.Draw(image)
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
    image = image.filter(ImageFilter.BoxBlur(resolution * between(rng, 0.01, 0.04)))
    return np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C") * np.float32(1 / 255)


def occluder(rng: Random, resolution: int) -> tuple[Plane, Plane]:
    """Return colour ``(3, H, W)`` and coverage ``(H, W)`` of a leaf, strap, card or fingertip in front of the ware."""
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
    """Photograph a scene ``(3, H, W)``: exposure, colour cast, vignette, blur and noise; uint8 ``(H, W, 3)``."""
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
    words = rng.bit_generator.random_raw(scene.size // 8 + 1).astype("<u8")
    noise = words.view(np.uint8)[: scene.size].reshape(scene.shape).astype(np.float32)
    noise *= np.float32(amount)
    noise += scene * np.float32(255)
    noise += np.float32(0.5 - 127.5 * amount)
    image = noise.clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(image.transpose(1, 2, 0))


_MARKS = 96
_REACH = 1.25


@lru_cache(maxsize=16)
def marks_of_use(seed: int, amount: float) -> Image.Image:
    """Draw fading, stains and scratches (128 = none) of one object as the channels of an RGB image.

    The amount is 0 for new, about 0.4 for used, 1 for worn. The 96×96 pixels cover the ware's [-1.25, 1.25] square.
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
    """Place the marks in the image, ``(3, H, W)`` in [0, 1]."""
    a, b, c, d = pose.inverse
    x0, y0 = (float(v) for v in pose.centre)
    rows = (a, b, _REACH - a * x0 - b * y0, c, d, _REACH - c * x0 - d * y0)
    matrix = [value * (_MARKS / (2 * _REACH)) for value in rows]
    placed = marks.transform(
        (resolution, resolution), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(0, 0, 128)
    )
    return np.asarray(placed).transpose(2, 0, 1).astype(np.float32, order="C") * np.float32(1 / 255)


def marred(colour: Plane, marks: Plane, material: str) -> Plane:
    """Put marks of use ``(3, h, w)`` on a colour ``(3, 1, 1)``."""
    fading, stains = marks[0] * np.float32(0.65), marks[1] * np.float32(0.8)
    dull = colour[1] * np.float32(0.4) + np.float32(0.42)
    dirt = np.array([0.45, 0.24, 0.1] if material == "metal" else [0.3, 0.24, 0.17], dtype=np.float32)
    clean = 1 - stains
    result = colour * ((1 - fading) * clean) + dirt[:, None, None] * stains
    result += dull * fading * clean + (marks[2] - np.float32(128 / 255)) * np.float32(0.85)
    marked: Plane = result.clip(0, 1)
    return marked


COLOURS: dict[str, tuple[Colour, Colour]] = {
    "black": ((0.05, 0.05, 0.06), (0.17, 0.16, 0.17)),
    "blue": ((0.08, 0.2, 0.58), (0.25, 0.5, 0.82)),
    "brown": ((0.32, 0.18, 0.09), (0.56, 0.36, 0.2)),
    "gray": ((0.36, 0.37, 0.39), (0.6, 0.6, 0.6)),
    "green": ((0.06, 0.34, 0.18), (0.38, 0.6, 0.25)),
    "red": ((0.55, 0.04, 0.08), (0.85, 0.16, 0.13)),
    "white": ((0.86, 0.85, 0.82), (0.97, 0.97, 0.97)),
    "yellow": ((0.85, 0.62, 0.08), (0.97, 0.84, 0.25)),
}
"""Darkest and lightest of each colour; objects are in between."""

_HARD = ("glass", "metal", "plastic")
_SOFT = ("fabric", "leather", "plastic")
MATERIALS_OF: dict[str, tuple[str, ...]] = {
    "backpack": _SOFT,
    "bottle": _HARD,
    "cap": ("fabric", "leather"),
    "handbag": _SOFT,
    "lamp": ("fabric", *_HARD),
    "mug": _HARD,
    "sneaker": _SOFT,
    "soap dispenser": _HARD,
    "vase": _HARD,
    "watch": ("fabric", "leather", "metal", "plastic"),
}
"""Possible materials of each kind; its outline is the function of ``outlines`` with its name."""

KINDS = tuple(sorted(MATERIALS_OF))
MATERIALS = ("fabric", "glass", "leather", "metal", "plastic")
CONDITIONS = ("new", "used", "worn")

_WEAR = {"new": (0.0, 0.0), "used": (0.25, 0.45), "worn": (0.9, 1.3)}
_TAGGED = 0.6
_ACCENTS: list[Colour] = [(0.9, 0.88, 0.84), (0.12, 0.12, 0.13), (0.72, 0.58, 0.4), (0.35, 0.38, 0.42)]
_BLOOMS: list[Colour] = [(0.9, 0.45, 0.55), (0.95, 0.8, 0.35), (0.95, 0.93, 0.9), (0.6, 0.45, 0.75)]


@dataclass(frozen=True)
class WareSpec:
    """One physical object; the seed is that of proportions, exact tone and scratches."""

    kind: str
    colour: str
    material: str
    condition: str
    seed: int


def _pose(rng: Random, resolution: int) -> Pose:
    """Near the middle, upright or, one in eight, at any angle, as in images taken from above."""
    angle = between(rng, -0.25, 0.25) if rng.random() < 0.875 else between(rng, -math.pi, math.pi)
    cos, sin = round(math.cos(angle), 9), round(math.sin(angle), 9)
    scale = between(rng, 0.32, 0.47) * resolution
    narrow, shear = between(rng, 0.82, 1.05), between(rng, -0.1, 0.1)
    upright = np.array([[narrow, shear], [0.0, 1.0]]) * scale
    centre = np.array([between(rng, 0.42, 0.58), between(rng, 0.45, 0.56)]) * resolution
    return Pose(np.array([[cos, -sin], [sin, cos]]) @ upright, centre)


def _light(rng: Random) -> Light:
    """A lamp above, from anywhere between left and right."""
    x, y, z = between(rng, -0.8, 0.8), between(rng, -0.9, -0.2), between(rng, 0.5, 1.0)
    length = math.sqrt(x * x + y * y + z * z)
    return Light((x / length, y / length, z / length), between(rng, 0.36, 0.6), between(rng, 0.4, 0.75))


def _rgb(*values: float) -> Plane:
    return np.array(values, dtype=np.float32)[:, None, None]


def _finishes(spec: WareSpec, rng: Random) -> dict[Role, Finish]:
    """The surface of each role in one object, without marks."""
    low, high = (_rgb(*tone) for tone in COLOURS[spec.colour])
    tint = (rng.random((3, 1, 1)) - 0.5).astype(np.float32) * np.float32(0.05)
    body = (low + (high - low) * np.float32(rng.random()) + tint).clip(0, 1)
    accent = _rgb(*_ACCENTS[pick(rng, len(_ACCENTS))])
    bloom = _rgb(*_BLOOMS[pick(rng, len(_BLOOMS))])
    trim = _rgb(0.78, 0.78, 0.8) if rng.random() < 0.7 else _rgb(0.85, 0.68, 0.38)
    surfaces: dict[Role, tuple[str, Plane]] = {
        "body": (spec.material, body),
        "accent": ("fabric" if spec.material == "fabric" else "plastic", accent),
        "trim": ("metal", trim),
        "inside": ("glass" if spec.material == "glass" else "matte", body * np.float32(0.42)),
        "pale": ("plastic", _rgb(0.88, 0.88, 0.88)),
        "dark": ("matte", _rgb(0.1, 0.1, 0.1)),
        "seam": ("matte", body * np.float32(0.45)),
        "stitch": ("matte", body * np.float32(0.65) + np.float32(0.2)),
        "bloom": ("matte", bloom),
        "glow": ("matte", body * np.float32(1.35) + _rgb(0.22, 0.16, 0.06)),
        "lit": ("matte", _rgb(2.2, 2.0, 1.6)),
    }
    gloss, grain = {"new": 1.0, "used": 0.7, "worn": 0.25}[spec.condition], float(rng.random())
    return {role: Finish(material, albedo, gloss, grain) for role, (material, albedo) in surfaces.items()}


def _dashes(mask: Plane, place: tuple[Plane, Plane]) -> Plane:
    """Stitches: only the edge of the outline, in dashes."""
    inner = blurred(mask, 1.0)
    edge = np.clip(1 - np.abs(inner - 0.5) * 3.2, 0, 1)
    dashed: Plane = edge * (((place[0] + place[1]) * 9 % 1) < 0.6)
    return dashed


def draw_ware(spec: WareSpec, view_seed: int, resolution: int = 96) -> npt.NDArray[np.uint8]:
    """Draw an image of an object, uint8 ``(resolution, resolution, 3)``, RGB, at least 16 pixels wide.

    The view seed is that of pose, light, background, things in front and camera. Images are the same for the same
    arguments in every process.
    """
    own, rng = stream(spec.seed), stream(view_seed)
    form = [float(value) for value in own.random(8)]
    finishes = _finishes(spec, own)
    wear = between(own, *_WEAR[spec.condition])
    pose, light = _pose(rng, resolution), _light(rng)
    aspect = Aspect(between(rng, 0.08, 0.4), between(rng, -1, 1), float(rng.random()))
    scene = background(rng, resolution)
    parts: list[Part] = getattr(outlines, spec.kind.replace(" ", "_"))(form, aspect)
    if spec.condition == "new" and rng.random() < _TAGGED:
        parts += _price_tag(rng)
    scene = _with_shadow(scene, parts, pose, light, between(rng, 0.2, 0.55))
    marks = placed_marks(marks_of_use(spec.seed, wear), pose, resolution) if wear > 0 else None
    for part in parts:
        # Stitches are seen on fabric and leather only.
        if part.role != "stitch" or spec.material != "plastic":
            _paint(scene, part, finishes[part.role], pose, light, marks)
    if rng.random() < 0.25:
        colour, cover = occluder(rng, resolution)
        scene = scene * (1 - cover) + colour * cover
    return photographed(rng, scene)


def _paint(scene: Plane, part: Part, finish: Finish, pose: Pose, light: Light, marks: Plane | None) -> None:
    """Paint one part over the scene, in place."""
    found = polygon_mask([pose.to_image(outline) for outline in (part.outline, *part.more)], scene.shape[-1])
    if found is None:
        return
    mask, box = found
    behind, place = scene[:, *box.slices], pose.to_ware(box)
    # Small parts are too small for marks, and are painted in one tone.
    spotted = part.role in ("body", "accent", "pale") and (part.profile is not None or part.relief > 0)
    if marks is not None and spotted:
        finish = replace(finish, albedo=marred(finish.albedo, marks[:, *box.slices], finish.material))
    if part.role == "stitch":
        mask = _dashes(mask, place)
    colour = shade(finish, normals(part, mask, place, pose), light, place, behind)
    # `behind` is a view of the scene, and glass has already taken what it shows.
    behind += (colour - behind) * (mask * np.float32(part.strength))


def _price_tag(rng: Random) -> list[Part]:
    """A price tag on a thread."""
    x, y = between(rng, -0.45, 0.45), between(rng, -0.35, 0.35)
    lean = between(rng, -0.25, 0.25)
    thread = ribbon([(x, y - 0.3), (x + lean * 0.5, y)], 0.035)
    card = np.array([(-0.12, 0.1), (0.0, 0.0), (0.12, 0.1), (0.13, 0.48), (-0.13, 0.48)])
    card[:, 0] += lean * card[:, 1]
    place = np.array([x + lean * 0.5, y])
    lines = [[(lean * down - 0.07, down), (lean * down + 0.07, down)] for down in (0.2, 0.28, 0.36)]
    first, *rest = [ribbon(np.array(line) + place, 0.035) for line in lines]
    printed = Part(first, "dark", strength=0.7, more=tuple(rest))
    return [Part(thread, "dark", strength=0.6), Part(card + place, "pale"), printed]


def _with_shadow(scene: Plane, parts: list[Part], pose: Pose, light: Light, depth: float) -> Plane:
    """The scene with the soft shadow of the ware, away from the lamp."""
    resolution = scene.shape[-1]
    shift = np.array([-light.direction[0], 0.35 - 0.3 * light.direction[1]]) * (0.14 * resolution)
    half = Image.new("L", (resolution // 2, resolution // 2))
    pen = ImageDraw.Draw(half)
    for part in parts:
        if part.role == "body" or part.profile is not None:
            pen.polygon(((pose.to_image(part.outline) + shift) / 2).round().ravel().tolist(), fill=255)
    soft = half.filter(ImageFilter.GaussianBlur(resolution * 0.022)).resize((resolution, resolution))
    return scene * (1 - np.asarray(soft, dtype=np.float32) * np.float32(depth / 255))
