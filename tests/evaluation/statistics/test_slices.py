from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import fisher_exact

from evaluation.statistics.slices import column_slices, permutation_p, searched_slices, slice_scores
from tests.evaluation.predictions_fixture import make_predictions_of_every_kind

RNG = np.random.default_rng(0)


def test_p_values_of_single_samples_are_those_of_the_exact_test() -> None:
    right = RNG.random(120) < 0.8
    inside = np.stack([RNG.random(120) < share for share in (0.1, 0.3, 0.5)])
    inside[1] &= right | (RNG.random(120) < 0.3)
    found = permutation_p(right.astype(np.float64), np.arange(120).astype(object), inside)
    for mask, p_value in zip(inside, found, strict=True):
        table = [[(right & mask).sum(), (~right & mask).sum()], [(right & ~mask).sum(), (~right & ~mask).sum()]]
        assert p_value == pytest.approx(fisher_exact(table).pvalue, abs=0.04)


def test_a_slice_of_whole_groups_is_tested_by_its_groups() -> None:
    groups = np.repeat(np.arange(40), 10).astype(object)
    inside = np.stack([groups < 1, groups < 8])
    right = (~inside[1] | (RNG.random(400) < 0.3)).astype(np.float64)
    one, eight = permutation_p(right, groups, inside)
    assert one > 0.1  # one of eight such groups in forty, however many images it has
    assert eight < 1e-3


def test_slices_are_scored_next_to_the_rest_the_worst_first() -> None:
    predictions = make_predictions_of_every_kind(n=300)
    rows = np.arange(300)
    slices = {"good": rows < 150, "bad": rows >= 150, "tiny": rows < 6, "none": rows < 0}
    predictions.logits["class"][150:] = RNG.normal(size=(150, 3))
    found = slice_scores(predictions, "class", slices)
    assert [one.name for one in found] == ["bad", "good", "tiny"]  # few groups come last
    right = predictions.predicted("class") == predictions.targets["class"]
    known = predictions.targets["class"] >= 0
    bad, _, tiny = found
    inside = known & slices["bad"]
    assert (bad.n, bad.groups) == (inside.sum(), len(set(predictions.groups[inside])))
    assert bad.score.value == pytest.approx(right[known & slices["bad"]].mean())
    assert bad.rest == pytest.approx(right[known & ~slices["bad"]].mean())
    assert bad.difference == pytest.approx(bad.score.value - bad.rest)
    assert bad.p_value < 0.001
    assert tiny.note == "fewer than 5 groups"
    [worst, best] = slice_scores(predictions, "class", {name: slices[name] for name in ("good", "bad")}, "nll")
    assert (worst.name, best.name) == ("bad", "good")  # lower is better
    [first, _] = slice_scores(predictions, "class", {name: slices[name] for name in ("good", "bad")}, "auroc")
    assert first.name == "bad"
    assert np.isnan(first.p_value)


def test_slices_of_columns() -> None:
    words = np.array(["a", "b", None, "a"], dtype=object)
    assert {name: mask.tolist() for name, mask in column_slices("store", words).items()} == {
        "store = a": [True, False, False, True],
        "store = b": [False, True, False, False],
    }
    assert list(column_slices("n", np.array([1.0, 2.0, np.nan]))) == ["n = 1", "n = 2"]
    numbers = np.append(np.arange(100.0), np.nan)
    quarters = column_slices("width", numbers)
    assert list(quarters)[:2] == ["width <= 24.75", "24.75 < width <= 49.5"]
    assert [int(mask.sum()) for mask in quarters.values()] == [25, 25, 25, 25]


def test_a_search_looks_at_columns_and_pairs_that_are_large_enough() -> None:
    store = np.array(["north", "south"] * 40, dtype=object)
    colour = np.array(["red"] * 40 + ["blue"] * 35 + ["green"] * 5, dtype=object)
    unique = np.arange(80).astype(str).astype(object)
    found = searched_slices({"store": store, "colour": colour, "id": unique, "empty": np.full(80, np.nan)})
    singles = ["store = north", "store = south", "colour = blue", "colour = red"]
    assert list(found)[:4] == singles
    assert set(found) - set(singles) == {
        f"store = {a}, colour = {b}" for a in ("north", "south") for b in ("blue", "red")
    }
