"""Colours of classes: hue, saturation and value, and a map of the classes by the colour of their centre."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evaluation.dataset.features import thumbnail
from evaluation.dataset.figures import Tile, density_curves, image_map
from evaluation.dataset.projections import project
from evaluation.dataset.sections import Collection, ImageStats
from evaluation.report.page import Section
from vitrail.errors import UserError
from vitrail.trust import file_name
from vitrail.types import UNKNOWN

SIDE, PIXELS, NEIGHBOURS = 128, 5_000, 8
"""Side that images are scaled to, pixels sampled of each, and neighbours of a class on the map."""

LEVELS = 256
SHOWN_CLASSES, IMAGES_OF_CLASS = 6, 60
"""Classes that are chosen by default, the most frequent ones, and images of each at most."""

COLOURLESS = 0.05
"""Saturation up to which a pixel has no hue: its number would be that of red."""


def hsv_pixels(image: NDArray[np.uint8], rng: np.random.Generator, side: int, count: int) -> NDArray[np.float64]:
    """Sample hue, saturation and value of an image's pixels.

    Args:
        image: uint8 ``(H, W, 3)``, RGB.
        rng: random generator.
        side: that the image is scaled to, in pixels.
        count: how many; all where there are no more.

    Returns:
        float64 ``(count, 3)``, 0 to 1.
    """
    scaled = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
    pixels = np.asarray(scaled.convert("HSV"), np.float64).reshape(-1, 3) / 255
    return pixels if len(pixels) <= count else pixels[rng.choice(len(pixels), count, replace=False)]


def density(values: NDArray[np.float64], *, circular: bool = False) -> NDArray[np.float64]:
    """Return a Gaussian kernel density on 0 to 1, with Scott's bandwidth, from a fine histogram.

    The density stays inside: what a kernel would put beyond an end comes back from it, or at the other end where the
    values are circular.

    Returns:
        float64 ``(LEVELS,)`` at the middles of as many equal bins; its mean is 1, or 0 for no values.
    """
    from scipy.ndimage import gaussian_filter1d

    counts = np.histogram(values, LEVELS, (0, 1))[0].astype(np.float64)
    if not len(values):
        return counts
    # Scott, 1992; at least a bin, so that a single value is still a peak.
    bandwidth = max(float(values.std()) * len(values) ** -0.2, 1 / LEVELS)
    smooth = gaussian_filter1d(counts, bandwidth * LEVELS, mode="wrap" if circular else "reflect", truncate=6)
    result: NDArray[np.float64] = smooth * LEVELS / smooth.sum()
    return result


def class_densities(
    images: Iterable[NDArray[np.uint8]], rng: np.random.Generator, side: int = SIDE, count: int = PIXELS
) -> NDArray[np.float64]:
    """Return densities of the hue, saturation and value of some images, float64 ``(3, LEVELS)``.

    Pixels without colour are left out of the first row.
    """
    pixels: NDArray[Any] = np.concatenate([hsv_pixels(image, rng, side, count) for image in images])
    hue, saturation, value = pixels.T
    return np.stack([density(hue[saturation > COLOURLESS], circular=True), density(saturation), density(value)])


def density_section(
    collection: Collection,
    stats: ImageStats,
    task: str | None,
    chosen: Sequence[str] = (),
    *,
    side: int = SIDE,
    pixels: int = PIXELS,
    seed: int = 0,
) -> Section:
    """Densities of hue, saturation and value of some classes.

    Raises:
        UserError: for a class that the task does not have.
    """
    title = "Colours of classes"
    if task is None:
        return Section(
            title, missing=["The data have no labels, so there are no classes whose colours could be shown."]
        )
    names, targets = list(collection.tasks[task]), collection.targets[task][stats.rows]
    if strange := [name for name in chosen if name not in names]:
        raise UserError(f"--classes: {task} has no class {strange[0]!r}; it has {', '.join(names[:12])} …")
    counts = np.bincount(targets[targets != UNKNOWN], minlength=len(names))
    frequent = [names[code] for code in np.argsort(-counts, kind="stable")[:SHOWN_CLASSES] if counts[code]]
    shown = list(dict.fromkeys(chosen)) or frequent
    curves, missing = {}, []
    for name in shown:
        code = names.index(name)
        rows = stats.rows[targets == code][:IMAGES_OF_CLASS]
        if len(rows):
            images = (collection.read(row) for row in rows.tolist())
            curves[name] = class_densities(images, np.random.default_rng([seed, code]), side, pixels)
        else:
            missing.append(f"{name} has no image among {stats.summary}.")
    if not curves:
        return Section(title, missing=[*missing, "No image has a known class."])
    levels = (np.arange(LEVELS) + 0.5) / LEVELS
    paragraphs = [
        f"Kernel densities of {len(curves)} classes ({task}): up to {IMAGES_OF_CLASS} images each, scaled to "
        f"{side} × {side}, {pixels:,} pixels an image. Where curves differ, colour alone distinguishes classes. Pixels "
        f"without colour (saturation up to {COLOURLESS:g}) have no hue and are left out of the first panel."
    ]
    figure = density_curves(curves, levels, f"{task}: hue, saturation, value")
    return Section(title, paragraphs, {f"hsv_{file_name(task)}": figure}, missing=missing)


def centroid_section(
    collection: Collection, stats: ImageStats, task: str | None, *, neighbours: int = NEIGHBOURS
) -> Section:
    """Isomap of the classes by the mean colour of their images' centres, an image for each."""
    title = "Map of classes by colour"
    if task is None:
        return Section(title, missing=["The data have no labels, so there are no classes to be laid out."])
    targets = collection.targets[task][stats.rows]
    codes = np.unique(targets[targets != UNKNOWN])
    if len(codes) < 3:
        return Section(title, missing=[f"{task} has {len(codes)} classes with images; a map needs three at least."])
    centroids = np.stack([stats.centres[targets == code].mean(axis=0) for code in codes])
    places = project(centroids, "isomap", neighbours=neighbours)
    names = collection.tasks[task]
    tiles = [
        Tile(thumbnail(collection.read(_nearest(stats, targets, code, centre))), names[code])
        for code, centre in zip(codes.tolist(), centroids, strict=True)
    ]
    paragraphs = [
        f"Isomap of {len(codes)} classes with {min(neighbours, len(codes) - 1)} neighbours each. A class is the mean "
        "hue, saturation and value of the middle of its images; the image shown is the one nearest to that. "
        "Neighbours are easily confused by colour. Hue is averaged as a number, so reds may be far from each other."
    ]
    figure = image_map(places, tiles, f"{task}: classes by the colour of their centre")
    return Section(title, paragraphs, {f"isomap_{file_name(task)}": figure})


def _nearest(stats: ImageStats, targets: NDArray[np.int64], code: int, centre: NDArray[np.float64]) -> int:
    """Row of the class's image that is nearest to its centroid."""
    places = np.flatnonzero(targets == code)
    return int(stats.rows[places[((stats.centres[places] - centre) ** 2).sum(axis=1).argmin()]])
