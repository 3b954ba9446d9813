"""Outlines of the generated wares.

A ware is a stack of parts, each a closed polygon in the ware's own units: x to the right, y down, the whole ware within
about [-1, 1] in both. Each kind is a function of its form and of the aspect under which it is shown, and returns its
parts back to front. Kinds are meant to be confused: a mug whose handle is turned away looks like a vase. Angles are
rounded before use, so that the last bit of a platform's sine does not reach an image.
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
    """The aspect under which a ware is shown.

    Attributes:
        tilt: height over width of its horizontal circles, about 0.1 to 0.4.
        turn: angle about its upright axis, in [-1, 1].
        moment: what changes from image to image, in [0, 1]: hands of a watch, flowers in a vase.
    """

    tilt: float
    turn: float
    moment: float


@dataclass(frozen=True)
class Part:
    """One piece of a ware.

    Attributes:
        outline: ``(K, 2)``, closed, in ware units.
        role: finish of the piece.
        relief: roundness, from 0 (a flat sheet) to 1 (a cushion).
        profile: for a turned piece ``(K, 2)`` of height y (rising) and radius; its roundness is then exact.
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
    """Return points of the unit circle, ``(count, 2)``, from one angle to another, in radians; read-only."""
    angles = np.linspace(start, stop, count)
    points = np.round(np.stack([np.cos(angles), np.sin(angles)], axis=1), 9)
    points.setflags(write=False)
    return points


def ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    """Return an ellipse around (x, y), ``(28, 2)``."""
    return circle_points(0.0, 2 * math.pi, 28) * (rx, ry) + (x, y)


def smooth(points: Sequence[tuple[float, float]] | Points, closed: bool = True, steps: int = 6) -> Points:
    """Return a Catmull-Rom curve through the points, ``(steps * K, 2)``; open ``(steps * (K - 1) + 1, 2)``."""
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
    """Return a rectangle with round corners, ``(28, 2)``."""
    corners = [(x1, y1, 0.0), (x0, y1, 0.5), (x0, y0, 1.0), (x1, y0, 1.5)]
    arcs = []
    for cx, cy, turn in corners:
        centre = (cx - radius if cx == x1 else cx + radius, cy - radius if cy == y1 else cy + radius)
        arcs.append(circle_points(turn * math.pi, (turn + 0.5) * math.pi, 7) * radius + centre)
    return np.concatenate(arcs)


def ribbon(path: Sequence[tuple[float, float]] | Points, width: float | tuple[float, float]) -> Points:
    """Return the outline ``(2 K, 2)`` of a line ``(K, 2)`` of one width, or of one width at each end."""
    middle = np.asarray(path, dtype=np.float64)
    padded = np.concatenate([middle[:1], middle, middle[-1:]])
    along = padded[2:] - padded[:-2]
    length = np.sqrt(along[:, :1] * along[:, :1] + along[:, 1:] * along[:, 1:])
    first, last = (width, width) if isinstance(width, float | int) else width
    half = first + (last - first) * np.arange(len(middle))[:, None] / (len(middle) - 1)
    across = along[:, ::-1] * (-1.0, 1.0) * (0.5 * half / np.maximum(length, 1e-9))
    return np.concatenate([middle + across, (middle - across)[::-1]])


def inset(outline: Points, share: float) -> Points:
    """Shrink an outline towards its middle; 0.1 takes a tenth off."""
    centre = 0.5 * (outline.min(axis=0) + outline.max(axis=0))
    smaller: Points = centre + (outline - centre) * (1.0 - share)
    return smaller


def turned(
    profile: Sequence[tuple[float, float]] | Points, tilt: float, role: Role = "body", strength: float = 1.0
) -> Part:
    """Return a piece from the lathe with some heights (top first) and radii, seen from slightly above.

    The tilt is the height of a horizontal circle over its width: 0 at eye level, 1 from straight above.
    """
    line = np.asarray(profile, dtype=np.float64)
    heights, radii = line[:, 0], line[:, 1]
    right = np.stack([radii, heights], axis=1)
    bottom = circle_points(0.0, math.pi, 15) * (radii[-1], radii[-1] * tilt) + (0.0, heights[-1])
    left = np.stack([-radii[::-1], heights[::-1]], axis=1)
    top = circle_points(math.pi, 2 * math.pi, 15) * (radii[0], radii[0] * tilt) + (0.0, heights[0])
    return Part(np.concatenate([right, bottom, left, top]), role, profile=line, strength=strength)


