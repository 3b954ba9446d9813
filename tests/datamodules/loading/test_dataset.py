from __future__ import annotations

import pickle
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from datamodules.loading.dataset import (
    Collate,
    CountedLoader,
    ImageDataset,
    SampleKey,
    TrainSampler,
    received,
    stack_images,
    to_be_sent,
)
from datamodules.loading.decode import ImageError, read_image
from datamodules.loading.transforms import train_transform
from datamodules.options import AugmentOptions
from datamodules.table import SampleTable
from vitrail.errors import UserError
from vitrail.types import UNKNOWN, Batch

N = 23
INDICES = np.arange(2, N, dtype=np.int64)


def table() -> SampleTable:
    frame = pd.DataFrame(
        {
            "name": [f"n{i}" for i in range(N)],
            "source": [str(i) for i in range(N)],
            "split": "train",
            "group": [f"g{i // 3}" for i in range(N)],
            "caption": [f"image {i}" for i in range(N)],
            "class": [None if i == 4 else "abc"[i % 3] for i in range(N)],
            "colour": [None if i % 4 == 0 else "de"[i % 2] for i in range(N)],
        }
    )
    return SampleTable.from_frame(frame, ["class", "colour"])


def noise(index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=generator)


def slow_noise(index: int) -> torch.Tensor:
    time.sleep(0.01 * (index % 3))  # workers finish out of order
    return noise(index)


def failing(index: int) -> torch.Tensor:
    if index == 7:
        return read_image(b"nothing", name="seven.jpg")
    return noise(index)


def dataset(reader: object = noise, seed: int = 0) -> ImageDataset:
    assert callable(reader)
    return ImageDataset(
        INDICES,
        reader,
        train_transform({"size": 16}, AugmentOptions(preset="reference")),
        seed,
    )


def loader(
    workers: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    *,
    balanced: bool = False,
    reader: object = noise,
) -> CountedLoader:
    weights = torch.linspace(0.1, 3, len(INDICES)) if balanced else None
    sampler = TrainSampler(len(INDICES), 5, rank, world_size, weights)
    sampler.set_epoch(epoch)
    return CountedLoader(
        dataset(reader),
        batch_size=4,
        sampler=sampler,
        num_workers=workers,
        collate_fn=Collate(table(), 5, augment=AugmentOptions(mixup=0.3, cutmix=1.0)),
        persistent_workers=workers > 0,
    )


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one["sample_id"].equal(other["sample_id"])
        assert one["image"].equal(other["image"])
        # A batch of one image cannot be mixed.
        assert ("mix" in one) == ("mix" in other) == (len(one["label"]) > 1)
        if "mix" in one:
            assert one["mix"]["partner"].equal(other["mix"]["partner"])
            assert one["mix"]["lam"].equal(other["mix"]["lam"])


def test_a_batch_holds_every_key_of_the_schema() -> None:
    samples = [dataset()[SampleKey(place, is_padding=place == 2)] for place in range(4)]
    batch = Collate(table(), evaluation=True)(samples)
    assert set(batch) == set(Batch.__annotations__) - {"mix", "features"}
    assert batch["captions"] == [["image 2"], ["image 3"], ["image 4"], ["image 5"]]
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["image"].dtype == torch.uint8
    assert batch["sample_id"].tolist() == [2, 3, 4, 5]
    assert batch["label"].tolist() == [2, 0, UNKNOWN, 2]
    assert batch["attributes"].keys() == {"colour"}
    assert batch["attributes"]["colour"].tolist() == [0, 1, UNKNOWN, 1]
    assert batch["caption"] == ["image 2", "image 3", "image 4", "image 5"]
    assert batch["group_id"].tolist() == [0, 1, 1, 1]
    assert batch["is_padding"].tolist() == [False, False, True, False]
    assert len(set(batch["positive_id"].tolist())) == 4, "captions differ"
    for key in ("label", "positive_id", "sample_id", "group_id"):
        assert batch[key].dtype == torch.int64
    assert batch["is_padding"].dtype == torch.bool

    assert set(Collate(table(), augment=AugmentOptions(mixup=0.2))(samples)) == set(Batch.__annotations__) - {
        "captions",
        "features",
    }


def test_augmentation_is_a_function_of_seed_epoch_and_sample() -> None:
    data = dataset()
    image = data[SampleKey(3, epoch=2)]["image"]
    torch.manual_seed(1)
    assert data[SampleKey(3, epoch=2)]["image"].equal(image)
    assert not data[SampleKey(3, epoch=1)]["image"].equal(image)
    assert not data[SampleKey(3, epoch=2, draw=1)]["image"].equal(image)
    assert not dataset(seed=1)[SampleKey(3, epoch=2)]["image"].equal(image)
    # The sample counts, not its place: a smaller split augments it alike.
    part = ImageDataset(INDICES[3:5], noise, train_transform({"size": 16}, AugmentOptions(preset="reference")), 0)
    assert part[SampleKey(0, epoch=2)]["image"].equal(image)


def test_plain_numbers_stand_for_the_first_epoch() -> None:
    data = dataset()
    assert data[3]["image"].equal(data[SampleKey(3)]["image"])
    assert len([sample["sample_id"] for sample in data]) == len(data) == len(INDICES)  # type: ignore[attr-defined]


def test_the_global_generator_is_not_consumed_by_loading() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    data = loader()
    data.generator = torch.Generator().manual_seed(0)
    list(data)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("balanced", [False, True])
