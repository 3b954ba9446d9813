"""Images that occur twice: exactly, pixel by pixel, or nearly.

Near duplicates (encoded again, scaled, a little brighter, a little cropped) are found in two steps. Difference hashes
name the candidates: two hashes within r of 64 bits agree in at least one of r + 1 pieces, so only images that share
a piece are compared (multi-index hashing, Norouzi, Punjani and Fleet, CVPR 2012), never all with all. Then thumbnails
are aligned with the crop, brightness and contrast that fit best, and the residual must be small everywhere: products
that are photographed alike, which share their hashes, fail that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.checks.verify import HASH_BOXES
from vitrail.console import tracked

MIN_RESEMBLANCE = 0.94
"""Correlation of the best boxes below which two images need not be compared any further."""

_SIDE, _SMALL, _FINE = 64, 16, 32

# Found on 600 photos of products and 4,076 of fashion: crops up to 5 % a side, JPEG quality 40, scaling to 60 %
# and brightness ±10 % stay within for at least 93 % of the images, 6 of 5.5 million pairs of other photos do.
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
    """A small image, and its boxes smaller still.

    Attributes:
        whole: float32 ``(16, 16, 3)``.
        boxes: float32 ``(6, 768)``, each of ``HASH_BOXES`` with mean 0 and length 1.
        is_flat: whether it has no detail; such an image looks like every other.
    """

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        self._image = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
        self.whole = self.cut(HASH_BOXES[0])
        self.boxes = np.stack([_normalised(self.cut(box)) for box in HASH_BOXES])
        self.is_flat = bool(self.whole.std() < _FLAT)

    def cut(self, box: Sequence[float], side: int = _SMALL) -> NDArray[np.float32]:
        """Return part of the image, float32 ``(side, side, 3)``; left, top, right and bottom in percent."""
        # The triangle filter reaches over cell borders, which forgives a shift by part of a cell.
        left, top, right, bottom = (value * (_SIDE / 100) for value in box)
        small = self._image.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        return np.asarray(small, dtype=np.float32)


def _normalised(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The pixels in a row, with mean 0 and length 1, so that a product of two is their correlation."""
    flat = (pixels - pixels.mean()).ravel()
    unit: NDArray[np.float32] = flat / max(float(flat @ flat), 1e-6) ** 0.5
    return unit


def resemblance(block: Sequence[tuple[Thumbnail, Thumbnail]]) -> NDArray[np.float32]:
    """Return for each pair the highest correlation of a box of one with the whole of the other."""
    one, other = (np.stack([pair[side].boxes for pair in block]) for side in (0, 1))
    forth, back = (one * other[:, :1]).sum(axis=-1), (other * one[:, :1]).sum(axis=-1)
    best: NDArray[np.float32] = np.maximum(forth, back).max(axis=1)
    return best


