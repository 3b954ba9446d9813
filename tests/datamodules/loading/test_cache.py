from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ImageFolder, Wares
from datamodules.checks.verify import cache_directory
from datamodules.loading.transforms import useful_short_side
from datamodules.options import AugmentOptions, CheckOptions, ImageOptions, LoaderOptions
from datamodules.splits import SplitOptions
from tests.support.data import write_image_folder
from vitrail.errors import UserError
from vitrail.types import Batch, Resize


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"), size=48)


def data(folder: Path, augment: AugmentOptions = AugmentOptions(), **loader: Any) -> ImageFolder:
    made = ImageFolder(
        str(folder),
        image=ImageOptions(size=24),
        augment=augment,
        loader=LoaderOptions(**{"batch_size": 4, **loader}),
    )
    made.prepare_data()
    made.setup("fit")
    return made


def chunks() -> list[Path]:
    return sorted((cache_directory() / "pixels").glob("*.pixels"))


def batches(made: ImageFolder, split: str) -> list[Batch]:
    return list(made.train_dataloader() if split == "train" else made.eval_dataloader(split))


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("workers", [0, 2])
def test_without_random_crops_the_pixels_are_those_without_a_cache(folder: Path, split: str, workers: int) -> None:
    augment = AugmentOptions(horizontal_flip=0.5, brightness=0.3)
    plain = batches(data(folder, augment, cache="never"), split)
    assert not chunks()
    cached = batches(data(folder, augment, cache="always", num_workers=workers), split)
    assert chunks()
    for ours, theirs in zip(cached, plain, strict=True):
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["sample_id"], theirs["sample_id"])


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_images_of_any_shape_are_resized_alike_with_a_cache(tmp_path: Path, resize: Resize) -> None:
    for number, shape in enumerate([(90, 50), (40, 130), (24, 24), (11, 60), (9, 13)] * 2):
        noise = np.random.default_rng(number).integers(0, 256, (*shape, 3), dtype=np.uint8)
        (tmp_path / f"{number % 2}").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / f"{number % 2}" / f"{number}.png")
    seen = []
    for cache in ("never", "always"):
        made = ImageFolder(
            str(tmp_path),
            image=ImageOptions(size=24, resize=resize, crop_fraction=0.9),
            loader=LoaderOptions(batch_size=4, cache=cache),
            split=SplitOptions(by="random"),
            checks=CheckOptions(allow_leaks=["near"]),
        )
        made.prepare_data()
        made.setup("fit")
        seen.append(torch.cat([batch["image"] for split in ("train", "val", "test") for batch in batches(made, split)]))
    assert chunks()
    assert torch.equal(*(images.sort(dim=0).values for images in seen))


def test_random_crops_are_nearly_those_without_a_cache(folder: Path) -> None:
    augment = AugmentOptions(preset="light")
    plain = batches(data(folder, augment, cache="never"), "train")
    cached = batches(data(folder, augment), "train")
    difference = torch.stack(
        [(a["image"].float() - b["image"].float()).abs().mean() for a, b in zip(plain, cached, strict=True)]
    )
    assert 0 < difference.mean() < 6


def test_training_keeps_enough_pixels_for_its_smallest_crop() -> None:
    image: Any = {"size": 224, "crop_fraction": 0.875}
    assert useful_short_side(image, AugmentOptions()) == 256
    assert useful_short_side(image, AugmentOptions(horizontal_flip=0.5)) == 256
    assert useful_short_side({"size": 224}, AugmentOptions(preset="light")) == 251
    assert useful_short_side(image, AugmentOptions(random_resized_crop=[0.08, 1.0])) == 336


def test_auto_says_why_there_is_no_room(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        batches(data(folder, cache="auto", cache_limit_gb=1e-6), "val")
    assert not chunks()
    assert "decoded again each time, because" in caplog.text
    assert "cache_limit_gb" in caplog.text


def test_always_without_room_is_refused(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"data loader.cache: always, but .*cache_limit_gb.*; or set loader.cache: auto"
    ):
        batches(data(folder, cache="always", cache_limit_gb=1e-6), "val")


def test_a_disk_with_little_room_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.loading.cache.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match=r"has 0.0 GB left; free some"):
        batches(data(folder, cache="always"), "val")


def test_generated_images_need_no_cache() -> None:
    made = Wares(30, image=ImageOptions(size=16), loader=LoaderOptions(cache="always"))
    made.setup("fit")
    next(iter(made.train_dataloader()))
    assert not chunks()


def test_a_changed_image_is_seen(folder: Path, tmp_path: Path) -> None:
    own = write_image_folder(tmp_path / "images", size=48)
    before = batches(data(own), "val")[0]
    first = own / str(data(own).table.names[int(before["sample_id"][0])])
    other = own / str(data(own).table.names[int(before["sample_id"][-1])])
    first.write_bytes(other.read_bytes())
    after = data(own, cache="auto")
    after.check_options = CheckOptions(allow_leaks=["exact", "near", "groups"])
    changed = batches(after, "val")[0]["image"]
    assert not torch.equal(changed[0], before["image"][0])
    assert torch.equal(changed[0], before["image"][-1])
    assert torch.equal(changed[1:], before["image"][1:])
