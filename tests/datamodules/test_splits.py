from __future__ import annotations

import csv
import itertools
import os
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.model_selection import StratifiedGroupKFold

from datamodules.splits import (
    SplitOptions,
    assign_groups,
    few_shots,
    grouped_kfold,
    grouped_split,
    number,
    random_split,
    resolve_splits,
    stratified_split,
)
from datamodules.wares import Wares
from tests.support.data import Ints, random_groups
from vitrail.errors import UserError

SEEDS = range(25)
FRACTIONS = (0.7, 0.15, 0.15)
TEAM14 = Path(os.environ.get("VITRAIL_DATA", "")) / "products_team14_metadata" / "labels_fixed.csv"


def shares(splits: npt.NDArray[np.str_]) -> list[float]:
    return [float((splits == name).mean()) for name in ("train", "val", "test")]


def parts_of_groups(groups: Ints, splits: npt.NDArray[np.str_]) -> dict[int, set[str]]:
    return {int(group): set(splits[groups == group].tolist()) for group in np.unique(groups)}


@pytest.mark.parametrize("n", [1, 2, 7, 100, 1003])
def test_random_split_is_the_one_of_torch(n: int) -> None:
    generator = torch.Generator().manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of empty parts
        expected = torch.utils.data.random_split(torch.utils.data.TensorDataset(torch.arange(n)), FRACTIONS, generator)
    splits = random_split(n, FRACTIONS, 5)
    for name, part in zip(("train", "val", "test"), expected, strict=True):
        assert sorted(part.indices) == np.flatnonzero(splits == name).tolist()


@pytest.mark.skipif(not TEAM14.is_file(), reason="needs $VITRAIL_DATA/products_team14_metadata")
def test_random_split_replays_the_reference() -> None:
    with TEAM14.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    classes = (TEAM14.parent / "classes.txt").read_text(encoding="utf-8").split("\n")
    in_val = np.flatnonzero(random_split(len(rows), (0.8, 0.2, 0.0), 42) == "val")
    supports = Counter(rows[i]["class_label"] for i in in_val)
    assert [supports[name] for name in classes] == [18, 24, 25, 18, 17, 21, 25, 19, 20, 13]
    assert Counter(rows[i]["split"] for i in in_val) == {"train": 162, "val": 38}


def test_stratified_split_keeps_class_shares() -> None:
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        labels = rng.choice(8, 900, p=np.arange(1, 9) / 36)
        splits = stratified_split(labels, FRACTIONS, seed)
        assert np.abs(np.subtract(shares(splits), FRACTIONS)).max() < 0.005
        for label in range(8):
            ours = splits[labels == label]
            counts = [int((ours == name).sum()) for name in ("train", "val", "test")]
            assert np.abs(np.subtract(counts, np.multiply(FRACTIONS, len(ours)))).max() <= 1.5


def test_stratified_split_takes_strings_and_zero_fractions() -> None:
    labels = np.array(["b", "a", "b", "b", "a", "b", "b", "b", "b", "b"] * 5)
    splits = stratified_split(labels, (0.8, 0.2, 0.0), 0)
    assert Counter(splits.tolist()) == {"train": 40, "val": 10}
    assert Counter(labels[splits == "val"].tolist()) == {"a": 2, "b": 8}


def test_stratified_split_of_many_rare_classes() -> None:
    """Sizes 1, 2 and 3: train always, then one of the others, then all three; and big classes do not pay for them."""
    labels = np.repeat(np.arange(65), [1] * 20 + [2] * 20 + [3] * 20 + [200] * 5)
    for seed in SEEDS:
        splits = stratified_split(labels, FRACTIONS, seed)
        present = [set(splits[labels == label].tolist()) for label in range(65)]
        assert present[:20] == [{"train"}] * 20
        assert all("train" in parts and len(parts) == 2 for parts in present[20:40])
        in_val = sum("val" in parts for parts in present[20:40])
        assert 8 <= in_val <= 12, "classes of two are dealt out evenly"
        assert all(len(parts) == 3 for parts in present[40:])
        for label in range(60, 65):
            assert abs((splits[labels == label] == "val").mean() - 0.15) < 0.01


@pytest.mark.parametrize("mixed", [False, True])
def test_grouped_split_properties(mixed: bool) -> None:
    for seed in SEEDS:
        groups, labels = random_groups(seed, mixed=mixed)
        splits = grouped_split(groups, labels, FRACTIONS, seed)
        assert all(len(parts) == 1 for parts in parts_of_groups(groups, splits).values())
        assert np.abs(np.subtract(shares(splits), FRACTIONS)).max() < 0.04
        for label in np.unique(labels):
            if len(np.unique(groups[labels == label])) >= 3:
                assert set(splits[labels == label].tolist()) == {"train", "val", "test"}


def test_grouped_split_of_classes_with_few_groups() -> None:
    sizes = np.random.default_rng(0).integers(1, 6, 36)
    classes = np.repeat(np.arange(13), [1] * 4 + [2] * 4 + [3] * 4 + [12])
    groups, labels = np.repeat(np.arange(36), sizes), np.repeat(classes, sizes)
    for seed in SEEDS:
        splits = grouped_split(groups, labels, FRACTIONS, seed)
        present = [set(splits[labels == label].tolist()) for label in range(13)]
        assert present[:4] == [{"train"}] * 4
        assert all("train" in parts and len(parts) == 2 for parts in present[4:8])
        assert all(len(parts) == 3 for parts in present[8:])


