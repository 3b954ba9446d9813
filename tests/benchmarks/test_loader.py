from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import loader
from benchmarks.pictures import write_photos

N, SIZE = 12, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), N, 60)


def test_all_sides_give_the_same_kind_of_pictures(folder: Path) -> None:
    ((ours),) = list(loader.ours(folder, SIZE, workers=0))
    found = [ours["image"]]
    found += [next(iter(loader.theirs(folder, SIZE, 0, on_tensors=on_tensors)))[0] for on_tensors in (True, False)]
    assert {(picture.dtype, tuple(picture.shape)) for picture in found} == {(torch.uint8, (N, 3, SIZE, SIZE))}
    # Other random crops of the same pictures: the mean colours resemble each other, in any order of the pictures.
    colours = [picture.float().mean(dim=(1, 2, 3)).sort().values for picture in found]
    assert all(torch.allclose(colour, colours[0], atol=8) for colour in colours[1:])


def test_every_side_is_measured_in_every_round(folder: Path) -> None:
    rates = loader.measure(folder, SIZE, workers=0, rounds=2)
    assert {name: len(found) for name, found in rates.items()} == {
        loader.OURS: 2,
        loader.ON_TENSORS: 2,
        loader.ON_PILLOW: 2,
    }
    assert all(rate > 0 for found in rates.values() for rate in found)
