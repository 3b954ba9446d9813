"""Outlines of the generated wares that are worn or carried: watch, cap, sneaker, handbag and backpack.

Each is a function of its form and of how it is looked at, and gives its parts back to front. A handbag may be
mistaken for a backpack.
"""

from __future__ import annotations

import math

import numpy as np

from datamodules.wares_geometry import (
    Aspect,
    Form,
    Part,
    Role,
    circle_points,
    ellipse,
    inset,
    ribbon,
    rounded_box,
    smooth,
)


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
        first, *rest = [ribbon([(-strap * 0.7, y), (strap * 0.7, y)], 0.025) for y in rows]
        parts.append(Part(first, "seam", strength=0.5, more=tuple(rest)))
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
    first, *rest = [ribbon(line, 0.05) for line in lines]
    return [*parts, Part(first, ink, more=tuple(rest))]


def cap(form: Form, aspect: Aspect) -> list[Part]:
    """A crown of panels and a brim that points to where the cap is turned."""
    high, side = 0.62 + 0.22 * form[0], math.copysign(1.0, aspect.turn)
    front = 0.35 + 0.4 * (1 - abs(aspect.turn))  # Seen from the side the brim stands far out.
    dome = [(-0.72, 0.3), (-0.68, -0.15), (-0.42, 0.2 - high), (0, 0.08 - high), (0.42, 0.2 - high), (0.7, -0.15)]
    crown = Part(smooth([*dome, (0.74, 0.28), (0.35, 0.4), (-0.35, 0.4)]) * (0.86, 1) * (side, 1), "body", relief=1.0)
    drop = 0.42 + 0.22 * abs(aspect.turn) + 0.12 * form[1]
    edge = [(0.1, 0.3), (0.63, 0.16), (0.62 + front * 0.6, 0.3), (0.6 + front * 0.7, drop), (0.3, drop + 0.06)]
    brim = Part(smooth([*edge, (-0.18, 0.42)]) * (side, 1), "body" if form[2] < 0.6 else "accent", relief=0.5)
    top = 0.09 - high
    parts = [crown]
    lines = [[(0, top), (lean * 1.15, top * 0.4), (lean * 1.1, 0.34)] for lean in (-0.42, 0.0, 0.46)]
    first, *rest = [ribbon(smooth(line, closed=False) * (side, 1), 0.03) for line in lines]
    parts.append(Part(first, "seam", strength=0.6, more=tuple(rest)))
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
        first, *rest = [ribbon([(side * x, -0.1), (side * (x + 0.14), 0.26)], 0.09) for x in (-0.35, -0.15, 0.05)]
        parts.append(Part(first, role, more=tuple(rest)))
    eyes = [(-0.22 + 0.17 * step, ankle + 0.15 + (0.11 + 0.1 * form[0]) * step) for step in range(4)]
    first, *rest = [ribbon([(side * (x - 0.1), y + 0.05), (side * (x + 0.12), y - 0.06)], 0.05) for x, y in eyes]
    parts.append(Part(first, "pale", more=tuple(rest)))
    return [*parts, Part(sole, "pale" if form[5] < 0.75 else "accent", relief=0.6)]


def handbag(form: Form, aspect: Aspect) -> list[Part]:
    """A trapezoid with two handles, a flap with a clasp or an open top."""
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
