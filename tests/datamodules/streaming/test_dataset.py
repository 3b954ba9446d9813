from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from datamodules.loading.dataset import SampleKey
from datamodules.loading.decode import ImageError
from datamodules.streaming.dataset import StreamedDataset, StreamOrder, StreamSampler
from datamodules.streaming.shards import Shards
from tests.datamodules.streaming.shard_sets import encoded

SIZES = (7, 5, 8)


def brightness(image: torch.Tensor) -> torch.Tensor:
    """An image of one size whose content is random, as augmentation is."""
    return (image[:, :4, :4].float() * torch.rand(())).to(torch.uint8)


def shards(root: Path, bad: tuple[int, ...] = ()) -> Shards:
    """Three files with 20 rows in all, in row groups of three."""
    urls, row = [], 0
    for number, size in enumerate(SIZES):
        cells = [b"no image" if row + i in bad else encoded(row + i) for i in range(size)]
        path = root / f"{number}.parquet"
        pq.write_table(pa.table({"image": cells}), path, row_group_size=3)
        urls.append(str(path))
        row += size
    return Shards(urls, np.cumsum(SIZES), pa.table({"key": [f"k{n}" for n in range(20)]}), "image")


def dataset(root: Path, bad: tuple[int, ...] = (), **options: Any) -> StreamedDataset:
    order = {"batch_size": 4, "streams": 2, "shuffle_buffer": 6, **options.pop("order", {})}
    sizes = np.array(SIZES, dtype=np.int64)
    return StreamedDataset(
        np.arange(20, dtype=np.int64), shards(root, bad), StreamOrder(sizes, **order), brightness, 4, seed=5, **options
    )


def test_samples_are_those_of_image_by_image_reading(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    samples = [data[slot] for slot in range(20)]
    assert sorted(sample["sample_id"] for sample in samples) == list(range(20))
    again = dataset(tmp_path)
    # In any order it is the same, only slower.
    for slot in (17, 3, 3, 19, 0):
        assert again[slot]["sample_id"] == samples[slot]["sample_id"]
        assert again[slot]["image"].equal(samples[slot]["image"])
    with pytest.raises(IndexError):
        data[20]


def test_epochs_are_ordered_and_augmented_differently(tmp_path: Path) -> None:
    data = dataset(tmp_path)
    one, other = ([data[SampleKey(slot, epoch)] for slot in range(20)] for epoch in (0, 1))
    assert [sample["sample_id"] for sample in one] != [sample["sample_id"] for sample in other]
    by_id = {sample["sample_id"]: sample["image"] for sample in other}
    assert not all(sample["image"].equal(by_id[sample["sample_id"]]) for sample in one)


def test_what_fills_up_is_another_draw_in_training_and_padding_in_evaluation(tmp_path: Path) -> None:
    for buffer in (6, 0):
        last = dataset(tmp_path, order={"rank": 2, "world_size": 3, "shuffle_buffer": buffer})
        samples = [last[slot] for slot in range(7)]
        fills = [sample for sample in samples if sample["draw"] or sample["is_padding"]]
        assert len(fills) == 1, "3 · 7 are 21"
        assert (fills[0]["draw"], fills[0]["is_padding"]) == ((1, False) if buffer else (0, True))


def test_looking_at_a_sample_without_its_image_reads_nothing(tmp_path: Path) -> None:
    data = dataset(tmp_path, caption_numbers=np.arange(20) % 3)
    for path in tmp_path.iterdir():
        path.unlink()
    samples = [data.without_image(slot) for slot in range(20)]
    assert sorted(sample["sample_id"] for sample in samples) == list(range(20))
    assert all(sample["caption_number"] == sample["sample_id"] % 3 for sample in samples)


def test_replaced_images_keep_the_number_and_are_noted_once(tmp_path: Path) -> None:
    journal = tmp_path / "run" / "skipped.jsonl"
    data = dataset(tmp_path, bad=(9, 2), on_bad="replace", journal=journal)
    with pytest.warns(UserWarning, match="left out: .*k9"):
        batches = [data.__getitems__(list(range(start, start + 4))) for start in range(0, 20, 4)]
    for _ in range(2):
        assert [len(batch) for batch in batches] == [4] * 5
        seen = [sample["sample_id"] for batch in batches for sample in batch]
        assert set(seen) == set(range(20)) - {9, 2}
        batches = [data.__getitems__(list(range(start, start + 4))) for start in range(0, 20, 4)]
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert sorted((line["row"], line["name"]) for line in lines) == [(2, "k2"), (9, "k9")]
    assert not journal.stat().st_mode & 0o111


@pytest.mark.filterwarnings("ignore:left out")
def test_a_batch_without_any_readable_image_is_refused(tmp_path: Path) -> None:
    data = dataset(tmp_path, bad=tuple(range(20)), on_bad="replace")
    with pytest.raises(ImageError, match="no image of its batch can be read"):
        data.__getitems__([0, 1, 2, 3])


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
    options: dict[str, Any] = {"world_size": world_size, "streams": streams, "interleave": 3}
    ranks = [order(sizes, rank=rank, **options) for rank in range(world_size)]
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


@pytest.mark.slow
def test_interleaved_shards_mix() -> None:
    """Sixteen shards of one class each: how many a batch has, and how often neighbours share one."""
    mixed, neighbours = [], []
    for interleave in (1, 4):
        one = order([250] * 16, batch_size=64, streams=4, shuffle_buffer=1000, interleave=interleave)
        which = np.array(delivered(one)) // 250
        full = which[: len(which) // 64 * 64].reshape(-1, 64)
        mixed.append(np.mean([len(set(batch.tolist())) for batch in full]))
        neighbours.append((full[:, 1:] == full[:, :-1]).mean())
        assert sorted(delivered(one)) == list(range(4000))
    assert mixed[0] < 2.5
    assert mixed[1] > 3.9
    assert neighbours[0] > 0.6
    assert neighbours[1] < 0.35, "five shards in four lanes: 7/25"


def test_batches_come_from_the_streams_in_turn() -> None:
    one = order((50,), streams=3, batch_size=4)
    assert [one.stream_of(slot)[0] for slot in range(0, 50, 4)] == [0, 1, 2] * 4 + [0]
    assert [one.length(stream) for stream in range(3)] == [4 * 4 + 2, 4 * 4, 4 * 4]
    assert one.stream_of(13) == (0, 5)


def test_the_sampler_continues_at_its_start() -> None:
    sampler = StreamSampler(order((10, 9), world_size=2))
    sampler.set_epoch(4)
    assert [(key.place, key.epoch) for key in sampler] == [(slot, 4) for slot in range(10)]
    sampler.start = 6
    assert [key.place for key in sampler] == [6, 7, 8, 9]
    assert len(list(sampler)) == len(sampler) == 10
    assert [key.epoch for key in StreamSampler(order((3,)), view=7)] == [7, 7, 7]
