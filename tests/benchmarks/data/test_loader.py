from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.data import loader
from benchmarks.harness.data import write_photos

N, SIZE = 12, 24
COLOURS = [(20 * index, 255 - 20 * index, (90 * index) % 256) for index in range(N)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), N, 60)


@pytest.fixture
def plain_folder(tmp_path: Path) -> Path:
    """Images of one colour each, which no crop and no flip changes."""
    for index, colour in enumerate(COLOURS):
        path = tmp_path / "train" / f"class_{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 45), colour).save(path)
    return tmp_path


def test_all_sides_give_the_same_images(plain_folder: Path) -> None:
    ((ours),) = list(loader.ours(plain_folder, SIZE, workers=0))
    found = [ours["image"]]
    peers = [loader.theirs(plain_folder, SIZE, 0, on_tensors=on_tensors) for on_tensors in (True, False)]
    found += [next(iter(peer))[0] for peer in peers]
    for images in found:
        assert (images.dtype, tuple(images.shape)) == (torch.uint8, (N, 3, SIZE, SIZE))
        # In any order; every pixel has its image's colour.
        colours = {tuple(pixel) for image in images for pixel in image.flatten(1).T.tolist()}
        assert colours == set(COLOURS)


def test_every_side_is_measured_in_every_round(folder: Path) -> None:
    rates = loader.measure(folder, SIZE, workers=0, rounds=2)
    assert {name: len(found) for name, found in rates.items()} == {
        loader.OURS: 2,
        loader.ON_TENSORS: 2,
        loader.ON_PILLOW: 2,
    }
    assert all(rate > 0 for found in rates.values() for rate in found)