def band(profile: Points, top: float, bottom: float, tilt: float, role: Role) -> Part:
    """Return a stripe or label around a turned piece, between two heights."""
    levels = np.linspace(top, bottom, 6)
    radii = np.interp(levels, profile[:, 0], profile[:, 1])
    front = circle_points(0.0, math.pi, 15)
    lower = front * (radii[-1], radii[-1] * tilt) + (0.0, bottom)
    upper = front[::-1] * (radii[0], radii[0] * tilt) + (0.0, top)
    left = np.stack([-radii[::-1], levels[::-1]], axis=1)
    right = np.stack([radii, levels], axis=1)
    return Part(np.concatenate([lower, left, upper, right]), role, profile=profile)


def _together(outlines: Sequence[Points], role: Role, strength: float = 1.0) -> Part:
    return Part(outlines[0], role, strength=strength, more=tuple(outlines[1:]))


def _curve(points: Sequence[tuple[float, float]]) -> Points:
    """A smooth profile whose heights never go back."""
    line = smooth(points, closed=False, steps=5)
    line[:, 0] = np.maximum.accumulate(line[:, 0] + np.arange(len(line)) * 1e-6)
    line[:, 1] = np.maximum(line[:, 1], 0.02)
    return line


def _decorated(body: Part, form: Form, tilt: float) -> list[Part]:
    """The turned body with one of: nothing, a stripe, two stripes, a label."""
    if body.profile is None or form[6] < 0.45:
        return [body]
    top, bottom = float(body.profile[0, 0]), float(body.profile[-1, 0])
    height = bottom - top
    middle = top + height * (0.35 + 0.4 * form[7])
    role: Role = "accent" if form[5] < 0.6 else "pale"
    if form[6] < 0.65:
        stripes = [(middle, middle + 0.09 * height)]
    elif form[6] < 0.8:
        stripes = [(middle - 0.1 * height, middle - 0.04 * height), (middle + 0.02 * height, middle + 0.08 * height)]
    else:
        stripes = [(middle - 0.12 * height, middle + 0.14 * height)]
    return [body, *(band(body.profile, start, stop, tilt, role) for start, stop in stripes)]


def _opening(radius: float, height: float, tilt: float) -> list[Part]:
    """The rim and the hollow of an open vessel."""
    return [
        Part(ellipse(0, height, radius, radius * tilt), "body"),
        Part(ellipse(0, height, radius * 0.88, radius * tilt * 0.84), "inside"),
    ]


def mug(form: Form, aspect: Aspect) -> list[Part]:
    """A wide cup whose handle goes around with the turn."""
    half = 0.58 + 0.24 * form[0]
    top = 0.5 + 0.14 * form[1]
    foot = top * (0.72 + 0.3 * form[2])
    body = turned(_curve([(-half, top), (-0.3 * half, top), (0.6 * half, (top + foot) / 2), (half, foot)]), aspect.tilt)
    # The handle goes around with the turn: at the side it shows whole, in front or behind it is a narrow loop.
    side = math.copysign(1.0, aspect.turn)
    reach = 0.95 - 0.8 * abs(aspect.turn) ** 2
    size = 0.3 + 0.12 * form[3]
    start = (side * top * reach * 0.92, -0.55 * half)
    end = (side * (top + foot) / 2 * reach * 0.95, 0.55 * half)
    out = side * (top * reach + size * reach + 0.08)
    loop = smooth([start, (out, -0.5 * half), (out, 0.15 * half), end], closed=False)
    handle = Part(ribbon(loop, 0.11 + 0.05 * form[4]), "body", relief=0.9)
    vessel = [*_decorated(body, form, aspect.tilt), *_opening(top, -half, aspect.tilt)]
    return [*vessel, handle] if aspect.turn > 0.75 else [handle, *vessel]