def same_image(one: Thumbnail, other: Thumbnail) -> bool:
    """Return whether one is nearly the other, whichever of them was cropped."""
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
    """The box of the outer image (in percent) that resembles the inner one most, None where they do not fit.

    Its four edges are moved as B. Lucas and T. Kanade move a window ("An iterative image registration technique",
    IJCAI 1981), together with gain and offset, from the best of the known boxes on.
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
    """Change of each value of the cut with left, top, right and bottom edge (a percent), gain, offset; ``(6, 768)``."""
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
    """Edges and texture: the grey image less its mean over 3 × 3 cells, float32 ``(32, 32)``."""
    grey, side = pixels.mean(axis=-1), len(pixels)
    padded = np.pad(grey, 1, mode="edge")
    blurred = sum(padded[row : row + side, column : column + side] for row in range(3) for column in range(3))
    detail: NDArray[np.float32] = grey - blurred / 9
    return detail


def _left_over(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """Residual of b against a with one gain and offset, ``(32, 32, 3)``, and the largest change of tone, in levels."""
    usable = (b > 4) & (b < 249)  # Clipped values do not depend on the gain.
    if usable.sum() < 40:
        usable = np.ones_like(usable)
    x, y = a[usable], b[usable]
    dx = x - x.mean()
    gain = float((dx * (y - y.mean())).sum()) / max(float((dx * dx).sum()), 1e-6)
    toned = (gain * (a - x.mean()) + y.mean()).clip(0, 255)
    return b - toned, float(np.abs(toned - a).max())


Pairs = NDArray[np.int64]
"""``(P, 2)``, rows of the table, the smaller first, sorted, each pair once."""

NEAR_FORMAT = 1
"""Counts up when other pairs than before count as near duplicates, so that cached ones are computed again."""

RADII = (8, 6, 4, 2, 0)
"""Distances in bits up to which hashes are candidates; the largest one that is affordable is taken."""

_AFFORDABLE = 500_000_000  # Comparisons of hashes, about 10 seconds.
_CHUNK = 1_000_000
_BLOCK = 512
_KEPT_THUMBNAILS = 10_000  # About 350 MB.


def exact_pairs(content: NDArray[np.uint8], parts: NDArray[np.integer[Any]], readable: NDArray[np.bool_]) -> Pairs:
    """Return each image that has an identical one in another part, paired with the first of those.

    Args:
        content: uint8 ``(N, 32)``, hash of each image.
        parts: whole numbers ``(N,)``, such as the split of each.
        readable: bool ``(N,)``.
    """
    pairs = []
    for group in identical_sets(content, readable):
        for row in group:
            others = group[parts[group] != parts[row]]
            if len(others):
                pairs.append((min(row, others[0]), max(row, others[0])))
    return np.unique(np.array(pairs, dtype=np.int64).reshape(-1, 2), axis=0)


def identical_sets(content: NDArray[np.uint8], readable: NDArray[np.bool_]) -> Iterator[NDArray[np.int64]]:
    """Yield the rows, ascending, of each image that occurs more than once; arguments as of ``exact_pairs``."""
    rows = np.flatnonzero(readable)
    keys = np.ascontiguousarray(content[rows]).view("V32").ravel()
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    # Runs of equal neighbours: where one begins, and where it ends.
    edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
    for start, stop in edges.reshape(-1, 2).tolist():
        yield rows[order[start : stop + 1]]


def near_pairs(
    perceptual: NDArray[np.uint64],
    parts: NDArray[np.integer[Any]],
    readable: NDArray[np.bool_],
    read_pixels: Callable[[int], NDArray[np.uint8]],
) -> tuple[Pairs, int]:
    """Return pairs of nearly the same image in different parts, identical ones included, and the radius of hashes.

    Args:
        perceptual: uint64 ``(N, 6)``, hashes of each image and its crops.
        parts: whole numbers ``(N,)``, such as the split of each.
        readable: bool ``(N,)``.
        read_pixels: returns uint8 ``(H, W, 3)`` for a row.
    """
    radius = _affordable_radius(perceptual[readable])
    rows = _candidates(perceptual, parts, readable, radius)

    @lru_cache(maxsize=_KEPT_THUMBNAILS)
    def thumbnail(row: int) -> Thumbnail:
        return Thumbnail(read_pixels(row))

    found = []
    for start in tracked(range(0, len(rows), _BLOCK), "comparing similar images", -(-len(rows) // _BLOCK)):
        block = [(thumbnail(one), thumbnail(other)) for one, other in rows[start : start + _BLOCK].tolist()]
        for place in np.flatnonzero(resemblance(block) > MIN_RESEMBLANCE):
            if same_image(*block[place]):
                found.append(rows[start + place])
    return np.array(found, dtype=np.int64).reshape(-1, 2), radius


def _pieces(hashes: NDArray[np.uint64], radius: int) -> list[NDArray[np.uint64]]:
    """The hashes cut into radius + 1 pieces of nearly the same number of bits."""
    bounds = np.linspace(0, 64, radius + 2).astype(int)
    return [
        (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1) for low, high in itertools.pairwise(bounds)
    ]


def _affordable_radius(hashes: NDArray[np.uint64]) -> int:
    """The largest radius whose buckets hold few enough pairs."""
    for radius in RADII[:-1]:
        # At least three pieces, so a piece has at most 22 bits and its values can be counted in an array.
        pieces = [piece.astype(np.int64) for piece in _pieces(hashes, radius)]
        if sum(int(np.bincount(piece[:, 0], minlength=1 << 22)[piece].sum()) for piece in pieces) <= _AFFORDABLE:
            return radius
    return RADII[-1]


def _candidates(
    perceptual: NDArray[np.uint64], parts: NDArray[np.integer[Any]], readable: NDArray[np.bool_], radius: int
) -> Pairs:
    """Pairs in different parts, one of whose boxes has nearly the hash of the other's whole."""
    rows = np.flatnonzero(readable)
    hashes, count = perceptual[rows], len(rows)
    codes = [np.zeros(0, dtype=np.int64)]
    for piece in _pieces(hashes, radius):
        order = np.argsort(piece[:, 0], kind="stable")
        ordered = piece[order, 0]
        for box in range(hashes.shape[1]):
            low = np.searchsorted(ordered, piece[:, box], side="left")
            sizes = np.searchsorted(ordered, piece[:, box], side="right") - low
            for start, stop in _spans(sizes):
                spread = sizes[start:stop]
                query = np.repeat(np.arange(start, stop), spread)
                # Within each query's bucket count from 0.
                within = np.arange(len(query)) - np.repeat(np.cumsum(spread) - spread, spread)
                other = order[np.repeat(low[start:stop], spread) + within]
                near = np.flatnonzero(np.bitwise_count(hashes[query, box] ^ hashes[other, 0]) <= radius)
                query, other = query[near], other[near]
                apart = parts[rows[query]] != parts[rows[other]]
                codes.append(np.minimum(query, other)[apart] * count + np.maximum(query, other)[apart])
    found = np.unique(np.concatenate(codes))
    return np.stack([rows[found // max(count, 1)], rows[found % max(count, 1)]], axis=1)


def _spans(sizes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of queries that together have a bounded number of comparisons."""
    total = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = total[start - 1] if start else 0
        stop = max(int(np.searchsorted(total, before + _CHUNK, side="right")), start + 1)
        yield start, stop
        start = stop