def test_one_huge_group_goes_to_train() -> None:
    groups = np.array([0] * 50 + list(range(1, 31)))
    splits = grouped_split(groups, np.zeros(80, dtype=np.int64), FRACTIONS, 0)
    assert set(splits[:50].tolist()) == {"train"}
    assert set(splits.tolist()) == {"train", "val", "test"}


def test_roundings_do_not_add_up_over_many_small_classes() -> None:
    labels = np.repeat(np.arange(200), 8)  # 15 % of 8 is 1.2, which alone would round to 12.5 %
    for splits in (stratified_split(labels, FRACTIONS, 0), grouped_split(np.arange(1600), labels, FRACTIONS, 0)):
        assert np.abs(np.subtract(shares(splits), FRACTIONS)).max() < 0.015


@pytest.mark.parametrize("mixed", [False, True])
def test_folds_are_a_partition_into_groups(mixed: bool) -> None:
    for seed in range(8):
        groups, labels = random_groups(seed, mixed=mixed)
        folds = [grouped_kfold(groups, labels, fold, 5, seed) for fold in range(5)]
        assert (np.sum([fold == "test" for fold in folds], axis=0) == 1).all()
        for fold, following in zip(folds, folds[1:] + folds[:1], strict=True):
            assert ((fold == "val") == (following == "test")).all(), "val is the next fold's test"
            assert all(len(parts) == 1 for parts in parts_of_groups(groups, fold).values())
            assert np.abs(np.subtract(shares(fold), (0.6, 0.2, 0.2))).max() < 0.05


def test_splits_are_a_function_of_the_seed_alone() -> None:
    groups, labels = random_groups(3, mixed=False)
    again = grouped_split(groups.copy(), labels.copy(), FRACTIONS, 7)
    assert (grouped_split(groups, labels, FRACTIONS, 7) == again).all()
    assert (grouped_split(groups, labels, FRACTIONS, 8) != again).any()
    assert (stratified_split(labels, FRACTIONS, 7) == stratified_split(labels, FRACTIONS, 7)).all()
    assert (stratified_split(labels, FRACTIONS, 7) != stratified_split(labels, FRACTIONS, 8)).any()
    assert (grouped_kfold(groups, labels, 1, 4, 7) == grouped_kfold(groups, labels, 1, 4, 7)).all()
    assert (grouped_kfold(groups, labels, 1, 4, 7) != grouped_kfold(groups, labels, 1, 4, 8)).any()


def test_no_samples_are_no_problem() -> None:
    nothing = np.array([], dtype=np.int64)
    assert len(grouped_split(nothing, nothing, FRACTIONS, 0)) == 0
    assert len(stratified_split(nothing, FRACTIONS, 0)) == 0
    assert len(random_split(0, FRACTIONS, 0)) == 0


def resolve(options: SplitOptions, own: list[str] | None = None, carve: bool = False) -> npt.NDArray[np.str_]:
    groups = np.arange(40) // 2
    return resolve_splits(
        options, labels=groups % 2, groups=groups, seed=3, own=None if own is None else np.array(own), carve=carve
    )


def test_resolve_uses_the_tables_own_split_by_default() -> None:
    own = ["train"] * 30 + ["val"] * 10
    assert resolve(SplitOptions(), own).tolist() == own
    assert resolve(SplitOptions(by="table"), own).tolist() == own


def test_resolve_draws_by_the_seed_of_the_options_or_of_the_data() -> None:
    fractions = (0.75, 0.25, 0.0)
    asked = SplitOptions(by="random", val_fraction=0.25, test_fraction=0.0)
    assert (resolve(asked) == random_split(40, fractions, 3)).all()
    assert (resolve(replace(asked, seed=9)) == random_split(40, fractions, 9)).all()
    groups = np.arange(40) // 2
    assert (resolve(replace(asked, by="stratified")) == stratified_split(groups % 2, fractions, 3)).all()
    assert (resolve(replace(asked, by="group")) == grouped_split(groups, groups % 2, fractions, 3)).all()
    folds = SplitOptions(by="group_kfold", fold=2, n_folds=4)
    assert (resolve(folds) == grouped_kfold(groups, groups % 2, 2, 4, 3)).all()


def test_resolve_carves_what_is_missing_out_of_train() -> None:
    own = ["train"] * 30 + ["test"] * 10
    splits = resolve(SplitOptions(val_fraction=0.2), own, carve=True)
    assert splits[30:].tolist() == ["test"] * 10
    assert Counter(splits[:30].tolist()) == {"train": 24, "val": 6}
    assert (splits[0::2] == splits[1::2]).all(), "groups of two stay together"
    assert Counter(resolve(SplitOptions(test_fraction=0.1, val_fraction=0.1), ["train"] * 40, carve=True).tolist()) == {
        "train": 32,
        "val": 4,
        "test": 4,
    }
    assert resolve(SplitOptions(val_fraction=0.0), own, carve=True).tolist() == own