def vase(form: Form, aspect: Aspect) -> list[Part]:
    """A belly, a neck and a rim; flowers stand in it in every third image."""
    neck, belly = 0.16 + 0.24 * form[0], 0.34 + 0.26 * form[1]
    low = 0.1 + 0.5 * form[2]
    rim, foot = neck + 0.16 * form[3], 0.22 + 0.14 * form[4]
    line = [(-0.86, rim), (-0.68, neck), (-0.45, neck + 0.2 * (belly - neck)), (low - 0.3, belly * 0.97), (low, belly)]
    line += [((low + 0.9) / 2, foot + 0.72 * (belly - foot)), (0.9, foot)]
    body = turned(_curve(line), aspect.tilt)
    parts = [*_decorated(body, form, aspect.tilt), *_opening(rim, -0.86, aspect.tilt)]
    if aspect.moment > 0.68:
        for place in (-0.8, 0.15, 0.9):
            head = (place * (0.3 + 0.2 * aspect.moment), -1.25 - 0.15 * math.cos(2 * place + 9 * aspect.moment))
            stem = smooth([(place * rim * 0.4, -0.86), (head[0] * 0.5, -1.05), head], closed=False)
            parts.append(Part(ribbon(stem, 0.035), "dark", strength=0.8))
            petals = circle_points(0, 2 * math.pi, 25)[:-1] * np.tile([0.17, 0.12, 0.08, 0.12], 6)[:, None]
            parts.append(Part(petals + head, "bloom", relief=0.8))
    return parts


def bottle(form: Form, aspect: Aspect) -> list[Part]:
    """A body with shoulders, a neck and a cap."""
    radius, neck = 0.28 + 0.14 * form[0], 0.1 + 0.09 * form[1]
    shoulder = -0.45 + 0.35 * form[2]
    waist = radius * (0.86 + 0.14 * form[3])
    line = [(-0.72, neck), (shoulder - 0.2, neck * 1.1), (shoulder, radius * 0.9), (shoulder + 0.15, radius)]
    body = turned(_curve([*line, (0.4, waist), (0.75, radius), (0.95, radius * 0.94)]), aspect.tilt)
    wide = neck * (1.15 + 0.4 * form[4])
    lid = turned([(-0.97, wide * 0.92), (-0.7, wide)], aspect.tilt, "accent" if form[5] < 0.6 else "trim")
    top = Part(ellipse(0, -0.97, wide * 0.92, wide * 0.92 * aspect.tilt), lid.role)
    return [*_decorated(body, form, aspect.tilt), lid, top]


def soap_dispenser(form: Form, aspect: Aspect) -> list[Part]:
    """A bottle with a pump, whose spout goes around with the turn."""
    radius, neck = 0.32 + 0.16 * form[0], 0.12
    top = -0.3 + 0.2 * form[1]
    line = [(top, neck), (top + 0.12, radius * (0.6 + 0.35 * form[2])), (top + 0.28, radius), (0.7, radius)]
    body = turned(_curve([*line, (0.95, radius * (0.85 + 0.15 * form[3]))]), aspect.tilt)
    finish: Role = "trim" if form[5] < 0.5 else "accent"
    collar = turned([(top - 0.14, neck * 1.2), (top + 0.03, neck * 1.3)], aspect.tilt, finish)
    stem = turned([(top - 0.36, 0.045), (top - 0.1, 0.045)], aspect.tilt, finish)
    reach = math.copysign(0.16 + 0.3 * (1 - abs(aspect.turn)), aspect.turn)
    head = top - 0.42
    spout = smooth(
        [(-0.3 * reach, head), (0.4 * reach, head - 0.02), (reach, head), (1.15 * reach, head + 0.11)], False
    )
    nozzle = Part(ribbon(spout, (0.17, 0.08)), finish, relief=0.9)
    return [*_decorated(body, form, aspect.tilt), stem, collar, nozzle]


