"""Divide samples into train, val and test: at random, stratified by class, by group, or as folds of grouped samples.

All functions are pure: arrays in, an array of split names out, the same for the same seed on every machine. A *group*
is what must not be torn apart (all photos of one object, all pictures of one product).

Rare classes are handled by one rule: a class is in as many parts as it has groups (samples, where there are no groups),
train first. So a class with one sample stays in train; with two, one stays in train and one goes to val or test,
whichever is further below its share; from three on it is in all three. For folds there is no first part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt
import torch

from datamodules.grouping import Labels, assign_groups, number
from datamodules.table import SPLITS
from vitrail.errors import UserError

Splits = npt.NDArray[np.str_]


class SplitOptions(TypedDict, total=False):
    """How samples are divided.

    Attributes:
        by: "table" keeps the data set's own division, "random" draws samples, "stratified" keeps the class shares,
            "group" keeps groups together (and the class shares as well as that allows), "group_kfold" makes
            ``n_folds`` folds of groups.
        val_fraction: share of the samples for val, 0 to 1 (default 0.15); not used by folds.
        test_fraction: share of the samples for test, 0 to 1 (default 0.15); not used by folds.
        fold: which fold is test, from 0 (default 0); the next one is val, the others are train.
        n_folds: number of folds, at least 3 (default 5).
        seed: seed of the division (default: the seed of the DataModule).
    """

    by: Literal["table", "random", "stratified", "group", "group_kfold"]
    val_fraction: float
    test_fraction: float
    fold: int
    n_folds: int
    seed: int


_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "development", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tests", "tst"), "test"),
}
_WORDS_BESIDE = {"set", "split", "data", "dataset", "image", "images", "img", "imgs", "folder", "samples"}


def split_of_name(name: str) -> str | None:
    """Which split a folder, a file or a table's cell means in any case and usual spelling.

    Such as ``Train``, ``training``, ``TRAIN_SET``, ``val2017``, ``valid``, ``dev``, ``eval`` and ``test images``.

    Returns:
        train, val or test; None for a name that means none of them.
    """
    words = [word.removesuffix("set") or word for word in re.findall(r"[^\W\d_]+", name.casefold())]
    meant = [word for word in words if word not in _WORDS_BESIDE]
    return _SPLIT_WORDS.get(meant[0]) if len(meant) == 1 else None


def random_split(n: int, fractions: Sequence[float], seed: int) -> Splits:
    """Splits at random, with the lengths and the order of ``torch.utils.data.random_split``.

    Args:
        n: number of samples.
        fractions: shares of train, val and test; they sum to 1.
        seed: seed of the permutation; the same draw as ``torch.Generator().manual_seed(seed)``.

    Returns:
        ``(n,)`` split names.
    """
    lengths = [int(n * fraction) for fraction in fractions]
    for i in range(n - sum(lengths)):  # as torch does: what rounding left over goes round, train first
        lengths[i % len(lengths)] += 1
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    parts = np.empty(n, dtype=np.int64)
    parts[order] = np.repeat(np.arange(len(lengths)), lengths)
    return _names(parts)


def stratified_split(labels: Labels, fractions: Sequence[float], seed: int) -> Splits:
    """Splits at random with the same class shares in all parts; rare classes as the module says.

    Args:
        labels: ``(n,)`` classes, numbers or strings.
        fractions: shares of train, val and test; they sum to 1.
        seed: seed of the draw.

    Returns:
        ``(n,)`` split names.
    """
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


def grouped_split(groups: Labels, labels: Labels, fractions: Sequence[float], seed: int) -> Splits:
    """Splits so that no group is in two parts; class shares as equal as that allows, rare classes as the module says.

    Args:
        groups: ``(n,)`` group of each sample, numbers or strings.
        labels: ``(n,)`` classes; a group may hold several.
        fractions: shares of train, val and test, in samples; they sum to 1.
        seed: seed of the draw.

    Returns:
        ``(n,)`` split names.
    """
    return _names(assign_groups(groups, labels, fractions, seed, keep_first=True))


def grouped_kfold(groups: Labels, labels: Labels, fold: int, n_folds: int, seed: int) -> Splits:
    """Cuts the groups into folds of like class shares: fold ``fold`` is test, the one after it val, the others train.

    Over all values of ``fold``, each sample is in test once.

    Args:
        groups: ``(n,)`` group of each sample, numbers or strings.
        labels: ``(n,)`` classes; a group may hold several.
        fold: 0 to ``n_folds - 1``.
        n_folds: number of folds, at least 3.
        seed: seed of the cut; the same for all folds of one experiment.

    Returns:
        ``(n,)`` split names.

    Raises:
        UserError: for a fold that does not exist, or more folds than groups.
    """
    if n_folds < 3:
        raise UserError(f"data split.n_folds: {n_folds} leaves nothing for train, val or test: set it to 3 or more")
    if not 0 <= fold < n_folds:
        raise UserError(f"data split.fold: {fold} does not exist: with split.n_folds {n_folds} use 0 to {n_folds - 1}")
    n_groups = len(np.unique(number(groups)))
    if n_groups < n_folds:
        raise UserError(
            f"data split.n_folds: {n_folds} folds cannot be made of {n_groups} groups: set a smaller number"
        )
    folds = assign_groups(groups, labels, [1 / n_folds] * n_folds, seed, keep_first=False)
    parts = np.where(folds == fold, 2, np.where(folds == (fold + 1) % n_folds, 1, 0))
    return _names(parts)


def resolve_splits(
    options: SplitOptions | None,
    *,
    labels: Labels,
    groups: Labels,
    seed: int,
    default: str = "table",
    own: Splits | None = None,
    carve: bool = False,
) -> Splits:
    """Applies what the user asked for.

    Args:
        options: the user's choice.
        labels: ``(n,)`` classes.
        groups: ``(n,)`` groups; unique values where there are none.
        seed: seed where the options name none.
        default: value of ``by`` where the options name none.
        own: ``(n,)`` the data set's own division, where it has one.
        carve: whether val or test, where the data set's own division lacks them, are cut out of train by their
            fractions, groups kept together.

    Returns:
        ``(n,)`` split names.

    Raises:
        UserError: for options that contradict themselves or the data.
    """
    options = options or {}
    if strange := sorted(set(options) - set(SplitOptions.__annotations__)):
        known = ", ".join(SplitOptions.__annotations__)
        raise UserError(f"data split: unknown key {strange[0]!r}; known keys are {known}")
    by = options.get("by", default)
    seed = options.get("seed", seed)
    fractions = _fractions(options)
    match by:
        case "table":
            if own is None:
                raise UserError(
                    "data split.by: table, but the data set brings none: use random, stratified, group or group_kfold"
                )
            return _carved(own, labels, groups, fractions, seed) if carve else own
        case "random":
            return random_split(len(labels), fractions, seed)
        case "stratified":
            return stratified_split(labels, fractions, seed)
        case "group":
            return grouped_split(groups, labels, fractions, seed)
        case "group_kfold":
            return grouped_kfold(groups, labels, options.get("fold", 0), options.get("n_folds", 5), seed)
    raise UserError(f"data split.by: {by!r} is unknown: use table, random, stratified, group or group_kfold")


def _carved(own: Splits, labels: Labels, groups: Labels, fractions: Sequence[float], seed: int) -> Splits:
    """Cuts missing parts out of train."""
    present = set(np.unique(own))
    wanted = [1.0, *(0.0 if name in present else share for name, share in zip(SPLITS[1:], fractions[1:], strict=True))]
    wanted[0] -= sum(wanted[1:])
    train = np.flatnonzero(own == "train")
    splits = own.copy()
    splits[train] = grouped_split(groups[train], labels[train], wanted, seed)
    return splits


def _fractions(options: SplitOptions) -> tuple[float, float, float]:
    val, test = options.get("val_fraction", 0.15), options.get("test_fraction", 0.15)
    for key, value in (("val_fraction", val), ("test_fraction", test)):
        if not 0 <= value < 1:
            raise UserError(f"data split.{key}: {value} is no share: use 0 or more and less than 1")
    if val + test >= 1:
        raise UserError(f"data split.val_fraction {val} and split.test_fraction {test} leave nothing for train")
    return 1 - val - test, val, test


def _names(parts: npt.NDArray[np.int64]) -> Splits:
    return np.array(SPLITS)[parts]


def _apportion(share: npt.NDArray[np.float64], n: int, used: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Rounds shares to whole numbers that sum to ``n``: at least one each where ``n`` allows, part 0 first."""
    ranked = sorted(np.flatnonzero(used), key=lambda part: (part != 0, -share[part]))
    least = np.zeros(len(share), dtype=np.int64)
    least[ranked[:n]] = 1
    lengths: npt.NDArray[np.int64] = np.maximum(np.where(used, np.floor(share), 0).astype(np.int64), least)
    while (surplus := int(lengths.sum()) - n) > 0:
        lengths[np.where(lengths > least, lengths - share, -np.inf).argmax()] -= 1
    for _ in range(-surplus):
        lengths[np.where(used, share - lengths, -np.inf).argmax()] += 1
    return lengths
