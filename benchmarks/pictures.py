"""Folders of pictures for timings: ``train/<class>/<number>.jpg``, photo-like in size and detail."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 8


def write_photos(root: Path, number: int, size: int) -> Path:
    """Writes JPEGs whose long side has ``size`` pixels: blurred noise with grain, as costly as photos.

    Args:
        root: folder to be made.
        number: of pictures.
        size: in pixels.

    Returns:
        The folder.
    """
    draw = np.random.default_rng(0)
    short = size * 3 // 4
    for index in range(number):
        coarse = Image.fromarray(draw.integers(0, 256, (short // 16, size // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((size, short), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = draw.normal(0, 6, (short, size, 1)).astype(np.float32)
        picture = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
        path = root / "train" / f"class_{index % CLASSES}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90)
    return root


def linked_products(root: Path) -> Path | None:
    """The product photos (about 128 px) where ``$VITRINE_DATA`` has them, as a folder of links; else None."""
    images = Path(os.environ.get("VITRINE_DATA", "data")) / "products" / "images"
    if not images.is_dir():
        return None
    for index, picture in enumerate(sorted(images.glob("*.jpg"))):
        link = root / "train" / f"class_{index % CLASSES}" / picture.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(picture.resolve())
    return root
