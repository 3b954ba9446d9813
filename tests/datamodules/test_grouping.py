from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from datamodules.splits import assign_groups, number
from tests.datamodules.random_groups import Ints, random_groups

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


@pytest.mark.parametrize("mixed", [False, True])
def test_no_group_is_torn_apart_and_all_parts_see_all_classes(mixed: bool) -> None:
    for seed in range(20):
        groups, labels = random_groups(seed, mixed=mixed)
        parts = assign_groups(groups, labels, [0.4, 0.3, 0.2, 0.1], seed, keep_first=True)
        first = np.zeros(groups.max() + 1, dtype=np.int64)
        first[groups] = parts
        assert (parts == first[groups]).all()
        assert np.abs(np.bincount(parts, minlength=4) / len(parts) - [0.4, 0.3, 0.2, 0.1]).max() < 0.04
        for label in np.unique(labels):
            if len(np.unique(groups[labels == label])) >= 4:
                assert len(set(parts[labels == label].tolist())) == 4


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
