"""A tiny Flowers-102 in torchvision's directory layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.io import savemat

from tests.fake_images import COLOURS, draw_image

NAMES = [f"flower {number}" for number in range(1, 103)]


def write_flowers(
    root: Path,
    *,
    classes: int = 8,
    per_class: int = 6,
    size: int = 32,
    lists: Mapping[str, Sequence[int]] | None = None,
) -> Path:
    """Writes images, ``setid.mat``, ``imagelabels.mat`` and ``cat_to_name.json``.

    Of each class's photos, numbered one after the other, the first third is trnid, the second valid, the rest tstid.

    Args:
        root: folder that will hold ``flowers-102``, made where missing.
        classes: number of classes that have images, half of them from 1 on, half from 52 on.
        per_class: images of each.
        size: side of the images in pixels.
        lists: ``trnid``, ``valid`` and ``tstid`` instead.

    Returns:
        The root.
    """
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True, exist_ok=True)
    half = classes // 2
    own = [*range(1, half + 1), *range(52, 52 + classes - half)]
    labels = [label for label in own for _ in range(per_class)]
    colours = list(COLOURS)
    for number, label in enumerate(labels, start=1):
        kind = own.index(label)
        image = draw_image(kind % 5, colours[kind % len(colours)], look=number, size=(size, size))
        image.save(folder / "jpg" / f"image_{number:05d}.jpg", quality=95)
    place = [number % per_class for number in range(len(labels))]
    third = per_class // 3
    parts = {
        "trnid": [n + 1 for n, p in enumerate(place) if p < third],
        "valid": [n + 1 for n, p in enumerate(place) if third <= p < 2 * third],
        "tstid": [n + 1 for n, p in enumerate(place) if p >= 2 * third],
    }
    parts |= {key: list(numbers) for key, numbers in (lists or {}).items()}
    savemat(folder / "setid.mat", {key: np.array([numbers], dtype=np.uint16) for key, numbers in parts.items()})
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    named = {str(number): name for number, name in enumerate(NAMES, start=1)}
    (root / "cat_to_name.json").write_text(json.dumps(named), encoding="utf-8")
    return root
