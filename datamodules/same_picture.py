"""Whether two pictures are nearly the same one: encoded again, scaled, a little brighter, a little cropped.

Their thumbnails are laid over each other with the crop, brightness and contrast that fit best, and what is left over
must be small everywhere. Products that are photographed alike, which share their hashes, fail that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.verification import HASH_BOXES

MIN_RESEMBLANCE = 0.94
"""Correlation of the best boxes below which two pictures need not be compared any further."""

_SIDE, _SMALL, _FINE = 64, 16, 32

# Found on 600 photos of products and 4,076 of fashion: crops up to 5 % a side, JPEG quality 40, scaling to 60 %
# and brightness ±10 % stay within for at least 93 % of the pictures, 6 of 5.5 million pairs of other photos do.
_ENOUGH = (0.0, 0.95, 0.97, 0.98, 0.98, 0.98)  # Correlation that each step of the alignment must reach.
_UNDECIDED = 0.02
_MIN_DETAIL = 0.965
_MAX_RESIDUAL = 0.13
_MAX_BLOCK = 11.0
_MAX_SHIFT = 40.0
_FLAT = 4.0
_MAX_CROP = 12
_MAX_STEP = 4.0
_LOWEST = np.array([0, 0, 100 - _MAX_CROP, 100 - _MAX_CROP])
_HIGHEST = np.array([_MAX_CROP, _MAX_CROP, 100, 100])


class Thumbnail:
    """A small picture, and its boxes smaller still.

    Attributes:
        whole: float32 ``(16, 16, 3)``.
        boxes: float32 ``(6, 768)``, each of ``HASH_BOXES`` with mean 0 and length 1.
        is_flat: whether there is nothing to be seen; such a picture looks like every other.
    """

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self._picture = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
        self.whole = self.cut(HASH_BOXES[0])
        self.boxes = np.stack([_normalised(self.cut(box)) for box in HASH_BOXES])
        self.is_flat = bool(self.whole.std() < _FLAT)

    def cut(self, box: Sequence[float], side: int = _SMALL) -> NDArray[np.float32]:
        """Part of the picture, float32 ``(side, side, 3)``; left, top, right and bottom in percent."""
        # The triangle filter reaches over cell borders, which forgives a shift by part of a cell.
        left, top, right, bottom = (value * (_SIDE / 100) for value in box)
        small = self._picture.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        return np.asarray(small, dtype=np.float32)


def _normalised(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The pixels in a row, with mean 0 and length 1, so that a product of two is their correlation."""
    flat = (pixels - pixels.mean()).ravel()
    unit: NDArray[np.float32] = flat / max(float(flat @ flat), 1e-6) ** 0.5
    return unit


def resemblance(block: Sequence[tuple[Thumbnail, Thumbnail]]) -> NDArray[np.float32]:
    """For each pair the highest correlation of a box of one with the whole of the other."""
    one, other = (np.stack([pair[side].boxes for pair in block]) for side in (0, 1))
    forth, back = (one * other[:, :1]).sum(axis=-1), (other * one[:, :1]).sum(axis=-1)
    best: NDArray[np.float32] = np.maximum(forth, back).max(axis=1)
    return best


def same_picture(one: Thumbnail, other: Thumbnail) -> bool:
    """Whether one is nearly the other, whichever of them was cropped."""
    if one.is_flat or other.is_flat:
        return False
    forth, back = (float((a.boxes @ b.boxes[0]).max()) for a, b in ((one, other), (other, one)))
    ways = [(one, other), (other, one)] if forth >= back else [(other, one), (one, other)]
    # Where one is clearly a part of the other, there is no need to look for the other in the one.
    for outer, inner in ways if abs(forth - back) < _UNDECIDED else ways[:1]:
        box = _aligned(outer, inner)
        if box is not None and _fits(outer.cut(box, _FINE), inner.cut(HASH_BOXES[0], _FINE)):
            return True
    return False


