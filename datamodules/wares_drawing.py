"""Draws one generated ware: a pure function of what it is, and of a number that says how it is looked at.

The object (kind, colour, material, condition, proportions, scratches) belongs to the `WareSpec`; pose, light,
background, things in front and the camera belong to the view.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from datamodules import wares_carried, wares_vessels
from datamodules.wares_geometry import Aspect, Form, Part, Role, ribbon
from datamodules.wares_random import Random, between, pick, stream
from datamodules.wares_scene import background, occluder, photographed
from datamodules.wares_surface import (
    Finish,
    Light,
    Plane,
    Pose,
    blurred,
    normals,
    polygon_mask,
    shade,
)
from datamodules.wares_wear import marks_of_use, marred, placed_marks

Colour = tuple[float, float, float]

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
"""Darkest and lightest of each colour, RGB in [0, 1]; the objects lie between."""

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
"""What each kind may be made of."""

_SHAPES: dict[str, Callable[[Form, Aspect], list[Part]]] = {
    "backpack": wares_carried.backpack,
    "bottle": wares_vessels.bottle,
    "cap": wares_carried.cap,
    "handbag": wares_carried.handbag,
    "lamp": wares_vessels.lamp,
    "mug": wares_vessels.mug,
    "sneaker": wares_carried.sneaker,
    "soap dispenser": wares_vessels.soap_dispenser,
    "vase": wares_vessels.vase,
    "watch": wares_carried.watch,
}
KINDS = tuple(sorted(MATERIALS_OF))
MATERIALS = ("fabric", "glass", "leather", "metal", "plastic")
CONDITIONS = ("new", "used", "worn")

_WEAR = {"new": (0.0, 0.0), "used": (0.25, 0.45), "worn": (0.9, 1.3)}
_TAGGED = 0.6
_ACCENTS: list[Colour] = [(0.9, 0.88, 0.84), (0.12, 0.12, 0.13), (0.72, 0.58, 0.4), (0.35, 0.38, 0.42)]
_BLOOMS: list[Colour] = [(0.9, 0.45, 0.55), (0.95, 0.8, 0.35), (0.95, 0.93, 0.9), (0.6, 0.45, 0.75)]


@dataclass(frozen=True)
class WareSpec:
    """One physical object.

    Attributes:
        kind: one of `KINDS`.
        colour: one of `COLOURS`.
        material: one of `MATERIALS_OF` the kind.
        condition: one of `CONDITIONS`.
        seed: stands for everything else that is the object's own: proportions, exact tone, scratches.
    """

    kind: str
    colour: str
    material: str
    condition: str
    seed: int


def _pose(rng: Random, resolution: int) -> Pose:
    """Somewhere near the middle, mostly upright, sometimes lying, seen from a little aside."""
    # One in eight lies on its side or stands on its head, as in pictures taken from above.
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


@dataclass(frozen=True)
class _Paints:
    """Material and colour ``(3, 1, 1)`` of each role in one object, and what its materials share."""

    finishes: dict[Role, tuple[str, Plane]]
    gloss: float
    grain: float

    def finish(self, part: Part, marks: Plane | None) -> Finish:
        """What a part is made of, under its marks if there are any."""
        material, colour = self.finishes[part.role]
        # Small parts are too small for marks, and are painted in one tone.
        spotted = part.role in ("body", "accent", "pale") and (part.profile is not None or part.relief > 0)
        albedo = colour if marks is None or not spotted else marred(colour, marks, material)
        return Finish(material, albedo, self.gloss, self.grain)


def _rgb(*values: float) -> Plane:
    return np.array(values, dtype=np.float32)[:, None, None]


def _paints(spec: WareSpec, rng: Random) -> _Paints:
    """The object's own tones."""
    low, high = (_rgb(*tone) for tone in COLOURS[spec.colour])
    tint = (rng.random((3, 1, 1)) - 0.5).astype(np.float32) * np.float32(0.05)
    body = (low + (high - low) * np.float32(rng.random()) + tint).clip(0, 1)
    accent = _rgb(*_ACCENTS[pick(rng, len(_ACCENTS))])
    bloom = _rgb(*_BLOOMS[pick(rng, len(_BLOOMS))])
    trim = _rgb(0.78, 0.78, 0.8) if rng.random() < 0.7 else _rgb(0.85, 0.68, 0.38)
    finishes: dict[Role, tuple[str, Plane]] = {
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
    return _Paints(finishes, {"new": 1.0, "used": 0.7, "worn": 0.25}[spec.condition], float(rng.random()))


def _dashes(part: Part, mask: Plane, place: tuple[Plane, Plane]) -> Plane:
    """Stitches: only the edge of the outline, in dashes."""
    inner = blurred(mask, 1.0)
    edge = np.clip(1 - np.abs(inner - 0.5) * 3.2, 0, 1)
    dashed: Plane = edge * (((place[0] + place[1]) * 9 % 1) < 0.6)
    return dashed


def draw_ware(spec: WareSpec, view_seed: int, resolution: int = 96) -> npt.NDArray[np.uint8]:
    """Draws a picture of an object.

    Args:
        spec: the object.
        view_seed: pose, light, background, what stands before it, camera.
        resolution: side of the picture in pixels, at least 16.

    Returns:
        uint8 ``(resolution, resolution, 3)``, RGB; the same for the same arguments in every process.
    """
    own, rng = stream(spec.seed), stream(view_seed)
    form = [float(value) for value in own.random(8)]
    paints = _paints(spec, own)
    wear = between(own, *_WEAR[spec.condition])
    pose, light = _pose(rng, resolution), _light(rng)
    aspect = Aspect(between(rng, 0.08, 0.4), between(rng, -1, 1), float(rng.random()))
    scene = background(rng, resolution)
    parts = _SHAPES[spec.kind](form, aspect)
    if spec.condition == "new" and rng.random() < _TAGGED:
        parts += _price_tag(rng)
    scene = _with_shadow(scene, parts, pose, light, between(rng, 0.2, 0.55))
    marks = placed_marks(marks_of_use(spec.seed, wear), pose, resolution) if wear > 0 else None
    for part in parts:
        _paint(scene, part, _Look(spec, paints, pose, light, marks))
    if rng.random() < 0.25:
        colour, cover = occluder(rng, resolution)
        scene = scene * (1 - cover) + colour * cover
    return photographed(rng, scene)


@dataclass(frozen=True)
class _Look:
    """All that painting one part needs to know."""

    spec: WareSpec
    paints: _Paints
    pose: Pose
    light: Light
    marks: Plane | None


def _paint(scene: Plane, part: Part, look: _Look) -> None:
    """Lays one part over the scene."""
    found = polygon_mask([look.pose.to_picture(outline) for outline in (part.outline, *part.more)], scene.shape[-1])
    if found is None:
        return
    mask, box = found
    behind = scene[:, box.slices[0], box.slices[1]]
    place = look.pose.to_ware(box)
    marks = None if look.marks is None else look.marks[:, box.slices[0], box.slices[1]]
    finish = look.paints.finish(part, marks)
    if part.role == "stitch":
        if look.spec.material == "plastic":
            return
        mask = _dashes(part, mask, place)
    colour = shade(finish, normals(part, mask, place, look.pose), look.light, place, behind)
    # In place: `behind` is a view of the scene, and glass has already taken what it shows.
    behind += (colour - behind) * (mask * np.float32(part.strength))


def _price_tag(rng: Random) -> list[Part]:
    """A card on a thread, as new things have."""
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
            pen.polygon(((pose.to_picture(part.outline) + shift) / 2).round().ravel().tolist(), fill=255)
    soft = half.filter(ImageFilter.GaussianBlur(resolution * 0.022)).resize((resolution, resolution))
    return scene * (1 - np.asarray(soft, dtype=np.float32) * np.float32(depth / 255))
