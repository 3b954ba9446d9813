from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from datamodules.streaming.dataset import StreamOrder, StreamSampler


def order(sizes: Sequence[int], **options: Any) -> StreamOrder:
    defaults: dict[str, Any] = {"batch_size": 4, "streams": 3, "shuffle_buffer": 30}
    return StreamOrder(np.array(sizes, dtype=np.int64), **{**defaults, **options})


def delivered(one: StreamOrder, epoch: int = 0) -> list[int]:
    """Places of the split in the order of the slots."""
    found = []
    for slot in range(one.share):
        stream, place = one.stream_of(slot)
        part = one.part(epoch, stream)
        found.append(int(part.places[part.order[place]]))
    return found


@pytest.mark.parametrize("sizes", [(10, 7, 12, 3, 9), (41,), (1, 1, 1), (5, 0, 6)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("streams", [1, 2, 4])
def test_all_processes_together_see_every_sample_once(sizes: tuple[int, ...], world_size: int, streams: int) -> None:
    ranks = [order(sizes, rank=rank, world_size=world_size, streams=streams) for rank in range(world_size)]
    shares = [delivered(one, epoch=2) for one in ranks]
    total = sum(sizes)
    assert {len(share) for share in shares} == {-(-total // world_size)}, "all make the same number of steps"
    counts = np.bincount(np.concatenate(shares), minlength=total)
    assert counts.min() == 1
    # What fills up is marked as a further round, and nothing else is.
    rounds = np.concatenate([one.part(2, stream).rounds for one in ranks for stream in range(streams)])
    assert counts.sum() - total == (rounds > 0).sum() < world_size


def test_epochs_and_seeds_differ_and_repeat() -> None:
    sizes = (10, 7, 12, 3, 9)
    seen = {tuple(delivered(order(sizes, seed=seed), epoch)) for seed in (0, 1) for epoch in range(3)}
    assert len(seen) == 6
    assert delivered(order(sizes), 1) == delivered(order(sizes), 1)


def test_without_a_buffer_the_shards_own_order_comes_in_every_epoch() -> None:
    one = order((10, 7, 12), shuffle_buffer=0, streams=1)
    assert delivered(one, 0) == delivered(one, 5) == list(range(29))


@pytest.mark.parametrize("window", [2, 5, 16])
def test_no_more_is_held_than_the_buffer(window: int) -> None:
    one = order((100, 90, 110), streams=2, shuffle_buffer=2 * window)
    for stream in range(2):
        part = one.part(3, stream)
        held: set[int] = set()
        read = largest = 0
        for place in part.order:
            while place not in held:
                held.add(read)
                read += 1
            largest = max(largest, len(held))
            held.remove(int(place))
        assert window // 2 < largest <= window + 1, "it is used, and not exceeded"
        assert not held


def test_a_stream_reads_whole_shards_but_at_its_cuts() -> None:
    sizes = (20, 30, 25, 15, 40, 10, 35, 25)
    edges = np.cumsum(sizes)
    readers = np.zeros(len(sizes), dtype=int)
    for rank in range(2):
        one = order(sizes, rank=rank, world_size=2, streams=2)
        for stream in range(2):
            shards = np.searchsorted(edges, one.part(0, stream).places, side="right")
            assert len(np.unique(shards)) == (np.diff(shards) != 0).sum() + 1, "no shard is begun twice"
            readers[np.unique(shards)] += 1
    # Four pieces have three cuts, each of which goes through one shard at most.
    assert readers.sum() <= len(sizes) + 3
    assert readers.min() == 1


def test_batches_come_from_the_streams_in_turn() -> None:
    one = order((50,), streams=3, batch_size=4)
    assert [one.stream_of(slot)[0] for slot in range(0, 50, 4)] == [0, 1, 2] * 4 + [0]
    assert [one.length(stream) for stream in range(3)] == [4 * 4 + 2, 4 * 4, 4 * 4]
    assert one.stream_of(13) == (0, 5)


def test_the_sampler_goes_on_where_it_is_told_to() -> None:
    sampler = StreamSampler(order((10, 9), world_size=2))
    sampler.set_epoch(4)
    assert [(key.place, key.epoch) for key in sampler] == [(slot, 4) for slot in range(10)]
    sampler.start = 6
    assert [key.place for key in sampler] == [6, 7, 8, 9]
    assert len(list(sampler)) == len(sampler) == 10
    assert [key.epoch for key in StreamSampler(order((3,)), view=7)] == [7, 7, 7]
