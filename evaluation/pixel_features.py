"""What a picture looks like in a few hundred numbers, without any network: where it is light, its colours, its edges.

Good enough to find what stands out; a trained network's vectors (``--gallery``) know far more.

* edges: histograms of oriented gradients, Dalal & Triggs, CVPR 2005, without their overlapping blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GRID = 10
"""Side of the thumbnail whose colours are features."""

CELLS, ORIENTATIONS = 6, 8
"""Of the edges: cells along a side, directions in each."""

_SIDE = 48
_HUES, _LEVELS = 12, 8


def pixel_features(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Thumbnail, colour histogram and edges of a picture of any size.

    Args:
        picture: uint8 ``(H, W, 3)``, RGB.

    Returns:
        float32 ``(D,)``, each number between 0 and 1.
    """
    image = Image.fromarray(picture)
    thumbnail = np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), np.float64) / 255
    small = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    hsv = np.asarray(small.convert("HSV"), np.float64) / 255
    grey = np.asarray(small.convert("L"), np.float64) / 255
    return np.concatenate([thumbnail.ravel(), _colours(hsv), _edges(grey)]).astype(np.float32)


def _colours(hsv: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares of hues, weighted by saturation so that grey counts for none, and of levels of saturation and value."""
    hue, saturation, value = hsv.reshape(-1, 3).T
    parts = [
        np.histogram(hue, _HUES, (0, 1), weights=saturation)[0],
        np.histogram(saturation, _LEVELS, (0, 1))[0],
        np.histogram(value, _LEVELS, (0, 1))[0],
    ]
    shares: NDArray[np.float64] = np.concatenate(parts) / len(hue)
    return shares


def _edges(grey: NDArray[np.float64]) -> NDArray[np.float64]:
    """Strength of edges by cell and direction, relative to the strongest cell's length."""
    down, across = np.gradient(grey)
    strength = np.hypot(down, across)
    # A light edge on dark and a dark one on light are the same edge.
    direction = (np.arctan2(down, across) / np.pi % 1 * ORIENTATIONS).astype(np.int64) % ORIENTATIONS
    place = np.arange(_SIDE) * CELLS // _SIDE
    cell = place[:, None] * CELLS + place[None, :]
    bins = np.zeros(CELLS * CELLS * ORIENTATIONS)
    np.add.at(bins, (cell * ORIENTATIONS + direction).ravel(), strength.ravel())
    lengths = np.linalg.norm(bins.reshape(-1, ORIENTATIONS), axis=1).max()
    edges: NDArray[np.float64] = bins / lengths if lengths > 0 else bins
    return edges
