"""A copy of vectors in a quarter of their bytes, with a bound on what it gets wrong.

Reading a million vectors from memory is what a search of one query takes its time for. With eight bits a number there
is a quarter to read, and processors with integer dot products (VNNI) multiply four times as many at once. Dot products
with the copy are off by at most ``CoarseQuery.margin`` (Cauchy-Schwarz on the lengths of what rounding left). Whoever
looks at all rows within the margin, and computes these anew, has the exact answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVELS = 127
"""Largest code; -128 stays unused, so that codes are symmetric."""

_ROUNDING = 1e-6
"""Relative slack for the rounding of float32 in what is computed about a copy."""

_BLOCK = 16384
"""Rows at a time."""


@dataclass(frozen=True)
class Coarse:
    """Vectors as ``centre + scale * codes``, rounded.

    Attributes:
        codes: int8 ``(N, D)``.
        centre: float32 ``(D,)``, mean of the vectors: what all have in common needs no bits.
        scale: float32 ``(D,)``, greater than 0, step from one code to the next.
        residual: largest length of a row of ``vectors - centre - scale * codes``.
        reach: largest length of a row of ``codes``.
        norm: largest length of a vector.
    """

    codes: NDArray[np.int8]
    centre: NDArray[np.float32]
    scale: NDArray[np.float32]
    residual: float
    reach: float
    norm: float


class CoarseQuery(NamedTuple):
    """Queries for a coarse copy: a score is ``offset + factor * (codes @ query)``, give or take ``margin``.

    Attributes:
        codes: int8 ``(Q, D)``.
        offset: float64 ``(Q,)``.
        factor: float64 ``(Q,)``, greater than 0.
        margin: float64 ``(Q,)``.
    """

    codes: NDArray[np.int8]
    offset: NDArray[np.float64]
    factor: NDArray[np.float64]
    margin: NDArray[np.float64]


class Spread:
    """Mean and extremes of each dimension, gathered batch by batch."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.total = np.zeros(dim)
        self.low = np.full(dim, np.inf, np.float32)
        self.high = np.full(dim, -np.inf, np.float32)

    def add(self, vectors: NDArray[np.float32]) -> None:
        """Counts vectors ``(B, D)``."""
        if not len(vectors):
            return
        self.count += len(vectors)
        self.total += vectors.sum(axis=0, dtype=np.float64)
        np.minimum(self.low, vectors.min(axis=0), out=self.low)
        np.maximum(self.high, vectors.max(axis=0), out=self.high)

    def centre_and_scale(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Centre and step of each dimension, float32 ``(D,)``; no vector lies outside of the codes."""
        if not self.count:
            return np.zeros_like(self.low), np.ones_like(self.low)
        centre = (self.total / self.count).astype(np.float32)
        scale = np.maximum(self.high - centre, centre - self.low) / LEVELS
        return centre, np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32)


class Coder:
    """Turns vectors into codes, block by block, and keeps the bounds."""

    def __init__(self, centre: NDArray[np.float32], scale: NDArray[np.float32]) -> None:
        self.centre, self.scale = centre, scale
        self.residual = self.reach = self.norm = 0.0

    def code(self, vectors: NDArray[np.float32]) -> NDArray[np.int8]:
        """Codes of vectors ``(B, D)``, int8 ``(B, D)``."""
        away = vectors - self.centre
        rounded = np.rint(away / self.scale)
        np.clip(rounded, -LEVELS, LEVELS, out=rounded)
        self.norm = max(self.norm, longest(vectors))
        self.reach = max(self.reach, longest(rounded))
        self.residual = max(self.residual, longest(away - rounded * self.scale) + _ROUNDING * longest(away))
        codes: NDArray[np.int8] = rounded.astype(np.int8)
        return codes

    def done(self, codes: NDArray[np.int8]) -> Coarse:
        """The copy, with all codes."""
        return Coarse(codes, self.centre, self.scale, self.residual, self.reach, self.norm)


def coarse_copy(matrix: NDArray[np.float32]) -> Coarse:
    """A coarse copy in memory.

    Args:
        matrix: float32 ``(N, D)``, finite.
    """
    spread = Spread(matrix.shape[1])
    for block in blocks(matrix):
        spread.add(block)
    coder = Coder(*spread.centre_and_scale())
    codes = [coder.code(block) for block in blocks(matrix)]
    return coder.done(np.concatenate(codes) if codes else np.zeros(matrix.shape, np.int8))


def blocks(matrix: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """The rows of a matrix, some at a time."""
    for start in range(0, len(matrix), _BLOCK):
        yield matrix[start : start + _BLOCK]


def longest(rows: NDArray[np.float32]) -> float:
    """Largest Euclidean length of the rows ``(B, D)``, 0 without rows."""
    return float(np.sqrt(np.einsum("ij,ij->i", rows, rows).max(initial=0)))


def coarse_queries(coarse: Coarse, queries: NDArray[np.float64]) -> CoarseQuery:
    """Queries in codes, and how far scores may be off.

    With ``w = queries * scale`` a score is ``query · centre + w · codes + query · residual``; ``w`` has codes too.

    Args:
        coarse: the copy to be asked.
        queries: float64 ``(Q, D)``.
    """
    weighted = queries * coarse.scale
    factor = np.maximum(np.abs(weighted).max(axis=1, initial=0) / LEVELS, np.finfo(np.float64).tiny)
    codes = np.rint(weighted / factor[:, None])
    lost = np.linalg.norm(weighted - factor[:, None] * codes, axis=1)
    lengths = np.linalg.norm(queries, axis=1)
    margin = lost * coarse.reach + lengths * (coarse.residual + _ROUNDING * coarse.norm)
    return CoarseQuery(codes.astype(np.int8), queries @ coarse.centre.astype(np.float64), factor, margin * 1.0001)
