"""Pictures that occur twice: exactly, pixel by pixel, or nearly.

Near duplicates (encoded again, scaled, a little brighter, a little cropped) are found in two steps. Difference hashes
name the candidates: two hashes within r of 64 bits agree in at least one of r + 1 pieces, so only pictures that share
a piece are compared (multi-index hashing, Norouzi, Punjani and Fleet, CVPR 2012), never all with all. The candidates'
pixels then decide.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from datamodules.same_picture import MIN_RESEMBLANCE, Thumbnail, resemblance, same_picture

Pairs = NDArray[np.int64]
"""``(P, 2)``, rows of the table, the smaller first, sorted, each pair once."""

NEAR_FORMAT = 1
"""Counts up when other pairs than before count as near duplicates, so that cached ones are looked for anew."""

RADII = (8, 6, 4, 2, 0)
"""Distances in bits up to which hashes are candidates; the largest one that is affordable is taken."""

_AFFORDABLE = 500_000_000  # Comparisons of hashes, about 10 seconds.
_CHUNK = 1_000_000
_BLOCK = 512
_KEPT_THUMBNAILS = 10_000  # About 350 MB.


def exact_pairs(content: NDArray[np.uint8], parts: NDArray[np.int8], readable: NDArray[np.bool_]) -> Pairs:
    """Pairs of identical pictures in different parts.

    Args:
        content: uint8 ``(N, 32)``, hash of each picture.
        parts: int8 ``(N,)``, the split of each.
        readable: bool ``(N,)``.

    Returns:
        Each picture whose like stands in another split, paired with the first of those.
    """
    pairs = []
    for group in identical_sets(content, readable):
        for row in group:
            others = group[parts[group] != parts[row]]
            if len(others):
                pairs.append((min(row, others[0]), max(row, others[0])))
    return _unique(np.array(pairs, dtype=np.int64).reshape(-1, 2))


def identical_sets(content: NDArray[np.uint8], readable: NDArray[np.bool_]) -> Iterator[NDArray[np.int64]]:
    """The rows of each picture that occurs more than once, ascending.

    Args:
        content: uint8 ``(N, 32)``, hash of each picture.
        readable: bool ``(N,)``.
    """
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
    parts: NDArray[np.int8],
    readable: NDArray[np.bool_],
    read_pixels: Callable[[int], NDArray[np.uint8]],
    progress: Callable[[Iterable[int], int], Iterator[int]],
) -> tuple[Pairs, int]:
    """Pairs of nearly the same picture in different parts; identical ones are among them.

    Args:
        perceptual: uint64 ``(N, 6)``, hashes of each picture and its crops.
        parts: int8 ``(N,)``, the split of each.
        readable: bool ``(N,)``.
        read_pixels: gives uint8 ``(H, W, 3)`` for a row.
        progress: shows how far the comparison is; gets the blocks of candidates and how many there are.

    Returns:
        The pairs, and the radius in bits up to which hashes were compared.
    """
    radius = _affordable_radius(perceptual[readable])
    rows = _candidates(perceptual, parts, readable, radius)

    @lru_cache(maxsize=_KEPT_THUMBNAILS)
    def thumbnail(row: int) -> Thumbnail:
        return Thumbnail(read_pixels(row))

    found = []
    for start in progress(range(0, len(rows), _BLOCK), -(-len(rows) // _BLOCK)):
        block = [(thumbnail(one), thumbnail(other)) for one, other in rows[start : start + _BLOCK].tolist()]
        for place in np.flatnonzero(resemblance(block) > MIN_RESEMBLANCE):
            if same_picture(*block[place]):
                found.append(rows[start + place])
    return np.array(found, dtype=np.int64).reshape(-1, 2), radius


def _unique(pairs: Pairs) -> Pairs:
    return np.unique(pairs, axis=0) if len(pairs) else pairs


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
    perceptual: NDArray[np.uint64], parts: NDArray[np.int8], readable: NDArray[np.bool_], radius: int
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
