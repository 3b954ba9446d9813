"""Assigns whole groups of samples to parts (splits or folds) so that all parts get like shares of every class.

Greedy in the manner of iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the Stratification of
Multi-Label Data", ECML 2011): rarest class first, big groups first, each group to the part that is furthest below its
share of the group's classes. scikit-learn's ``StratifiedGroupKFold`` divides about as well (the tests compare the two),
but it promises nothing for rare classes and makes equal parts only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[Any]


def number(values: Labels) -> npt.NDArray[np.int64]:
    """Numbers the values in their sorted order, so that the order of the rows has no say in it; int64 ``(n,)``."""
    return np.unique(np.asarray(values), return_inverse=True)[1].astype(np.int64)


def assign_groups(
    groups: Labels, labels: Labels, fractions: Sequence[float], seed: int, *, keep_first: bool
) -> npt.NDArray[np.int64]:
    """Gives each sample the part of its group.

    Args:
        groups: ``(n,)`` group of each sample, numbers or strings.
        labels: ``(n,)`` classes; a group may hold several.
        fractions: share of the samples for each part; they sum to 1.
        seed: seed of the order in which groups of like size are placed.
        keep_first: whether part 0 is served first where a class has fewer groups than there are parts.

    Returns:
        int64 ``(n,)`` parts, 0 to ``len(fractions) - 1``.
    """
    group_of, class_of = number(groups), number(labels)
    n_classes = int(class_of.max(initial=-1)) + 1
    pairs, counts = np.unique(group_of * n_classes + class_of, return_counts=True)
    contents: list[list[tuple[int, int]]] = [[] for _ in range(int(group_of.max(initial=-1)) + 1)]
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        contents[pair // n_classes].append((pair % n_classes, count))
    totals = np.bincount(class_of, minlength=n_classes)
    rank = np.argsort(np.argsort(totals, kind="stable")).tolist()  # 0 for the rarest class
    strata = np.array([min(rank[code] for code, _ in content) for content in contents], dtype=np.int64)
    # Big groups first, or the last one may overfill its part; not to the letter, or the seed would have no say.
    rng = np.random.default_rng(seed)
    sizes = np.bincount(group_of) * rng.uniform(1, 1.25, len(contents))
    order = np.lexsort((-sizes, strata))
    parts = _Greedy(contents, totals, list(fractions), keep_first).assign(order.tolist())
    return parts[group_of]


class _Greedy:
    """Puts one group after another where its classes are furthest below their share.

    Attributes:
        short: ``[class][part]`` samples by which the part is below its share of those placed so far.
        debt: ``[part]`` the same over all classes; it decides between parts that are equally short.
        absent: ``[class]`` parts that have not seen the class yet.
        groups_left: ``[class]`` groups with this class that are still to be placed.
    """

    def __init__(
        self,
        contents: list[list[tuple[int, int]]],
        totals: npt.NDArray[np.int64],
        fractions: list[float],
        keep_first: bool,
    ) -> None:
        self.contents = contents
        self.totals: list[int] = totals.tolist()
        self.fractions = fractions
        self.keep_first = keep_first
        self.used = [part for part, fraction in enumerate(fractions) if fraction > 0]
        self.short = [[0.0] * len(fractions) for _ in self.totals]
        self.debt = [0.0] * len(fractions)
        self.absent = [set(self.used) for _ in self.totals]
        held = np.array([code for content in contents for code, _ in content], dtype=np.int64)
        self.groups_left: list[int] = np.bincount(held, minlength=len(totals)).tolist()

    def assign(self, order: Iterable[int]) -> npt.NDArray[np.int64]:
        """Places all groups in the given order; returns ``(n_groups,)`` parts."""
        parts = np.zeros(len(self.contents), dtype=np.int64)
        for group in order:
            content = self.contents[group]
            size = sum(count for _, count in content)
            for code, count in content:
                self._grow(self.short[code], count)
            self._grow(self.debt, size)
            parts[group] = part = max(self._allowed(content), key=lambda part: self._need(part, content, size))
            for code, count in content:
                self.short[code][part] -= count
                self.absent[code].discard(part)
                self.groups_left[code] -= 1
            self.debt[part] -= size
        return parts

    def _grow(self, short: list[float], count: int) -> None:
        for part, fraction in enumerate(self.fractions):
            short[part] += count * fraction

    def _allowed(self, content: list[tuple[int, int]]) -> list[int]:
        for code, _ in sorted(content, key=lambda held: self.totals[held[0]]):
            absent = self.absent[code]
            if absent and self.groups_left[code] <= len(absent):  # the last chance of these parts to see the class
                return [0] if self.keep_first and self.groups_left[code] == 1 and 0 in absent else sorted(absent)
        return self.used

    def _need(self, part: int, content: list[tuple[int, int]], size: int) -> float:
        # A debt counts little: enough that roundings do not add up, too little to bend the shares of the classes.
        nudge = max(-0.5 * size, min(0.5 * size, 0.05 * self.debt[part]))
        return sum(count / self.totals[code] * (self.short[code][part] + nudge) for code, count in content)
