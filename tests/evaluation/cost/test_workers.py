from __future__ import annotations

import copy
import itertools

import pytest

from evaluation.cost.efficiency import Costs, ModelSource, build, count
from evaluation.cost.workers import groups, measure
from tests.evaluation.cost.test_efficiency import EXPERIMENT


def test_groups_hold_the_first_model_and_every_other_one_once() -> None:
    base = 600_000_000
    names = list("abcde")
    sizes = dict.fromkeys(names, 100_000_000)
    room = 3 * (base + 100_000_000)
    made = groups(names, sizes, room)
    assert all(group[0] == "a" for group in made)
    others = list(itertools.chain.from_iterable(group[1:] for group in made))
    assert others == names[1:]
    assert all(len(group) * (base + 100_000_000) <= room for group in made)
    # What is too large for any group is tried all the same, with nothing but the first beside it.
    assert groups(names[:3], {**sizes, "b": 10**12}, room) == [["a", "b"], ["a", "c"]]
    assert groups(["a"], sizes, 1) == [["a"]]


@pytest.fixture(scope="module")
def costs() -> dict[str, Costs]:
    wrong = copy.deepcopy(EXPERIMENT)
    wrong["model"]["class_path"] = "lightning_modules.Nothing"
    sources = {"small": ModelSource(EXPERIMENT), "wrong": ModelSource(wrong)}
    return measure(sources, dict.fromkeys(sources, 0), [4, 1], 3, threads=1)


def test_rounds_are_measured_beside_each_other(costs: dict[str, Costs]) -> None:
    small = costs["small"]
    assert (small.device, small.threads, small.first, small.error) == ("cpu", 1, "small", "")
    assert list(small.batches) == [1, 4]
    for one in small.batches.values():
        assert len(one.seconds) == 3
        assert min(one.seconds) > 0
        assert one.ratios == [1.0, 1.0, 1.0]


def test_memory_is_at_least_that_of_the_weights(costs: dict[str, Costs]) -> None:
    peak = costs["small"].batches[4].peak_bytes
    weights = count(*build(ModelSource(EXPERIMENT), "meta")).weight_bytes
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    # Beyond weights and a batch of a small network there are buffers of kernels; the libraries are not counted.
    assert weights <= peak < weights + 200_000_000


def test_a_model_that_fails_says_why_and_leaves_the_others_alone(costs: dict[str, Costs]) -> None:
    assert "no task of lightning_modules" in costs["wrong"].error
    assert not costs["wrong"].batches
