"""Divide samples into train, val and test: at random, stratified by class, by group, or as folds of grouped samples.

All functions are pure: arrays in, an array of split names out, the same for the same seed on every machine. A *group*
is what must not be torn apart (all photos of one object, all images of one product). A rare class is in as many parts
as it has groups (samples, where there are no groups), train first; for folds there is no first part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jsonargparse.typing import NonNegativeInt

from datamodules.options import Folds, Options, Share
from datamodules.table import SPLITS, SampleTable
from vitrail.errors import UserError
from vitrail.predictions import refuse_kinds
from vitrail.seeding import derive_seed
from vitrail.types import LABEL_TASK, UNKNOWN, kind_of

if TYPE_CHECKING:
    import pandas as pd


Values: TypeAlias = "npt.NDArray[Any] | Sequence[Any] | pd.Series[Any]"
SplitBy = Literal["table", "random", "stratified", "group", "group_kfold"]


def number(values: Values) -> npt.NDArray[np.int64]:
    """Return the rank of each value among the distinct ones, whatever the order of the rows; int64 ``(n,)``."""
    import pandas as pd

    return pd.factorize(np.asarray(values), sort=True)[0].astype(np.int64)


def assign_groups(
    groups: Values, labels: Values, fractions: Sequence[float], seed: int, *, keep_first: bool
) -> npt.NDArray[np.int64]:
    """Assign whole groups to parts (splits or folds) so that all parts have like shares of every class.

    Greedy in the manner of iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the Stratification of
    Multi-Label Data", ECML 2011): rarest class first, big groups first, each group to the part that is furthest below
    its share of the group's classes. scikit-learn's ``StratifiedGroupKFold`` divides about as well (the tests compare
    the two), but it promises nothing for rare classes and makes equal parts only.

    Args:
        groups: ``(n,)`` group of each sample, numbers or strings.
        labels: ``(n,)`` classes; a group may have several.
        fractions: share of the samples for each part; they sum to 1.
        seed: of the order in which groups of like size are placed.
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
    """Put one group after another where its classes are furthest below their share.

    Attributes:
        short: ``[class][part]`` samples by which the part is below its share of those placed so far.
        debt: ``[part]`` the same over all classes; it decides between parts that are equally short.
        absent: ``[class]`` parts that lack the class so far.
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
        """Place all groups in the given order and return their parts, int64 ``(n_groups,)``."""
        parts = np.zeros(len(self.contents), dtype=np.int64)
        for group in order:
            content = self.contents[group]
            size = sum(count for _, count in content)
            for part, fraction in enumerate(self.fractions):
                for code, count in content:
                    self.short[code][part] += count * fraction
                self.debt[part] += size * fraction
            parts[group] = part = max(self._allowed(content), key=lambda part: self._need(part, content, size))
            for code, count in content:
                self.short[code][part] -= count
                self.absent[code].discard(part)
                self.groups_left[code] -= 1
            self.debt[part] -= size
        return parts

    def _allowed(self, content: list[tuple[int, int]]) -> list[int]:
        for code, _ in sorted(content, key=lambda held: self.totals[held[0]]):
            absent = self.absent[code]
            if absent and self.groups_left[code] <= len(absent):  # the last chance of these parts to get the class
                return [0] if self.keep_first and self.groups_left[code] == 1 and 0 in absent else sorted(absent)
        return self.used

    def _need(self, part: int, content: list[tuple[int, int]], size: int) -> float:
        # A debt counts little: enough that roundings do not add up, too little to bend the shares of the classes.
        nudge = max(-0.5 * size, min(0.5 * size, 0.05 * self.debt[part]))
        return sum(count / self.totals[code] * (self.short[code][part] + nudge) for code, count in content)


Splits = npt.NDArray[np.str_]


@dataclass(frozen=True)
class SplitOptions(Options):
    """How samples are divided.

    Attributes:
        by: ``table`` keeps the data set's own division, ``random`` divides at random, ``stratified`` keeps the class
            shares, ``group`` keeps groups together (and the class shares as well as that allows), ``group_kfold`` makes
            ``n_folds`` folds of groups. Null for what the data set does by default.
        val_fraction: share of the samples for val, 0 or more and below 1; not used by folds.
        test_fraction: share of the samples for test, 0 or more and below 1; not used by folds.
        fold: which fold is test, from 0; the next one is val, the others are train.
        n_folds: number of folds, at least 3.
        seed: seed of the division; null for the seed of the DataModule.
    """

    argument: ClassVar[str] = "split"

    by: SplitBy | None = None
    val_fraction: Share = 0.15
    test_fraction: Share = 0.15
    fold: NonNegativeInt = 0
    n_folds: Folds = 5
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_fraction + self.test_fraction >= 1:
            raise UserError(
                f"data split: val_fraction {self.val_fraction} and test_fraction {self.test_fraction} leave nothing "
                "for train; their sum must be below 1"
            )
        if self.fold >= self.n_folds:
            raise UserError(f"data split.fold: must be below split.n_folds, {self.n_folds}; got {self.fold}")


_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "development", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tests", "tst"), "test"),
}
_NEUTRAL_WORDS = {"set", "split", "data", "dataset", "image", "images", "img", "imgs", "folder", "samples"}


def split_of_name(name: str) -> str | None:
    """Return the split that a folder, a file or a table's cell names in any case and usual spelling, or None.

    Such as ``Train``, ``training``, ``TRAIN_SET``, ``val2017``, ``valid``, ``dev``, ``eval`` and ``test images``.
    """
    words = [word.removesuffix("set") or word for word in re.findall(r"[^\W\d_]+", name.casefold())]
    meant = [word for word in words if word not in _NEUTRAL_WORDS]
    return _SPLIT_WORDS.get(meant[0]) if len(meant) == 1 else None


def random_split(n: int, fractions: Sequence[float], seed: int) -> Splits:
    """Split at random, with the lengths and the order of ``torch.utils.data.random_split``."""
    lengths = [int(n * fraction) for fraction in fractions]
    for i in range(n - sum(lengths)):  # as torch does: what rounding left over goes round, train first
        lengths[i % len(lengths)] += 1
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    parts = np.empty(n, dtype=np.int64)
    parts[order] = np.repeat(np.arange(len(lengths)), lengths)
    return _names(parts)


def stratified_split(labels: Values, fractions: Sequence[float], seed: int) -> Splits:
    """Split at random with the same class shares in all parts; rare classes by the rule of this module."""
    rng = np.random.default_rng(seed)
    codes = number(labels)
    parts = np.zeros(len(codes), dtype=np.int64)
    order = rng.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]  # class by class, in random order within each
    counts = np.bincount(codes)
    ends = np.cumsum(counts)
    debt = np.zeros(len(fractions))  # what roundings left each part short of; made good half a sample a class
    for code in np.argsort(counts, kind="stable"):
        share = counts[code] * np.asarray(fractions)
        lengths = _apportion(share + debt.clip(-0.5, 0.5), int(counts[code]), np.asarray(fractions) > 0)
        debt += share - lengths
        parts[order[ends[code] - counts[code] : ends[code]]] = np.repeat(np.arange(len(fractions)), lengths)
    return _names(parts)


def grouped_split(groups: Values, labels: Values, fractions: Sequence[float], seed: int) -> Splits:
    """Split so that no group is in two parts; class shares as equal as that allows."""
    return _names(assign_groups(groups, labels, fractions, seed, keep_first=True))


def grouped_kfold(groups: Values, labels: Values, fold: int, n_folds: int, seed: int) -> Splits:
    """Cut the groups into folds of like class shares: fold ``fold`` is test, the one after it val, the others train.

    Over all values of ``fold``, each sample is in test once.
    """
    n_groups = len(np.unique(number(groups)))
    if n_groups < n_folds:
        raise UserError(
            f"data split.n_folds: {n_folds} folds cannot be made of {n_groups} groups: set a smaller number"
        )
    folds = assign_groups(groups, labels, [1 / n_folds] * n_folds, seed, keep_first=False)
    parts = np.where(folds == fold, 2, np.where(folds == (fold + 1) % n_folds, 1, 0))
    return _names(parts)


def few_shots(labels: Values, groups: Values, names: Sequence[str], shots: int, seed: int) -> npt.NDArray[np.bool_]:
    """Choose a few samples of each class, from different groups as long as there are any left.

    The order within a class is a function of (seed, name), so fewer shots are among more of them, and neither other
    samples nor the order of the rows change it.

    Args:
        labels: ``(n,)`` classes.
        groups: ``(n,)`` group of each sample; unique values where there are none.
        names: of the samples, unique.
        shots: samples of each class; all of a class that has fewer.
        seed: of the choice.

    Returns:
        bool ``(n,)``, whether a sample is chosen.
    """
    import pandas as pd

    key = np.array([derive_seed("shots", seed, name) for name in names], dtype=np.int64)
    frame = pd.DataFrame({"label": number(labels), "group": number(groups), "key": key}).sort_values("key")
    frame["round"] = frame.groupby(["label", "group"]).cumcount()
    place = frame.sort_values(["round", "key"]).groupby("label").cumcount()
    chosen: npt.NDArray[np.bool_] = (place < shots).sort_index().to_numpy()
    return chosen


def with_shots(table: SampleTable, shots: int, seed: int) -> SampleTable:
    """Leave out all but a few training samples of each class of the main task; a note says so.

    Raises:
        UserError: the table has no classes.
    """
    if LABEL_TASK not in table.tasks:
        raise UserError(f"data shots: {table.origin} has no classes to choose from; leave it out")
    kind, classes = kind_of(table.kinds, LABEL_TASK), table.tasks[LABEL_TASK]
    refuse_kinds({LABEL_TASK: kind}, "data shots", fix="leave it out")
    targets, rows = table.targets[LABEL_TASK], table.split_indices("train")
    known = rows[targets[rows] != UNKNOWN]
    chosen = known[few_shots(targets[known], table.group_ids[known], table.names.take(known).to_pylist(), shots, seed)]
    counts = np.bincount(targets[chosen], minlength=len(classes))
    fewer = [f"{name} ({count})" for name, count in zip(classes, counts.tolist(), strict=True) if 0 < count < shots]
    note = f"shots: {shots} by seed {seed}: {len(chosen)} of {len(rows)} training images are used"
    if fewer:
        more = f" and {len(fewer) - _SHOWN} more" if len(fewer) > _SHOWN else ""
        note += f"; {len(fewer)} classes have fewer than {shots}, first {', '.join(fewer[:_SHOWN])}{more}"
    left_out = np.zeros(len(table), dtype=np.bool_)
    left_out[np.setdiff1d(rows, chosen)] = True
    return replace(table, left_out=left_out, notes=[*table.notes, f"{note}."])


_SHOWN = 5


def resolve_splits(
    options: SplitOptions,
    *,
    labels: Values,
    groups: Values,
    seed: int,
    default: SplitBy = "table",
    own: Splits | None = None,
    carve: bool = False,
) -> Splits:
    """Divide samples as the user asked for.

    Args:
        options: the user's choice.
        labels: ``(n,)`` classes, numbers or strings.
        groups: ``(n,)`` groups; unique values where there are none.
        seed: seed where the options name none.
        default: value of ``by`` where the options name none.
        own: ``(n,)`` the data set's own division, where it has one.
        carve: whether val or test, where the data set's own division lacks them, are cut out of train by their
            fractions, groups kept together.

    Returns:
        ``(n,)`` split names.

    Raises:
        UserError: for more folds than groups, and for ``table`` without an own division.
    """
    seed = seed if options.seed is None else options.seed
    fractions = (1 - options.val_fraction - options.test_fraction, options.val_fraction, options.test_fraction)
    class_of, group_of = number(labels), number(groups)
    match options.by or default:
        case "random":
            return random_split(len(class_of), fractions, seed)
        case "stratified":
            return stratified_split(class_of, fractions, seed)
        case "group":
            return grouped_split(group_of, class_of, fractions, seed)
        case "group_kfold":
            return grouped_kfold(group_of, class_of, options.fold, options.n_folds, seed)
    if own is None:
        raise UserError("data split.by: table, but the data set has none; use random, stratified, group or group_kfold")
    if not carve:
        return own
    val, test = (0.0 if (own == name).any() else share for name, share in zip(SPLITS[1:], fractions[1:], strict=True))
    train = np.flatnonzero(own == "train")
    splits = own.copy()
    splits[train] = grouped_split(group_of[train], class_of[train], (1 - (val + test), val, test), seed)
    return splits


def _names(parts: npt.NDArray[np.int64]) -> Splits:
    return np.array(SPLITS)[parts]


def _apportion(share: npt.NDArray[np.float64], n: int, used: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Shares rounded to whole numbers that sum to ``n``: at least one each where ``n`` allows, part 0 first."""
    ranked = sorted(np.flatnonzero(used), key=lambda part: (part != 0, -share[part]))
    least = np.zeros(len(share), dtype=np.int64)
    least[ranked[:n]] = 1
    lengths: npt.NDArray[np.int64] = np.maximum(np.where(used, np.floor(share), 0).astype(np.int64), least)
    while (surplus := int(lengths.sum()) - n) > 0:
        lengths[np.where(lengths > least, lengths - share, -np.inf).argmax()] -= 1
    for _ in range(-surplus):
        lengths[np.where(used, share - lengths, -np.inf).argmax()] += 1
    return lengths
