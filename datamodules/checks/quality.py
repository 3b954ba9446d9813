"""Images that are unlike the others of their set: blurred, dark, bright, empty, of odd size or shape, gray, or special.

A set is its own measure: what is dark among photos of products is usual among photos of the night. A value is a finding
where it is far from the median by robust standards (``FAR`` times the median absolute deviation, scaled to a standard
deviation; B. Iglewicz and D. Hoaglin, "How to Detect and Handle Outliers", 1993) and also beyond a bound of its own, so
that nothing is odd in a set where all are fine. Values are taken from the image scaled down to ``SIDE`` pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.loading.decode import read_header
from vitrail.errors import UserError

SIDE = 256
"""Long side in pixels of the image of which facts are taken; a smaller one stays as it is."""

FAR = 3.5

FACTS = ("width", "height", "brightness", "contrast", "entropy", "sharpness", "chroma", "kind", "frames")
"""What is known of each image: width and height in pixels as shown; mean and standard deviation of its gray levels,
0 to 255; their entropy, 0 to 8 bits; the variance of their Laplacian (J. Pech-Pacheco et al., ICPR 2000); the mean
difference of the largest and smallest of a pixel's channels; the sum of what it is of ``KINDS``; images in the file."""

KINDS = {
    "animated": 1,
    "cmyk": 2,
    "16-bit": 4,
    "rotated": 8,
    "transparent-palette": 16,
    "transparent": 32,
    "gray-file": 64,
}
"""Kinds of files that are read otherwise than a plain RGB image."""

Severity = Literal["high", "medium", "low"]


def measured(pixels: NDArray[np.uint8], source: str) -> NDArray[np.float32]:
    """Return the ``FACTS`` of a decoded image, uint8 ``(H, W, 3)``, and of its file, if ``source`` is one."""
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=1.0)
    red, green, blue = (np.asarray(channel) for channel in image.split())
    gray = image.convert("L")
    levels = np.arange(256)
    shares: NDArray[np.float64] = np.array(gray.histogram(), dtype=np.float64) / (gray.width * gray.height)
    present = shares[shares > 0]
    mean = float(shares @ levels)
    wide = np.asarray(gray).astype(np.int16)
    laplacian = wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:] - 4 * wide[1:-1, 1:-1]
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    facts = (
        mean,
        math.sqrt(max(float(shares @ (levels - mean) ** 2), 0.0)),
        -float(present @ np.log2(present)),
        float(laplacian.var(dtype=np.float32)) if laplacian.size else 0.0,
        float(chroma.mean()),
    )
    return np.array((width, height, *facts, *_file_facts(source)), dtype=np.float32)


def _file_facts(source: str) -> tuple[int, int]:
    """What of ``KINDS`` a file is, and its number of images; 0 and 1 where the image is no file of its own."""
    try:
        header = read_header(source)
    except UserError:
        return 0, 1
    is_kind = {
        "animated": header.frames > 1,
        "cmyk": header.mode == "CMYK",
        "16-bit": header.deep,
        "rotated": header.turned,
        "transparent-palette": header.mode == "P" and header.transparent,
        "transparent": header.mode != "P" and header.transparent,
        "gray-file": header.mode in ("1", "L", "LA"),
    }
    return sum(KINDS[kind] for kind, holds in is_kind.items() if holds), header.frames


@dataclass(frozen=True)
class Outliers:
    """What one kind of finding found among the images of a set.

    Attributes:
        finding: such as ``blurry``.
        rows: int64 ``(n,)``, the worst first.
        values: float64 ``(n,)``, of each.
        threshold: which the values are beyond.
        severity: of each.
        suggestion: what to do.
    """

    finding: str
    rows: NDArray[np.int64]
    values: NDArray[np.float64]
    threshold: float
    severity: list[Severity]
    suggestion: str


@dataclass(frozen=True)
class _Rule:
    """A value of each image, and from where on it is a finding.

    Attributes:
        value: takes the facts, float64 by name.
        bound: beyond which a value must be, whatever the set.
        severe: beyond which it is a grave finding; always one, whatever the set.
        below: whether small values are the odd ones; otherwise large ones.
    """

    value: Callable[[dict[str, NDArray[np.float64]]], NDArray[np.float64]]
    bound: float
    severe: float
    below: bool
    suggestion: str