def _aligned(outer: Thumbnail, inner: Thumbnail) -> list[float] | None:
    """The box of the outer picture that resembles the inner one most.

    The four edges of the part are moved as B. Lucas and T. Kanade move a window ("An iterative image registration
    technique", IJCAI 1981), together with gain and offset, from the best of the known boxes on.

    Returns:
        Left, top, right and bottom in percent, or nothing where the two do not fit.
    """
    wanted, target = inner.boxes[0], inner.whole.reshape(-1)
    box = np.array(HASH_BOXES[int((outer.boxes @ wanted).argmax())], dtype=np.float64)
    best, score = None, _ENOUGH[-1]
    for enough in _ENOUGH:
        cut = outer.cut(box.tolist())
        value = float(_normalised(cut) @ wanted)
        if value < enough:
            break
        if value > score:
            best, score = box.tolist(), value
        slopes = _slopes(cut, box)
        normal = slopes @ slopes.T
        normal.ravel()[:: len(normal) + 1] *= 1.0001  # Solvable also where nothing is to be seen along an axis.
        change = np.linalg.solve(normal + 1e-6 * np.eye(len(normal)), slopes @ (target - cut.reshape(-1)))
        box = (box + change[:4].clip(-_MAX_STEP, _MAX_STEP)).clip(_LOWEST, _HIGHEST)
    return best


def _slopes(cut: NDArray[np.float32], box: NDArray[np.float64]) -> NDArray[np.float32]:
    """How each value of the cut changes with left, top, right and bottom edge (a percent), gain and offset.

    Returns:
        float32 ``(6, 768)``.
    """
    width, height = (box[2:] - box[:2]) / _SMALL
    along_y, along_x = np.gradient(cut, axis=(0, 1))
    along_x, along_y = along_x / width, along_y / height
    share = ((np.arange(_SMALL) + 0.5) / _SMALL).astype(np.float32)
    x, y = share[None, :, None], share[:, None, None]
    planes = (along_x * (1 - x), along_y * (1 - y), along_x * x, along_y * y, cut, np.ones_like(cut))
    return np.stack([plane.reshape(-1) for plane in planes]).astype(np.float32)


def _fits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    """Whether one is the other with a slightly different brightness and contrast, in tone and in detail."""
    if float(_normalised(_detail(a)) @ _normalised(_detail(b))) < _MIN_DETAIL:
        return False
    residual, shift = min(_left_over(a, b), _left_over(b, a), key=lambda found: float((found[0] ** 2).mean()))
    blocks = np.abs(residual.reshape(_FINE // 4, 4, _FINE // 4, 4, 3).mean(axis=(1, 3)))
    relative = float(np.sqrt((residual**2).mean())) / float(b.std())
    return relative < _MAX_RESIDUAL and float(blocks.max()) < _MAX_BLOCK and shift < _MAX_SHIFT


def _detail(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Edges and texture: the grey picture less its mean over 3 × 3 cells, float32 ``(32, 32)``."""
    grey, side = pixels.mean(axis=-1), len(pixels)
    padded = np.pad(grey, 1, mode="edge")
    blurred = sum(padded[row : row + side, column : column + side] for row in range(3) for column in range(3))
    detail: NDArray[np.float32] = grey - blurred / 9
    return detail


def _left_over(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """What of b is not a with one gain and one offset, cut off at black and white; and the largest change of tone.

    Returns:
        float32 ``(32, 32, 3)`` and the change, both in grey levels.
    """
    seen = (b > 4) & (b < 249)  # What was cut off says nothing of the gain.
    if seen.sum() < 40:
        seen = np.ones_like(seen)
    x, y = a[seen], b[seen]
    dx = x - x.mean()
    gain = float((dx * (y - y.mean())).sum()) / max(float((dx * dx).sum()), 1e-6)
    toned = (gain * (a - x.mean()) + y.mean()).clip(0, 255)
    return b - toned, float(np.abs(toned - a).max())
