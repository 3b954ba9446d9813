"""A tiny data set for the tests of exploration: flat images whose colour is their class."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.dataset.colour import centre_colour
from evaluation.dataset.sections import Collection, Looks, look_at
from vitrail.types import UNKNOWN

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 40), "blue": (30, 40, 220), "grey": (128, 128, 128)}
"""Classes, and what colour their images have."""

MATERIALS = ["metal", "wood"]


def image(row: int) -> NDArray[np.uint8]:
    """Image of a row: 20 × 30 pixels (every fifth 24 × 24) of its class's colour, a little darker with each row."""
    height, width = (24, 24) if row % 5 == 0 else (20, 30)
    colour = np.array(list(COLOURS.values())[row % 4], np.float64) * (1 - 0.005 * row)
    return np.broadcast_to(colour.astype(np.uint8), (height, width, 3)).copy()


def small_collection(n: int = 40, **changes: Any) -> Collection:
    """40 samples of 20 objects: the first half train, then val; test is empty; material follows from the class."""
    rows = np.arange(n)
    classes = rows % 4
    fields: dict[str, Any] = {
        "name": "Small",
        "names": np.array([f"photo {row}" for row in rows], dtype=object),
        "groups": np.array([f"object {row % (n // 2)}" for row in rows], dtype=object),
        "splits": np.where(rows < n // 2, "train", "val").astype(object),
        "tasks": {"class": list(COLOURS), "material": MATERIALS},
        "targets": {"class": classes, "material": np.where(rows == 1, UNKNOWN, classes % 2)},
        "usable": rows,
        "unreadable": {},
        "read": image,
        "captions": lambda chosen: [["an image"] if row % 2 else ["a b c d", ""] for row in chosen.tolist()],
    }
    return Collection(**{**fields, **changes})


def looks_of(collection: Collection) -> Looks:
    """All its images, looked at."""
    return look_at(collection, collection.usable, centre_colour)
