"""Leafing through pictures: pages, an order drawn with a seed, and the next picture in it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Page(NamedTuple):
    """Some of the rows.

    Attributes:
        rows: int64 ``(n,)``.
        number: of the page, from 1.
        pages: how many there are, at least 1.
        first: place of its first row among all rows, from 1; 0 where there are none.
    """

    rows: NDArray[np.int64]
    number: int
    pages: int
    first: int


def shuffled(rows: NDArray[np.int64], seed: int | None) -> NDArray[np.int64]:
    """The rows in an order drawn with a seed; as they are without one."""
    return rows if seed is None else np.random.default_rng(seed).permutation(rows)


def page_of(rows: NDArray[np.int64], number: int, size: int) -> Page:
    """A page of rows; numbers outside are those of the nearest page.

    Args:
        rows: int64 ``(n,)``.
        number: from 1.
        size: rows of a page.
    """
    pages = max(1, -(-len(rows) // size))
    number = min(max(number, 1), pages)
    start = (number - 1) * size
    return Page(rows[start : start + size], number, pages, start + 1 if len(rows) else 0)


def step(rows: NDArray[np.int64], current: int | None, by: int) -> int:
    """Place of the next picture in an order; it ends at both ends.

    Args:
        rows: int64 ``(n,)``, at least one.
        current: row that is shown; None, or one that is not among them, for the first.
        by: how far to go, negative for back.
    """
    found = np.flatnonzero(rows == current) if current is not None else rows[:0]
    if not len(found):
        return 0
    return int(np.clip(found[0] + by, 0, len(rows) - 1))
