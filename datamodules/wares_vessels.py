"""Outlines of the generated wares that come from the lathe: mug, vase, bottle, soap dispenser and lamp.

Each is a function of its form and of how it is looked at, and gives its parts back to front, so that all views of
one object show the same thing. They are meant to be mistaken for one another: a mug whose handle is turned away looks
like a vase, a bottle like a soap dispenser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from datamodules.wares_geometry import (
    Aspect,
    Form,
    Part,
    Points,
    Role,
    band,
    circle_points,
    ellipse,
    inset,
    ribbon,
    smooth,
    turned,
)


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
    """A belly, a neck and a rim; flowers stand in it in every third picture."""
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
    """A table lamp: foot, rod or turned stand, and a shade, which glows in every second picture."""
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
