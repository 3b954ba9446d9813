"""The ten kinds of generated wares as stacks of parts, back to front.

Every kind is a function of its form (eight numbers in [0, 1] that belong to the object: proportions, trim) and
of how it is looked at, so that all views of one object show the same thing. Some kinds are meant to be mistaken
for others: a mug whose handle is turned away looks like a vase, a bottle like a soap dispenser, a handbag like a
backpack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.wares_geometry import (
    Part,
    Points,
    Role,
    band,
    circle_points,
    ellipse,
    inset,
    ribbon,
    rounded_box,
    smooth,
    turned,
)

Form = Sequence[float]


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
        Part(ellipse(0, height, radius, radius * tilt), "body", relief=0.0),
        Part(ellipse(0, height, radius * 0.88, radius * tilt * 0.84), "inside", relief=0.0),
    ]


def _mug(form: Form, aspect: Aspect) -> list[Part]:
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


def _vase(form: Form, aspect: Aspect) -> list[Part]:
    neck, belly = 0.16 + 0.24 * form[0], 0.34 + 0.26 * form[1]
    low = 0.1 + 0.5 * form[2]
    rim, foot = neck + 0.16 * form[3], 0.22 + 0.14 * form[4]
    line = [(-0.86, rim), (-0.68, neck), (-0.45, neck + 0.2 * (belly - neck)), (low - 0.3, belly * 0.97), (low, belly)]
    body = turned(_curve([*line, (0.9, foot)]), aspect.tilt)
    parts = [*_decorated(body, form, aspect.tilt), *_opening(rim, -0.86, aspect.tilt)]
    if aspect.moment > 0.68:  # Flowers stand in it in every third picture.
        for place in (-0.8, 0.15, 0.9):
            head = (place * (0.3 + 0.2 * aspect.moment), -1.25 - 0.15 * math.cos(2 * place + 9 * aspect.moment))
            stem = smooth([(place * rim * 0.4, -0.86), (head[0] * 0.5, -1.05), head], closed=False)
            parts.append(Part(ribbon(stem, 0.035), "dark", strength=0.8))
            petals = circle_points(0, 2 * math.pi, 25)[:-1] * np.tile([0.17, 0.12, 0.08, 0.12], 6)[:, None]
            parts.append(Part(petals + head, "bloom", relief=0.8))
    return parts


def _bottle(form: Form, aspect: Aspect) -> list[Part]:
    radius, neck = 0.28 + 0.14 * form[0], 0.1 + 0.09 * form[1]
    shoulder = -0.45 + 0.35 * form[2]
    waist = radius * (0.86 + 0.14 * form[3])
    line = [(-0.72, neck), (shoulder - 0.2, neck * 1.1), (shoulder, radius * 0.9), (shoulder + 0.15, radius)]
    body = turned(_curve([*line, (0.4, waist), (0.75, radius), (0.95, radius * 0.94)]), aspect.tilt)
    wide = neck * (1.15 + 0.4 * form[4])
    lid = turned([(-0.97, wide * 0.92), (-0.7, wide)], aspect.tilt, "accent" if form[5] < 0.6 else "trim")
    top = Part(ellipse(0, -0.97, wide * 0.92, wide * 0.92 * aspect.tilt), lid.role, relief=0.1)
    return [*_decorated(body, form, aspect.tilt), lid, top]


def _soap_dispenser(form: Form, aspect: Aspect) -> list[Part]:
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


def _lamp(form: Form, aspect: Aspect) -> list[Part]:
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
    glow = [Part(inset(shade.outline, 0.12), "lit", relief=0, strength=0.4)] if aspect.moment > 0.5 else []
    return [base, stand, shade, *glow, hole]


def _watch(form: Form, aspect: Aspect) -> list[Part]:
    size, strap = 0.4 + 0.12 * form[0], 0.24 + 0.1 * form[1]
    end = strap * (0.6 + 0.3 * form[2])
    parts: list[Part] = []
    for way in (-1.0, 1.0):
        tail = way * (1.0 - 0.12 * form[3])
        half = [(0.0, way * size * 0.7), (0.0, way * 0.7), (0.0, tail)]
        parts.append(Part(ribbon(half, (2 * strap, 2 * end)), "body", relief=0.7))
        for step in range(3):
            y = way * (size + 0.16 + 0.13 * step)
            parts.append(Part(ribbon([(-strap * 0.7, y), (strap * 0.7, y)], 0.025), "seam", strength=0.5))
    square = form[4] > 0.6
    case = rounded_box(-size, -size, size, size, 0.2 * size) if square else ellipse(0, 0, size, size)
    parts.append(Part(ribbon([(size, 0), (size + 0.1, 0)], 0.14), "trim", relief=0.8))
    parts.append(Part(case, "trim" if form[5] < 0.7 else "dark", relief=0.9))
    face: Role = "pale" if form[6] < 0.55 else "dark"
    ink: Role = "dark" if face == "pale" else "pale"
    parts.append(Part(inset(case, 0.2), face, relief=0.0))
    for mark in circle_points(0, 2 * math.pi, 13)[:-1] * size * 0.68:
        parts.append(Part(ribbon([tuple(mark * 0.88), tuple(mark)], 0.05), ink))
    for share, length in ((aspect.moment, 0.42), (aspect.moment * 12 % 1, 0.6)):
        tip = circle_points(2 * math.pi * share, 0, 2)[0] * size * length
        parts.append(Part(ribbon([(0.0, 0.0), tuple(tip)], 0.06), ink))
    return parts


def _cap(form: Form, aspect: Aspect) -> list[Part]:
    high, side = 0.62 + 0.22 * form[0], math.copysign(1.0, aspect.turn)
    front = 0.35 + 0.4 * (1 - abs(aspect.turn))  # Seen from the side the brim stands far out.
    dome = [(-0.72, 0.3), (-0.68, -0.15), (-0.42, 0.2 - high), (0, 0.08 - high), (0.42, 0.2 - high), (0.7, -0.15)]
    crown = Part(smooth([*dome, (0.74, 0.28), (0.35, 0.4), (-0.35, 0.4)]) * (0.86, 1) * (side, 1), "body", relief=1.0)
    drop = 0.42 + 0.22 * abs(aspect.turn) + 0.12 * form[1]
    edge = [(0.1, 0.3), (0.63, 0.16), (0.62 + front * 0.6, 0.3), (0.6 + front * 0.7, drop), (0.3, drop + 0.06)]
    brim = Part(smooth([*edge, (-0.18, 0.42)]) * (side, 1), "body" if form[2] < 0.6 else "accent", relief=0.5)
    top = 0.09 - high
    parts = [crown]
    for lean in (-0.42, 0.0, 0.46):
        line = smooth([(0, top), (lean * 1.15, top * 0.4), (lean * 1.1, 0.34)], closed=False) * (side, 1)
        parts.append(Part(ribbon(line, 0.03), "seam", strength=0.6))
    parts.append(Part(ellipse(0, top, 0.07, 0.045), "body" if form[3] < 0.5 else "accent", relief=1.0))
    if form[6] > 0.5:
        badge = ellipse(0.3 * side, -0.08, 0.15, 0.14) if form[7] < 0.5 else rounded_box(0.12, -0.2, 0.46, 0.0, 0.05)
        parts.append(Part(badge if form[7] < 0.5 else badge * (side, 1), "accent", relief=0.2))
    band_line = smooth([(-0.58, 0.27), (-0.1, 0.41), (0.3, 0.4), (0.6, 0.25)], closed=False) * (side, 1)
    return [*parts, brim, Part(ribbon(band_line, 0.04), "seam", strength=0.7)]


def _sneaker(form: Form, aspect: Aspect) -> list[Part]:
    side = math.copysign(1.0, aspect.turn)
    ankle = -0.38 - 0.3 * form[0]
    toe = 0.02 + 0.16 * form[1]
    upper = [(-0.88, 0.28), (-0.9, -0.1), (-0.84, ankle), (-0.6, ankle + 0.06), (-0.28, ankle + 0.02), (0.05, -0.16)]
    outline = smooth([*upper, (0.45, toe - 0.06), (0.86, toe + 0.08), (0.98, 0.3), (0.3, 0.36)]) * (side, 1)
    thick = 0.12 + 0.1 * form[2]
    under = smooth([(-0.95, 0.24), (-0.3, 0.3), (0.4, 0.28), (1.0, 0.26), (1.02, 0.28 + thick), (0, 0.32 + thick)])
    sole = np.concatenate([under, smooth([(-0.5, 0.32 + thick), (-0.95, 0.28 + thick)], closed=False)]) * (side, 1)
    parts = [Part(outline, "body", relief=1.0)]
    mouth = smooth([(-0.8, ankle + 0.03), (-0.55, ankle + 0.02), (-0.32, ankle + 0.05), (-0.55, ankle + 0.15)])
    parts.append(Part(mouth * (side, 1), "dark", strength=0.75))
    cap = smooth([(0.62, toe + 0.02), (0.9, toe + 0.1), (0.97, 0.3), (0.55, 0.32)]) * (side, 1)
    parts.append(Part(cap, "pale" if form[3] < 0.4 else "body", relief=0.7))
    role: Role = "accent" if form[4] < 0.7 else "seam"
    if form[6] < 0.5:
        swoosh = smooth([(-0.55, 0.2), (-0.1, 0.16), (0.35, -0.02)], closed=False) * (side, 1)
        parts.append(Part(ribbon(swoosh, (0.2, 0.03)), role, relief=0.1))
    else:
        for x in (-0.35, -0.15, 0.05):
            parts.append(Part(ribbon([(side * x, -0.1), (side * (x + 0.14), 0.26)], 0.09), role, relief=0.1))
    for step in range(4):
        x, y = -0.22 + 0.17 * step, ankle + 0.15 + 0.11 * step + 0.1 * form[0] * step
        parts.append(Part(ribbon([(side * (x - 0.1), y + 0.05), (side * (x + 0.12), y - 0.06)], 0.05), "pale"))
    return [*parts, Part(sole, "pale" if form[5] < 0.75 else "accent", relief=0.6)]


def _handbag(form: Form, aspect: Aspect) -> list[Part]:
    wide, narrow = 0.68 + 0.2 * form[0], 0.5 + 0.25 * form[1]
    top, bottom = -0.25 + 0.2 * form[2], 0.82
    corner = 0.1 * form[3]
    line = [(-narrow, top), (narrow, top), (narrow + 0.06, top + 0.1), (wide, bottom - 0.15 - corner)]
    line += [
        (wide - 0.08, bottom),
        (-wide + 0.08, bottom),
        (-wide, bottom - 0.15 - corner),
        (-narrow - 0.06, top + 0.1),
    ]
    body = smooth(line, steps=4)
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
        parts += [Part(ellipse(way * spread, top + 0.14, 0.06, 0.06), "trim", relief=1.0) for way in (-1, 1)]
    return [*parts, Part(inset(body, 0.09), "stitch")]


def _backpack(form: Form, aspect: Aspect) -> list[Part]:
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
        parts += [Part(ribbon([(x, top + 0.2), (x, bottom - 0.05)], 0.09), "dark") for x in (-wide * 0.45, wide * 0.45)]
    elif form[6] < 0.7:
        parts.append(Part(rounded_box(-0.13, high - 0.26, 0.13, high - 0.08, 0.04), "accent", relief=0.2))
    return [*parts, Part(inset(pocket, 0.12), "stitch")]


SHAPES: dict[str, Callable[[Form, Aspect], list[Part]]] = {
    "backpack": _backpack,
    "bottle": _bottle,
    "cap": _cap,
    "handbag": _handbag,
    "lamp": _lamp,
    "mug": _mug,
    "sneaker": _sneaker,
    "soap dispenser": _soap_dispenser,
    "vase": _vase,
    "watch": _watch,
}
"""Parts of each kind, from the form and the aspect; later parts lie over earlier ones."""