def test_batches_do_not_depend_on_workers(balanced: bool) -> None:
    alone = loader(0, balanced=balanced, reader=slow_noise)
    helped = loader(2, balanced=balanced, reader=slow_noise)
    for epoch in range(3):
        for data in (alone, helped):
            data.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        assert_same(list(alone), list(helped))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_depends_neither_on_those_before_nor_on_when_it_is_set(workers: int) -> None:
    walked = loader(workers)
    for epoch in range(4):
        batches = iter(walked)
        walked.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # as Lightning does, after the iterator
        last = list(batches)
    assert_same(list(loader(workers, epoch=3)), last)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_epoch_is_resumed_in_its_middle(workers: int, rank: int) -> None:
    def fresh(epoch: int) -> CountedLoader:
        return loader(workers, epoch, rank, world_size=2)

    whole = list(fresh(2))
    started = fresh(2)
    batches = iter(started)
    first = [next(batches)]
    state = started.state_dict()
    resumed = fresh(2)
    resumed.load_state_dict(state)
    assert_same([*first, *list(resumed)], whole)
    assert len(resumed) == len(whole)
    assert resumed.state_dict()["batches"] == len(whole)
    resumed.sampler.set_epoch(3)  # type: ignore[attr-defined]
    assert_same(list(resumed), list(fresh(3)))


def test_what_is_skipped_is_not_read() -> None:
    read: list[int] = []

    def reader(index: int) -> torch.Tensor:
        read.append(index)
        return noise(index)

    data = loader(reader=reader)
    data.load_state_dict({**data.state_dict(), "batches": 4})
    rest = list(data)
    assert read == torch.cat([batch["sample_id"] for batch in rest]).tolist()
    assert len(read) == len(INDICES) - 16


def test_a_finished_epoch_and_another_epoch_begin_at_the_start() -> None:
    whole = list(loader(epoch=1))
    for state in ({"epoch": 1, "batches": len(whole)}, {"epoch": 0, "batches": 2}):
        data = loader(epoch=1)
        data.load_state_dict({**data.state_dict(), **state})
        assert_same(list(data), whole)


def test_resuming_in_the_middle_with_other_batches_is_refused() -> None:
    data = loader(epoch=1)
    data.load_state_dict({**data.state_dict(), "batches": 2, "batch_size": 8})
    with pytest.raises(UserError, match="in the middle of epoch 1 with batch_size 8, now 4"):
        next(iter(data))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_image_that_breaks_during_training_is_one_line(workers: int) -> None:
    with pytest.raises(UserError) as caught:
        list(loader(workers, reader=failing))
    assert str(caught.value) == "seven.jpg: not an image in a known format; replace or remove this image"


def test_data_sets_travel_to_spawned_workers() -> None:
    copy = pickle.loads(pickle.dumps(dataset()))  # noqa: S301 -- our own bytes
    assert copy[SampleKey(3, 1)]["image"].equal(dataset()[SampleKey(3, 1)]["image"])
    with pytest.raises(ImageError):
        pickle.loads(pickle.dumps(dataset(failing)))[5]  # noqa: S301 -- our own bytes


@pytest.mark.parametrize("interleaved", [False, True])
def test_batches_are_laid_out_channels_last(interleaved: bool) -> None:
    images = [noise(index) for index in range(3)]
    if interleaved:
        images = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in images]
    batch = stack_images(images)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, torch.stack([noise(index) for index in range(3)]))


SAMPLES = 4


def collate(samples: list[int]) -> Any:
    ids = torch.tensor(samples)
    made = {
        "image": ids[:, None, None].expand(-1, 300, 300).to(torch.uint8),
        "sample_id": ids,
        "is_padding": ids > 2,
        "mix": {"lam": ids.float() / 2, "partner": ids.flip(0)},
        "caption": [str(number) for number in samples],
    }
    return to_be_sent(made)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_come_as_they_were(workers: int) -> None:
    (sent,) = DataLoader(range(SAMPLES), batch_size=SAMPLES, num_workers=workers, collate_fn=collate)  # type: ignore[arg-type]
    assert isinstance(sent["image"], torch.Tensor)
    assert isinstance(sent["mix"]["lam"], np.ndarray) == bool(workers)
    batch = received(sent)
    assert batch["image"][2].unique().tolist() == [2]
    assert batch["sample_id"].tolist() == [0, 1, 2, 3]
    assert batch["is_padding"].dtype == torch.bool
    assert torch.equal(batch["mix"]["lam"], torch.tensor([0.0, 0.5, 1.0, 1.5]))
    assert batch["mix"]["partner"].tolist() == [3, 2, 1, 0]
    assert batch["caption"] == ["0", "1", "2", "3"]
    batch["sample_id"][0] = 7
    assert batch["sample_id"].tolist() == [7, 1, 2, 3]


def test_mixing_ends_at_an_epoch_and_may_be_left_to_the_device() -> None:
    augment = AugmentOptions(mixup=0.5, mix_end_epoch=2, mix_on_device=True)
    samples = [dataset()[SampleKey(place, epoch)] for epoch in (1, 2) for place in range(4)]
    collate = Collate(table(), 5, augment=augment)
    mixed, plain = collate(samples[:4]), collate(samples[4:])
    assert set(mixed["mix"]) == {"partner", "lam", "pending"}
    assert torch.equal(mixed["image"], stack_images([sample["image"] for sample in samples[:4]]))
    assert "mix" not in plain