def _octaves(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many times a value is twice or half the median."""
    logs = np.log2(np.maximum(values, 1e-9))
    away: NDArray[np.float64] = np.abs(logs - np.median(logs))
    return away


_FLAT = 8.0  # Contrast in levels below which there are no edges that could be sharp.


def _sharpness(facts: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Sharpness, of flat images the median, because they are found to be dark, bright or empty instead."""
    sharpness: NDArray[np.float64] = np.where(
        facts["contrast"] < _FLAT, np.median(facts["sharpness"]), facts["sharpness"]
    )
    return sharpness


RULES: dict[str, _Rule] = {
    "low-information": _Rule(lambda facts: facts["entropy"], 3.0, 0.3, True, "nearly one color: remove or replace it"),
    "dark": _Rule(
        lambda facts: facts["brightness"], 50.0, 20.0, True, "underexposed: replace it, or check that it is meant"
    ),
    "bright": _Rule(
        lambda facts: facts["brightness"], 225.0, 254.0, False, "overexposed or empty: replace it, or check it"
    ),
    "blurry": _Rule(_sharpness, 100.0, 2.0, True, "replace it by a sharp one, or check that it is meant"),
    "odd-size": _Rule(
        lambda facts: _octaves(facts["width"] * facts["height"]),
        3.0,
        8.0,
        False,
        "8 times more or fewer pixels than usual: is it a thumbnail, or another kind of image?",
    ),
    "odd-aspect": _Rule(
        lambda facts: _octaves(facts["width"] / facts["height"]),
        1.0,
        3.0,
        False,
        "another shape than usual: the center crop cuts most of it away; crop it, or set image.resize: pad",
    ),
}
"""Bounds, in the units of ``FACTS``; of sizes and shapes in powers of two away from the median."""

GRAY, COLORED, FEW = 3.0, 6.0, 0.1
"""Chroma below which an image is gray and from which it is colored (JPEG leaves traces), and the share of images up to
which the other kind is the exception."""

_KIND_NOTES: dict[str, tuple[Severity, str]] = {
    "animated": ("medium", "only the first frame is read; save the frame that is meant"),
    "cmyk": ("low", "converted to RGB without its color profile; save it as RGB if colors matter"),
    "16-bit": ("low", "scaled to 8 bits by image.value_range"),
    "rotated": ("low", "turned upright by its orientation tag; other programs may not do that"),
    "transparent-palette": ("low", "transparent parts become white"),
    "transparent": ("low", "transparent parts become white"),
}


def outliers(facts: NDArray[np.float32], rows: NDArray[np.int64]) -> list[Outliers]:
    """Find what is odd among some images.

    Args:
        facts: float32 ``(N, F)``, see ``FACTS``.
        rows: int64 ``(n,)``, of those that can be read.
    """
    named = {name: facts[rows, place].astype(np.float64) for place, name in enumerate(FACTS)}
    found = [_beyond(name, rule, rule.value(named), rows) for name, rule in RULES.items()] if len(rows) else []
    found += _odd_colors(named["chroma"], rows) if len(rows) else []
    kinds = named["kind"].astype(np.int64)
    for name, (severity, note) in _KIND_NOTES.items():
        own = np.flatnonzero(kinds & KINDS[name])
        values = named["frames"][own] if name == "animated" else np.ones(len(own))
        found.append(Outliers(name, rows[own], values, 1.0, [severity] * len(own), note))
    return [one for one in found if len(one.rows)]


def _beyond(name: str, rule: _Rule, values: NDArray[np.float64], rows: NDArray[np.int64]) -> Outliers:
    sign = -1.0 if rule.below else 1.0
    # Of a variance the usual spread is that of its logarithm.
    scaled = np.log(np.maximum(values, 1e-3)) if name == "blurry" else values
    middle = np.median(scaled)
    spread = 1.4826 * float(np.median(np.abs(scaled - middle)))
    usual = float(middle + sign * FAR * spread)
    usual = float(np.exp(usual)) if name == "blurry" else usual
    # What is beyond all doubt is a finding also where most images are so.
    threshold = min(max(sign * usual, sign * rule.bound), sign * rule.severe)
    is_severe = sign * values >= sign * rule.severe
    places = np.flatnonzero((sign * values > threshold) | is_severe)
    places = places[np.argsort(-sign * values[places], kind="stable")]
    severity: list[Severity] = ["high" if is_severe[place] else "medium" for place in places.tolist()]
    return Outliers(name, rows[places], values[places], sign * threshold, severity, rule.suggestion)


def _odd_colors(chroma: NDArray[np.float64], rows: NDArray[np.int64]) -> list[Outliers]:
    """Gray images where nearly all are colored, and colored ones where nearly all are gray."""
    found = []
    for name, is_odd, threshold, note in (
        (
            "gray-in-color",
            chroma < GRAY,
            GRAY,
            "the only gray images may give their class away: color them all or none",
        ),
        (
            "color-in-gray",
            chroma >= COLORED,
            COLORED,
            "the only colored images: convert them to gray if color has no meaning",
        ),
    ):
        if 0 < is_odd.sum() <= FEW * len(rows):
            places = np.flatnonzero(is_odd)
            found.append(Outliers(name, rows[places], chroma[places], threshold, ["medium"] * len(places), note))
    return found
