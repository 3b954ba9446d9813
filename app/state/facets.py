"""The values of a task for the images of a gallery, by which they are filtered, counted and coloured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

NOT_KNOWN, NO_LABEL = "(not known)", "(no label)"
"""Values of an image whose label is not known, and of one that has none of a multi-label task's."""

_SHARES = (0.2, 0.4, 0.6, 0.8)
"""Quantiles between the ranges of numbers."""


@dataclass(frozen=True)
class Facet:
    """The value of a task for each of N images; several of a multi-label task.

    Attributes:
        values: those that occur, ascending, by the order of an ordinal task's classes, or ranges of numbers; last
            ``NO_LABEL`` and ``NOT_KNOWN`` where they occur.
        rows: int64 ``(M,)``, ascending, the image of each entry; every image has at least one.
        codes: int64 ``(M,)``, index into ``values`` of each entry.
        labelled: whether it is the data's label; otherwise it is the model's prediction.
    """

    values: tuple[str, ...]
    rows: NDArray[np.int64]
    codes: NDArray[np.int64]
    labelled: bool = True

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """The code of each image's first entry, int64 ``(N,)``: the most confident of predicted labels."""
        starts = np.flatnonzero(np.r_[True, self.rows[1:] != self.rows[:-1]]) if len(self.rows) else self.rows
        return self.codes[starts]

    @property
    def known(self) -> list[str]:
        """The values without ``NOT_KNOWN``."""
        return [value for value in self.values if value != NOT_KNOWN]

    def having(self, values: Sequence[str]) -> NDArray[np.bool_]:
        """Return which images have one of some values, bool ``(N,)``."""
        wanted = np.isin(self.codes, [self.values.index(value) for value in values])
        having = np.zeros(int(self.rows[-1]) + 1 if len(self.rows) else 0, bool)
        having[self.rows[wanted]] = True
        return having


def facet_of(column: pa.ChunkedArray, scale: Sequence[str] = (), *, labelled: bool = True) -> Facet:
    """Return the values of a column of labels or predictions.

    Args:
        column: of N texts, lists of texts, or numbers.
        scale: of an ordinal task its classes in their order.
        labelled: whether the column is the data's.
    """
    import pandas as pd

    rows = np.arange(len(column), dtype=np.int64)
    if pa.types.is_floating(column.type):
        numbers = column.to_numpy().astype(np.float64)
        names, codes = _ranges(numbers)
    else:
        entries = column.to_pandas()
        if pa.types.is_list(column.type):
            lists = [[NOT_KNOWN] if labels is None else labels or [NO_LABEL] for labels in column.to_pylist()]
            rows = np.repeat(rows, [len(labels) for labels in lists])
            entries = pd.Series([label for labels in lists for label in labels], dtype=object)
        found, values = pd.factorize(entries.fillna(NOT_KNOWN), sort=True)
        codes, names = np.asarray(found, np.int64), [str(value) for value in values]
    order = {name: place for place, name in enumerate([*scale])} | {NO_LABEL: len(scale) + 1, NOT_KNOWN: len(scale) + 2}
    if not pa.types.is_floating(column.type):
        places = sorted(range(len(names)), key=lambda place: (order.get(names[place], len(scale)), names[place]))
        codes, names = np.argsort(places)[codes].astype(np.int64), [names[place] for place in places]
    return Facet(tuple(names), rows, codes, labelled)


def _ranges(numbers: NDArray[np.float64]) -> tuple[list[str], NDArray[np.int64]]:
    """Names of ranges with about as many numbers each, and the range of each number; NaN is not known."""
    known = ~np.isnan(numbers)
    edges = np.unique([float(f"{edge:.3g}") for edge in np.quantile(numbers[known], _SHARES)] if known.any() else [])
    codes = np.searchsorted(edges, numbers, side="right")
    texts = [f"{edge:.6g}" for edge in edges]
    names = [f"{low} to {high}" for low, high in itertools.pairwise(texts)]
    names = [f"below {texts[0]}", *names, f"from {texts[-1]}"] if texts else []
    codes = np.where(known, codes, len(names))
    occur, codes = np.unique(codes, return_inverse=True)
    return [[*names, NOT_KNOWN][place] for place in occur.tolist()], codes.astype(np.int64)
