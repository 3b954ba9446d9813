"""Folders of images with more than 8 bits a channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_deep_folder(root: Path, highest: int = 4095, *, count: int = 6, suffix: str = "png") -> Path:
    """Write ``root/{bag,cup}/N.suffix`` of 16 bits a pixel, of which the largest value is used once.

    Args:
        root: folder.
        highest: largest value.
        count: images of a class.
        suffix: file format.
    """
    for place, name in enumerate(("bag", "cup")):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            rng = np.random.default_rng(100 * place + number)
            values = rng.integers(0, highest // 2, (24, 24), dtype=np.uint16)
            values[number, place] = highest if (place, number) == (0, 0) else highest // 2
            Image.fromarray(values).save(root / name / f"{number}.{suffix}")
    return root
