"""How the generated wares look: coverage, roundness, light and five materials.

All pictures are built with additions, multiplications, divisions and square roots only, which every platform rounds
alike. The shading is Blinn's ("Models of light reflection for computer synthesized pictures", SIGGRAPH 1977), with a
painted surrounding for metal and a bent background for glass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from datamodules.wares_geometry import Part, Points

Plane = npt.NDArray[np.float32]
"""``(H, W)``, or ``(3, H, W)`` where it is coloured; mostly 0 to 1."""

_SURROUNDING = [0.1, 0.4, 1.05, 0.6, 0.12, 0.45, 0.9, 0.25, 0.15, 0.75, 1.15, 0.45, 0.1]
_CHROME = np.interp(np.linspace(-1, 1, 129), np.linspace(-1, 1, 13), _SURROUNDING).astype(np.float32)


@dataclass(frozen=True)
class Pose:
    """Where a ware stands in the picture: pixel = ``matrix`` · point + ``centre``."""

    matrix: Points
    centre: Points

    def to_picture(self, points: Points) -> Points:
        """Ware units to pixels, ``(K, 2)`` to ``(K, 2)``."""
        placed: Points = (
            points[:, :1] * self.matrix[:, 0][None] + points[:, 1:] * self.matrix[:, 1][None] + self.centre[None]
        )
        return placed

    @property
    def inverse(self) -> tuple[float, float, float, float]:
        """The matrix that takes pixels, counted from the centre, to ware units, row by row."""
        (a, b), (c, d) = self.matrix
        determinant = a * d - b * c
        return float(d / determinant), float(-b / determinant), float(-c / determinant), float(a / determinant)

    def to_ware(self, box: Box) -> tuple[Plane, Plane]:
        """Ware coordinates x and y of each pixel in a box, two ``(h, w)``."""
        a, b, c, d = self.inverse
        x = np.arange(box.left, box.right, dtype=np.float32)[None, :] + np.float32(0.5 - self.centre[0])
        y = np.arange(box.top, box.bottom, dtype=np.float32)[:, None] + np.float32(0.5 - self.centre[1])
        return np.float32(a) * x + np.float32(b) * y, np.float32(c) * x + np.float32(d) * y


@dataclass(frozen=True)
class Box:
    """The part of the picture that is worked on, in pixels, right and bottom excluded."""

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
    """One lamp and the light of the room.

    Attributes:
        direction: towards the lamp, x to the right, y down, z to the viewer; length 1.
        ambient: light of the room, about 0.3 to 0.6.
        power: of the lamp, about 0.4 to 0.8.
    """

    direction: tuple[float, float, float]
    ambient: float
    power: float


def polygon_mask(polygons: Sequence[Points], resolution: int) -> tuple[Plane, Box] | None:
    """Coverage of one or more polygons in pixels, anti-aliased.

    Args:
        polygons: each ``(K, 2)``, in pixels.
        resolution: side of the picture.

    Returns:
        The coverage in [0, 1] inside the polygon's box, and the box; nothing where it lies outside the picture.
    """
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
    """A plane ``(H, W)`` in [0, 1] out of focus; the radius in pixels."""
    picture = Image.fromarray((plane * np.float32(255)).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(picture, dtype=np.float32) * np.float32(1 / 255)


def patches(values: npt.NDArray[np.float64], height: int, width: int) -> Plane:
    """Smooth noise: a small array of numbers in [0, 1] drawn out to ``(height, width)``."""
    small = Image.fromarray((values * 255).astype(np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / np.float32(255)


_LADDER = np.linspace(0, 1, 160)
_FLAT = np.array([0, 0, 1], dtype=np.float32)[:, None, None]


def normals(part: Part, mask: Plane, place: tuple[Plane, Plane], pose: Pose) -> Plane:
    """Which way each point of a part faces.

    Args:
        part: profile and relief are used.
        mask: its coverage, ``(h, w)``.
        place: ware coordinates x and y of each pixel.
        pose: where the ware stands.

    Returns:
        ``(3, h, w)``: x to the right, y down, z to the viewer, of length 1; ``(3, 1, 1)`` for a flat part.
    """
    if part.profile is not None:
        x, y = place
        heights, radii = part.profile[:, 0], part.profile[:, 1]
        slope = (radii[1:] - radii[:-1]) / np.maximum(heights[1:] - heights[:-1], 1e-3)
        # The profile and its slope on a fine ladder of heights, looked up for all pixels at once.
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
    """The values to the power of 2 ** doublings, by squaring."""
    for _ in range(doublings):
        values = values * values
    return values


def _lit(normal: Plane, light: Light) -> tuple[Plane, Plane]:
    """How much of the lamp falls on each point, and how near its mirror image is, both ``(h, w)`` in [0, 1]."""
    x, y, z = light.direction
    length = (x * x + y * y + (z + 1) * (z + 1)) ** 0.5
    diffuse = np.maximum(normal[0] * x + normal[1] * y + normal[2] * z, 0)
    mirror = np.maximum((normal[0] * x + normal[1] * y + normal[2] * (z + 1)) / length, 0)
    return diffuse.astype(np.float32), mirror.astype(np.float32)


@dataclass(frozen=True)
class Finish:
    """What a part is made of, after the marks of use.

    Attributes:
        material: plastic, metal, glass, fabric, leather or matte (paper, shadow, thread).
        albedo: ``(3, h, w)`` or ``(3, 1, 1)``, its colour without light.
        gloss: 1 for new, less for worn.
        grain: 0 to 1, size of weave or mottling, the object's own.
    """

    material: str
    albedo: Plane
    gloss: float
    grain: float


def shade(finish: Finish, normal: Plane, light: Light, place: tuple[Plane, Plane], behind: Plane) -> Plane:
    """The colour of a part.

    Args:
        finish: what it is made of.
        normal: ``(3, h, w)``.
        light: the lamp.
        place: ware coordinates x and y of each pixel.
        behind: ``(3, h, w)``: what glass shows.

    Returns:
        ``(3, h, w)`` or ``(3, 1, 1)``, may exceed 1 in highlights.
    """
    diffuse, mirror = _lit(normal, light)
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