def lamp(form: Form, aspect: Aspect) -> list[Part]:
    """A table lamp: foot, rod or turned stand, and a shade, which glows in every second image."""
    wide, narrow = 0.5 + 0.18 * form[0], 0.2 + 0.3 * form[1]
    low = -0.12 + 0.2 * form[2]
    foot = 0.26 + 0.16 * form[3]
    metal: Role = "trim" if form[5] < 0.6 else "dark"
    base = turned(_curve([(0.78, 0.08), (0.84, foot * 0.7), (0.93, foot)]), aspect.tilt, metal)
    if form[6] < 0.4:  # A turned ceramic foot instead of a rod.
        belly = 0.14 + 0.16 * form[7]
        line = [(low, 0.07), (low + 0.15, 0.09), (0.45, belly), (0.7, belly * 0.7), (0.85, foot * 0.8)]
        stand = turned(_curve(line), aspect.tilt)
    else:
        stand = turned([(low - 0.1, 0.045), (0.85, 0.045)], aspect.tilt, metal)
    dome = [(-0.92, narrow * 0.6), (-0.75, narrow), (low - 0.2, wide * 0.9), (low, wide)]
    cone = [(-0.92, narrow), (low, wide)]
    shade = turned(_curve(dome) if form[4] < 0.35 else cone, aspect.tilt)
    top = float(shade.outline[0, 0])
    hole = Part(ellipse(0, -0.92, top * 0.9, top * 0.9 * aspect.tilt), "lit" if aspect.moment > 0.5 else "inside")
    glow = [Part(inset(shade.outline, 0.12), "glow", strength=0.7)] if aspect.moment > 0.5 else []
    return [base, stand, shade, *glow, hole]


def watch(form: Form, aspect: Aspect) -> list[Part]:
    """A round or square case between two halves of a strap, with a dial, marks and hands."""
    size, strap = 0.4 + 0.12 * form[0], 0.24 + 0.1 * form[1]
    end = strap * (0.6 + 0.3 * form[2])
    parts: list[Part] = []
    for way in (-1.0, 1.0):
        tail = way * (1.0 - 0.12 * form[3])
        half = [(0.0, way * size * 0.7), (0.0, way * 0.7), (0.0, tail)]
        parts.append(Part(ribbon(half, (2 * strap, 2 * end)), "body", relief=0.7))
        rows = [way * (size + 0.16 + 0.13 * step) for step in range(3)]
        parts.append(_together([ribbon([(-strap * 0.7, y), (strap * 0.7, y)], 0.025) for y in rows], "seam", 0.5))
    square = form[4] > 0.6
    case = rounded_box(-size, -size, size, size, 0.2 * size) if square else ellipse(0, 0, size, size)
    parts.append(Part(ribbon([(size, 0), (size + 0.1, 0)], 0.14), "trim", relief=0.8))
    parts.append(Part(case, "trim" if form[5] < 0.7 else "dark", relief=0.9))
    face: Role = "pale" if form[6] < 0.55 else "dark"
    ink: Role = "dark" if face == "pale" else "pale"
    parts.append(Part(inset(case, 0.2), face))
    lines = [np.stack([mark * 0.88, mark]) for mark in circle_points(0, 2 * math.pi, 13)[:-1] * size * 0.68]
    for share, length in ((aspect.moment, 0.42), (aspect.moment * 12 % 1, 0.6)):
        tip = circle_points(2 * math.pi * share, 0, 2)[0] * size * length
        lines.append(np.stack([np.zeros(2), tip]))
    return [*parts, _together([ribbon(line, 0.05) for line in lines], ink)]


def cap(form: Form, aspect: Aspect) -> list[Part]:
    """A crown of panels and a brim that points to where the cap is turned."""
    high, side = 0.62 + 0.22 * form[0], math.copysign(1.0, aspect.turn)
    front = 0.35 + 0.4 * (1 - abs(aspect.turn))  # From the side the brim reaches far out.
    dome = [(-0.72, 0.3), (-0.68, -0.15), (-0.42, 0.2 - high), (0, 0.08 - high), (0.42, 0.2 - high), (0.7, -0.15)]
    crown = Part(smooth([*dome, (0.74, 0.28), (0.35, 0.4), (-0.35, 0.4)]) * (0.86, 1) * (side, 1), "body", relief=1.0)
    drop = 0.42 + 0.22 * abs(aspect.turn) + 0.12 * form[1]
    edge = [(0.1, 0.3), (0.63, 0.16), (0.62 + front * 0.6, 0.3), (0.6 + front * 0.7, drop), (0.3, drop + 0.06)]
    brim = Part(smooth([*edge, (-0.18, 0.42)]) * (side, 1), "body" if form[2] < 0.6 else "accent", relief=0.5)
    top = 0.09 - high
    parts = [crown]
    lines = [[(0, top), (lean * 1.15, top * 0.4), (lean * 1.1, 0.34)] for lean in (-0.42, 0.0, 0.46)]
    parts.append(_together([ribbon(smooth(line, closed=False) * (side, 1), 0.03) for line in lines], "seam", 0.6))
    parts.append(Part(ellipse(0, top, 0.07, 0.045), "body" if form[3] < 0.5 else "accent", relief=1.0))
    if form[6] > 0.5:
        badge = ellipse(0.3 * side, -0.08, 0.15, 0.14) if form[7] < 0.5 else rounded_box(0.12, -0.2, 0.46, 0.0, 0.05)
        parts.append(Part(badge if form[7] < 0.5 else badge * (side, 1), "accent"))
    band_line = smooth([(-0.58, 0.27), (-0.1, 0.41), (0.3, 0.4), (0.6, 0.25)], closed=False) * (side, 1)
    return [*parts, brim, Part(ribbon(band_line, 0.04), "seam", strength=0.7)]


