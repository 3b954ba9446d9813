from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from scipy import stats

from datamodules.loading.dataset import (
    DistinctSampler,
    EvalSampler,
    SampleKey,
    TrainSampler,
    inverse_frequency_weights,
)
from vitrail.errors import UserError
from vitrail.types import UNKNOWN


def places(sampler: TrainSampler | EvalSampler) -> list[int]:
    return [key.place for key in sampler]


def test_training_order_is_a_permutation_that_changes_by_epoch_and_seed() -> None:
    sampler = TrainSampler(53, seed=1)
    first = places(sampler)
    assert sorted(first) == list(range(53))
    assert places(sampler) == first
    sampler.set_epoch(1)
    assert sorted(places(sampler)) == list(range(53))
    assert places(sampler) != first
    assert places(TrainSampler(53, seed=2)) != first


def test_the_global_generator_is_neither_used_nor_consumed() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = [places(TrainSampler(20)), places(TrainSampler(20, weights=torch.ones(20)))]
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(1)
    assert [places(TrainSampler(20)), places(TrainSampler(20, weights=torch.ones(20)))] == first


@pytest.mark.parametrize(("size", "world_size"), [(53, 1), (53, 2), (53, 3), (54, 3), (2, 3), (1, 4)])
def test_processes_together_see_every_training_sample_once(size: int, world_size: int) -> None:
    ranks = [list(TrainSampler(size, seed=4, rank=rank, world_size=world_size)) for rank in range(world_size)]
    share = -(-size // world_size)
    assert [len(rank) for rank in ranks] == [share] * world_size
    assert len(TrainSampler(size, world_size=world_size)) == share
    seen = Counter(key.place for rank in ranks for key in rank)
    assert set(seen) == set(range(size))
    assert sum(seen.values()) - size == share * world_size - size, "only what fills up is repeated"
    assert not any(key.is_padding for rank in ranks for key in rank), "training counts every row"


@pytest.mark.parametrize(("size", "world_size"), [(53, 1), (53, 2), (53, 3), (54, 3), (2, 3), (1, 4), (0, 2)])
def test_every_evaluation_sample_is_counted_once(size: int, world_size: int) -> None:
    ranks = [list(EvalSampler(size, rank, world_size)) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    assert len(ranks[0]) == len(EvalSampler(size, 0, world_size)) == -(-size // world_size)
    counted = sorted(key.place for rank in ranks for key in rank if not key.is_padding)
    assert counted == list(range(size))
    assert all(0 <= key.place < size for rank in ranks for key in rank)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 53, 1020])
@pytest.mark.parametrize("world_size", [2, 3])
def test_evaluation_batches_are_the_same_on_any_number_of_processes(size: int, world_size: int) -> None:
    def batches(rank: int, world_size: int) -> list[list[int]]:
        keys = list(EvalSampler(size, rank, world_size, batch_size=8))
        assert len(keys) == len(EvalSampler(size, rank, world_size, batch_size=8))
        cut = [keys[first : first + 8] for first in range(0, len(keys), 8)]
        return [[key.place for key in batch if not key.is_padding] for batch in cut]

    shares = [batches(rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    dealt = [batch for together in zip(*shares, strict=True) for batch in together if batch]
    assert dealt == batches(0, 1)


def test_evaluation_keeps_the_order_and_ignores_the_epoch() -> None:
    sampler = EvalSampler(5)
    sampler.set_epoch(7)
    assert list(sampler) == [SampleKey(place) for place in range(5)]


def test_start_leaves_out_what_this_process_had_once() -> None:
    for rank in range(2):
        sampler = TrainSampler(53, rank=rank, world_size=2, weights=torch.rand(53))
        whole = list(sampler)
        sampler.start = 20
        assert list(sampler) == whole[20:]
        assert list(sampler) == whole


def test_inverse_frequency_makes_classes_equal_and_keeps_the_rate_of_unknown_ones() -> None:
    targets = torch.tensor([0] * 60 + [1] * 30 + [3] * 10 + [UNKNOWN] * 20)
    weights = inverse_frequency_weights(targets)
    assert weights.dtype == torch.float64
    for name in (0, 1, 3):
        assert weights[targets == name].sum().item() == pytest.approx(1.0)
    # 20 of 120 samples are unknown, and so is a sixth of the draws.
    assert (weights[targets == UNKNOWN].sum() / weights.sum()).item() == pytest.approx(20 / 120)
    assert inverse_frequency_weights(torch.tensor([UNKNOWN, UNKNOWN])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_balanced_draws_match_the_inverse_class_frequency(world_size: int) -> None:
    targets = torch.tensor([0] * 600 + [1] * 300 + [2] * 90 + [3] * 10)
    weights = inverse_frequency_weights(targets)
    drawn: list[int] = []
    for epoch in range(5):
        for rank in range(world_size):
            sampler = TrainSampler(len(targets), 0, rank, world_size, weights)
            sampler.set_epoch(epoch)
            share = places(sampler)
            assert len(share) == len(targets) // world_size
            by_class = torch.bincount(targets[share], minlength=4)
            assert stats.chisquare(by_class).pvalue > 1e-4, "each process alone is balanced too"
            drawn += share
    assert stats.chisquare(torch.bincount(targets[drawn], minlength=4)).pvalue > 1e-3
    # Within a class all samples are equally likely.
    rare = Counter(place for place in drawn if targets[place] == 3)
    assert stats.chisquare([rare[place] for place in range(990, 1000)]).pvalue > 1e-3


def test_samples_without_weight_are_never_drawn() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0])
    drawn = [place for epoch in range(50) for place in _epoch_places(weights, epoch)]
    assert set(drawn) == {1, 3}
    assert stats.binomtest(drawn.count(3), len(drawn), 2 / 3).pvalue > 1e-3


def test_repeated_draws_are_numbered() -> None:
    weights = torch.tensor([10.0, 1.0, 1.0, 1.0])
    ranks = [list(TrainSampler(4, 1, rank, 2, weights)) for rank in range(2)]
    order = [ranks[index % 2][index // 2] for index in range(4)]
    seen: Counter[int] = Counter()
    for key in order:
        assert key.draw == seen[key.place]
        seen[key.place] += 1
    assert max(key.draw for key in order) > 0
    assert {key.draw for key in TrainSampler(20)} == {0}


def _epoch_places(weights: torch.Tensor, epoch: int) -> list[int]:
    sampler = TrainSampler(len(weights), weights=weights)
    sampler.set_epoch(epoch)
    return places(sampler)


def batches_of_ids(ids: torch.Tensor, batch_size: int, epoch: int, world_size: int = 1) -> list[list[int]]:
    """Ids of each batch over all processes."""
    parts = []
    for rank in range(world_size):
        sampler = DistinctSampler(ids, batch_size, 3, rank, world_size)
        sampler.set_epoch(epoch)
        keys = [key.place for key in sampler]
        assert len(keys) == len(sampler)
        parts.append([keys[start : start + batch_size] for start in range(0, len(keys), batch_size)])
    return [[int(ids[place]) for batch in together for place in batch] for together in zip(*parts, strict=True)]


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (7, 1), (3, 2)])
def test_positives_never_meet_in_a_batch_of_all_processes(batch_size: int, world_size: int) -> None:
    ids = torch.randint(0, 9, (120,), generator=torch.Generator().manual_seed(0)) * 5 - 7
    epochs = [batches_of_ids(ids, batch_size, epoch, world_size) for epoch in range(3)]
    for batches in epochs:
        assert len(batches) == len(epochs[0]) > 0
        for batch in batches:
            assert len(set(batch)) == len(batch) == batch_size * world_size
    assert epochs[0] != epochs[1]


def test_batches_of_rare_ids_do_not_wait_for_the_end_of_the_epoch() -> None:
    ids = torch.tensor([0, 1, 2, 3] * 12 + [4, 5, 6, 7, 8, 9, 10, 11] * 2)
    with_rare = [[max(batch) > 3 for batch in batches_of_ids(ids, 4, epoch)] for epoch in range(40)]
    first, last = (sum(flags[place] for flags in with_rare) for place in (0, -1))
    assert 0 < first < 40
    assert 0 < last < 40


def test_no_sample_comes_twice_and_others_are_left_out_next_time() -> None:
    ids = torch.tensor([0] * 10 + [1, 2, 3] * 2)
    left_out = []
    for epoch in range(5):
        sampler = DistinctSampler(ids, 2, seed=1)
        sampler.set_epoch(epoch)
        places = [key.place for key in sampler]
        assert len(set(places)) == len(places) == 12
        left_out.append(frozenset(range(16)) - set(places))
    assert len(set(left_out)) > 1


@pytest.mark.parametrize("counts", [[3, 1, 1], [2, 2, 2], [5, 1, 1, 1], [1, 1, 1, 1], [4, 3, 2, 1]])
def test_as_many_batches_are_made_as_can_be(counts: list[int]) -> None:
    def most(left: tuple[int, ...], size: int) -> int:
        best = 0
        for chosen in itertools.combinations([i for i, count in enumerate(left) if count], size):
            rest = tuple(sorted(count - (i in chosen) for i, count in enumerate(left)))
            best = max(best, 1 + most(rest, size))
        return best

    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for size in (1, 2, 3):
        assert DistinctSampler(ids, size).num_batches == most(tuple(sorted(counts)), size)


def test_distinct_batches_go_on_where_they_were_left() -> None:
    ids = torch.arange(30) % 6
    for rank in range(2):
        walked, jumped = DistinctSampler(ids, 3, 2, rank, 2), DistinctSampler(ids, 3, 2, rank, 2)
        jumped.start = 6
        assert [key.place for key in walked][6:] == [key.place for key in jumped]
        assert len(list(jumped)) == len(walked), "once"


def test_too_few_ids_for_a_batch_are_a_user_error() -> None:
    with pytest.raises(UserError, match=r"3 different .* batch of 4"):
        DistinctSampler(torch.tensor([0, 1, 2, 0]), 2, world_size=2)


@pytest.mark.parametrize("weights", [None, torch.ones(20)])
def test_repeated_views_follow_each_other_and_are_augmented_differently(weights: torch.Tensor | None) -> None:
    keys = list(TrainSampler(20, 3, weights=weights, repeats=3))
    assert len(keys) == 20
    for first in range(0, 18, 3):
        group = keys[first : first + 3]
        assert len({key.place for key in group}) == 1
        assert len({key.draw for key in group}) == 3
    if weights is None:
        assert len({key.place for key in keys}) == 7
    shares = [list(TrainSampler(20, 3, rank, 2, weights, repeats=3)) for rank in range(2)]
    assert [key for pair in zip(*shares, strict=True) for key in pair] == keys
