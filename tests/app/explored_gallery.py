"""A gallery for tests of the dataset browser: labels, some unknown, answers, some wrong, and images with colours."""

from __future__ import annotations

import colorsys
import io
from pathlib import Path

import numpy as np
from PIL import Image

from app.state.galleries import ServedGallery
from retrieval.gallery import Gallery
from tests.support.galleries import identity, image_rows, vectors

N = 230
CLASSES = ["bowl", "cap", "mug", "<b>vase</b>"]
HUES = {"bowl": 0.0, "cap": 0.33, "mug": 0.66, "<b>vase</b>": 0.15}
"""Hue of the images of each class."""

COLOURS = ["blue", "green, dark", "red"]
UNREADABLE = 5
"""Row whose image is none."""


def explored_gallery(folder: Path, name: str = "wares", n: int = N) -> ServedGallery:
    """A gallery of ``n`` images ``p0``, ``p1`` …, drawn with a seed.

    Args:
        folder: where it is made.
        name: what it is served as.
        n: number of images.
    """
    rng = np.random.default_rng(7)
    made_by = identity(
        encodes_text=False,
        labels=["class", "colour"],
        predicts={"class": CLASSES, "colour": COLOURS, "size": ["s", "l"]},
    )
    labels = rng.choice(CLASSES, n, p=[0.4, 0.3, 0.2, 0.1]).tolist()
    colours = rng.choice(COLOURS, n).tolist()
    answers = [label if rng.random() < 0.7 else str(rng.choice(CLASSES)) for label in labels]
    images = [_jpeg(HUES[label], rng) for label in labels]
    images[UNREADABLE] = b"none"
    rows = image_rows(
        made_by,
        [f"p{row}" for row in range(n)],
        vectors(n),
        split=rng.choice(["train", "val", "test"], n, p=[0.6, 0.2, 0.2]).tolist(),
        label_class=labels,
        predicted_class=answers,
        confidence_class=rng.choice([0.5, 0.75, 0.9, 0.99], n).tolist(),
        label_colour=[None if row % 10 == 3 else colour for row, colour in enumerate(colours)],
        predicted_colour=rng.choice(COLOURS, n).tolist(),
        confidence_colour=rng.random(n).tolist(),
        predicted_size=rng.choice(["s", "l"], n).tolist(),
        confidence_size=rng.random(n).tolist(),
        caption=[f"a {label}" for label in labels],
        thumbnail=images,
    )
    gallery = Gallery.create(str(folder), made_by)
    with gallery.writing() as writer:
        writer.add(rows)
    return ServedGallery(folder, name)


def _jpeg(hue: float, rng: np.random.Generator) -> bytes:
    """A small image of one hue and random brightness."""
    pixels = np.array(colorsys.hsv_to_rgb(hue, 0.9, 1.0)) * rng.uniform(0.4, 0.9, (8, 8, 1)) * 255
    content = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(content, format="PNG")
    return content.getvalue()