@pytest.mark.parametrize(
    ("options", "named"),
    [(SplitOptions(by="table"), "split.by"), (SplitOptions(by="group_kfold", n_folds=21), "20 groups")],
)
def test_what_the_data_cannot_meet_is_refused(options: SplitOptions, named: str) -> None:
    with pytest.raises(UserError, match=named):
        resolve(options)


FIFTHS = [0.2] * 5


@pytest.mark.parametrize("mixed", [False, True])
def test_groups_are_divided_about_as_well_as_by_scikit_learn(mixed: bool) -> None:
    """Mean distance of the class shares of a fifth of the data from 20 %, over many draws."""

    def distance(labels: Ints, in_part: npt.NDArray[np.bool_]) -> float:
        return float(np.mean([abs(in_part[labels == label].mean() - 0.2) for label in np.unique(labels)]))

    ours, theirs = [], []
    for seed in range(8):
        groups, labels = random_groups(seed, mixed=mixed)
        parts = assign_groups(groups, labels, FIFTHS, seed, keep_first=False)
        ours += [distance(labels, parts == part) for part in range(5)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of classes with fewer than five samples
            folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(labels, labels, groups)
            theirs += [distance(labels, np.isin(np.arange(len(labels)), test)) for _, test in folds]
    assert np.mean(ours) < (1.6 if mixed else 1.1) * np.mean(theirs)


def test_parts_without_a_share_stay_empty() -> None:
    groups, labels = random_groups(0, mixed=False)
    assert set(assign_groups(groups, labels, [0.5, 0.0, 0.5], 0, keep_first=True).tolist()) == {0, 2}


def test_where_no_part_comes_first_single_groups_are_spread() -> None:
    groups = np.arange(500)
    parts = assign_groups(groups, groups, FIFTHS, 0, keep_first=False)
    assert np.bincount(parts).tolist() == [100] * 5
    assert not assign_groups(groups, groups, FIFTHS, 0, keep_first=True).any()


def test_the_seed_has_a_say_even_if_all_groups_differ_in_size() -> None:
    groups = np.repeat(np.arange(30), np.arange(10, 40))
    draws = {assign_groups(groups, groups % 2, FIFTHS, seed, keep_first=True).tobytes() for seed in range(5)}
    assert len(draws) == 5


def test_names_stand_for_their_order() -> None:
    groups, labels = random_groups(4, mixed=False)
    names = np.array([f"g{group:04}" for group in groups])
    parts = assign_groups(names, labels, FIFTHS, 0, keep_first=True)
    assert (parts == assign_groups(groups, labels, FIFTHS, 0, keep_first=True)).all()
    assert number(np.array(["b", "a", "b"])).tolist() == [1, 0, 1]


def test_shots_are_nested_per_class_and_of_different_groups_while_there_are_any() -> None:
    labels = np.repeat(["a", "b", "c"], [12, 12, 3])
    groups = np.array([*np.arange(12) // 4, *np.arange(12) + 10, 30, 30, 30])
    names = [f"sample {number}" for number in range(27)]
    chosen = {shots: few_shots(labels, groups, names, shots, 1) for shots in (1, 2, 4, 8)}
    for few, more in itertools.pairwise(chosen.values()):
        assert not (few & ~more).any()
    for shots, mask in chosen.items():
        assert Counter(labels[mask]) == {"a": shots, "b": shots, "c": min(shots, 3)}
        assert len(set(groups[mask & (labels == "a")])) == min(shots, 3)
    assert max(Counter(groups[chosen[4] & (labels == "a")]).values()) == 2
    # Neither the order of the rows nor other samples matter, the seed does.
    order = np.random.default_rng(0).permutation(20)
    again = few_shots(labels[order], groups[order], [names[row] for row in order], 4, 1)
    own = few_shots(labels[:20], groups[:20], names[:20], 4, 1)
    assert (again == own[order]).all()
    assert (few_shots(labels, groups, names, 4, 2) != chosen[4]).any()
    assert (own[:12] == chosen[4][:12]).all()


def test_shots_change_the_train_split_alone_and_are_recorded() -> None:
    whole, few = Wares(n_samples=200, views=5), Wares(n_samples=200, views=5, shots=3, seed=1)
    assert set(few.class_counts["class"]) == {3}
    assert set(few.split_indices("train")) < set(whole.split_indices("train"))
    for split in ("val", "test"):
        assert (few.split_indices(split) == whole.split_indices(split)).all()
    (note,) = few.data_record()["notes"]
    assert note == f"shots: 3 by seed 1: 30 of {len(whole.split_indices('train'))} training images are used."
    assert few.table.fingerprint() != whole.table.fingerprint()
    many = Wares(n_samples=200, views=5, shots=1000)
    assert (many.split_indices("train") == whole.split_indices("train")).all()
    assert "classes have fewer than 1000, first" in many.table.notes[0]


def test_shots_without_classes_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="data shots: must be 0") as error:
        Wares(shots=-1)
    assert "\n" not in str(error.value)