def sneaker(form: Form, aspect: Aspect) -> list[Part]:
    """A sports shoe from the side, low or high, with sole, laces and stripes."""
    side = math.copysign(1.0, aspect.turn)
    ankle = -0.38 - 0.3 * form[0]
    toe = 0.02 + 0.16 * form[1]
    upper = [(-0.88, 0.28), (-0.9, -0.1), (-0.84, ankle), (-0.6, ankle + 0.06), (-0.28, ankle + 0.02), (0.05, -0.16)]
    outline = smooth([*upper, (0.45, toe - 0.06), (0.86, toe + 0.08), (0.98, 0.3), (0.3, 0.36)]) * (side, 1)
    thick = 0.12 + 0.1 * form[2]
    edge = [(-0.93, 0.24), (-0.3, 0.3), (0.4, 0.29), (0.98, 0.25), (1.03, 0.26 + 0.5 * thick), (0.9, 0.28 + thick)]
    sole = smooth([*edge, (0, 0.32 + thick), (-0.88, 0.3 + thick), (-0.98, 0.26 + 0.5 * thick)]) * (side, 1)
    parts = [Part(outline, "body", relief=1.0)]
    mouth = smooth([(-0.8, ankle + 0.03), (-0.55, ankle + 0.02), (-0.32, ankle + 0.05), (-0.55, ankle + 0.15)])
    parts.append(Part(mouth * (side, 1), "dark", strength=0.75))
    cap = smooth([(0.62, toe + 0.02), (0.9, toe + 0.1), (0.97, 0.3), (0.55, 0.32)]) * (side, 1)
    parts.append(Part(cap, "pale" if form[3] < 0.4 else "body", relief=0.7))
    role: Role = "accent" if form[4] < 0.7 else "seam"
    if form[6] < 0.5:
        swoosh = smooth([(-0.55, 0.2), (-0.1, 0.16), (0.35, -0.02)], closed=False) * (side, 1)
        parts.append(Part(ribbon(swoosh, (0.2, 0.03)), role))
    else:
        stripes = [ribbon([(side * x, -0.1), (side * (x + 0.14), 0.26)], 0.09) for x in (-0.35, -0.15, 0.05)]
        parts.append(_together(stripes, role))
    eyes = [(-0.22 + 0.17 * step, ankle + 0.15 + (0.11 + 0.1 * form[0]) * step) for step in range(4)]
    laces = [ribbon([(side * (x - 0.1), y + 0.05), (side * (x + 0.12), y - 0.06)], 0.05) for x, y in eyes]
    parts.append(_together(laces, "pale"))
    return [*parts, Part(sole, "pale" if form[5] < 0.75 else "accent", relief=0.6)]


def handbag(form: Form, aspect: Aspect) -> list[Part]:
    """A trapezoid with two handles, a flap with a clasp or an open top."""
    wide, narrow = 0.68 + 0.2 * form[0], 0.5 + 0.25 * form[1]
    top, bottom = -0.25 + 0.2 * form[2], 0.82
    corner = 0.1 * form[3]
    line = [(-narrow, top), (narrow, top), (narrow + 0.06, top + 0.1), (wide, bottom - 0.15 - corner)]
    line += [(wide - 0.08, bottom)]
    body = smooth([*line, *((-x, y) for x, y in line[:1:-1])], steps=4)
    lift, spread = -0.78 - 0.2 * form[4], narrow * (0.45 + 0.3 * form[5])
    arc = smooth([(-spread, top + 0.12), (-spread * 0.9, lift * 0.75), (0, lift), (spread * 0.9, lift * 0.75)], False)
    arc = np.concatenate([arc, [(spread, top + 0.12)]])
    shift = np.array([0.1 * aspect.turn, -0.05])
    thick = 0.07 + 0.05 * form[6]
    parts = [Part(ribbon(arc + shift, thick), "body", relief=0.8), Part(body, "body", relief=0.8)]
    parts.append(Part(ribbon(arc, thick), "body", relief=0.9))
    if form[7] < 0.55:
        flap_low = top + 0.35 + 0.2 * form[6]
        flap = smooth([(-narrow, top), (narrow, top), (narrow * 0.98, flap_low - 0.12), (0, flap_low)], steps=6)
        parts.append(Part(smooth([*map(tuple, flap[::6]), (-narrow * 0.98, flap_low - 0.12)]), "body", relief=0.6))
        parts.append(Part(rounded_box(-0.09, flap_low - 0.14, 0.09, flap_low + 0.02, 0.03), "trim", relief=0.9))
    else:
        parts.append(Part(ribbon([(-narrow, top + 0.1), (narrow, top + 0.1)], 0.035), "seam", strength=0.7))
        left, right = (ellipse(way * spread, top + 0.14, 0.06, 0.06) for way in (-1, 1))
        parts.append(Part(left, "trim", more=(right,)))
    return [*parts, Part(inset(body, 0.09), "stitch")]


def backpack(form: Form, aspect: Aspect) -> list[Part]:
    """An arched bag with a loop, shoulder straps at one side and a front pocket."""
    wide, top = 0.5 + 0.14 * form[0], -0.72 - 0.1 * form[1]
    bottom, crown = 0.88, 0.3 + 0.14 * form[2]
    side = math.copysign(1.0, aspect.turn)
    arch = [(-wide, top + crown), (-wide * 0.62, top), (wide * 0.62, top), (wide, top + crown), (wide * 1.04, 0.5)]
    body = smooth([*arch, (wide * 0.9, bottom), (-wide * 0.9, bottom), (-wide * 1.04, 0.5)])
    loop = smooth([(-0.14, top + 0.05), (-0.1, top - 0.16), (0.1, top - 0.16), (0.14, top + 0.05)], closed=False)
    strap = [(side * wide * 0.7, top + 0.25), (side * (wide + 0.2), -0.15), (side * (wide + 0.16), 0.4)]
    straps = smooth([*strap, (side * wide * 0.85, 0.72)], closed=False)
    parts = [Part(ribbon(loop, 0.07), "dark" if form[5] < 0.5 else "body", relief=0.8)]
    parts.append(Part(ribbon(straps, 0.13), "body" if form[5] < 0.7 else "dark", relief=0.8))
    parts.append(Part(body, "body", relief=1.0))
    zip_line = smooth([(-wide * 0.86, 0.1), (-wide * 0.84, top + crown), (0, top + 0.14)], closed=False)
    zip_line = np.concatenate([zip_line, (zip_line * (-1, 1))[::-1]])
    parts.append(Part(ribbon(zip_line, 0.03), "seam", strength=0.8))
    high = 0.02 + 0.22 * form[3]
    pocket = rounded_box(-wide * 0.74, high, wide * 0.74, bottom - 0.1, 0.12)
    parts.append(Part(pocket, "body" if form[4] < 0.7 else "accent", relief=0.8))
    parts.append(Part(ribbon([(-wide * 0.66, high + 0.1), (wide * 0.66, high + 0.1)], 0.03), "seam", strength=0.8))
    if form[6] < 0.4:
        left, right = (ribbon([(x, top + 0.2), (x, bottom - 0.05)], 0.09) for x in (-wide * 0.45, wide * 0.45))
        parts.append(Part(left, "dark", more=(right,)))
    elif form[6] < 0.7:
        parts.append(Part(rounded_box(-0.13, high - 0.26, 0.13, high - 0.08, 0.04), "accent"))
    return [*parts, Part(inset(pocket, 0.12), "stitch")]
