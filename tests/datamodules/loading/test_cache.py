from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ImageFolder, Wares
from datamodules.loading import cache as pixel_cache
from datamodules.loading.cache import PixelCache
from datamodules.loading.transforms import scale_down, useful_short_side
from datamodules.options import AugmentOptions, CheckOptions, ImageOptions, LoaderOptions
from datamodules.splits import SplitOptions
from tests.support.data import write_image_folder
from vitrail.errors import UserError
from vitrail.files import cache_directory
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


class Counting(ImageFolder):
    """Counts how often each image is decoded, by row."""

    def read_image(self, index: int) -> torch.Tensor:
        with open(self.journal, "a") as file:  # noqa: PTH123 -- loader processes write as well
            file.write(f"{index}\n")
        return super().read_image(index)

    journal = ""


def counting(folder: Path, journal: Path, **options: Any) -> tuple[ImageFolder, list[int]]:
    """A data set whose training and validation images have been read from the cache, and the rows that were decoded."""
    Counting.journal = str(journal)
    made = Counting(
        str(folder),
        image=ImageOptions(size=24),
        augment=AugmentOptions(preset="light"),
        loader=LoaderOptions(batch_size=4, cache="always"),
        checks=CheckOptions(allow_leaks=["near"], **options),  # near duplicates are compared by their pixels
    )
    made.prepare_data()
    made.setup("fit")
    for split in ("train", "val"):
        batches(made, split)
    return made, sorted(map(int, journal.read_text().split()))


def test_the_first_start_decodes_every_image_once(folder: Path, tmp_path: Path) -> None:
    made, decoded = counting(folder, tmp_path / "first")
    assert decoded == list(range(len(made.table)))
    written = {path.name: path.read_bytes() for path in chunks()}
    assert len(written) >= 4
    for path in chunks():
        path.unlink()
    # The cache by itself writes the same.
    made, decoded = counting(folder, tmp_path / "second")
    used = np.sort(np.concatenate([made.split_indices(split) for split in ("train", "val")])).tolist()
    assert sorted(set(decoded)) == used, "what was verified stays so"
    assert {path.name: path.read_bytes() for path in chunks()} == written


def test_unreadable_images_leave_no_hole_in_what_is_cached(folder: Path, tmp_path: Path) -> None:
    own = write_image_folder(tmp_path / "images", size=48)
    bad = Path(data(own, cache="never").table.source(2))
    bad.write_bytes(b"no image")
    made, decoded = counting(own, tmp_path / "journal", on_bad_image="skip")
    assert decoded == list(range(len(made.table)))
    assert 2 not in made.split_indices(made.table.split(2))


def test_a_full_disk_while_verifying_is_left_to_the_cache_itself(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pixel_cache, "_write_chunk", full)
        made = data(folder, cache="auto")
    assert not chunks()
    assert len(batches(made, "train")) > 0
    assert chunks()


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


IMAGES = 11
SHORT_SIDE = 12


def image(row: int) -> torch.Tensor:
    """An image whose size and pixels are a function of its row; some are smaller than what is kept."""
    generator = torch.Generator().manual_seed(row)
    return torch.randint(0, 256, (3, 8 + 3 * row, 30 - row), dtype=torch.uint8, generator=generator)


def content(changed: int | None = None) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    values = np.repeat(np.arange(IMAGES, dtype=np.uint8)[:, None], 32, axis=1)
    if changed is not None:
        values[changed] = 255
    return values


def cache(folder: Path, read: Callable[[int], torch.Tensor] = image, **changes: object) -> PixelCache:
    settings: dict[str, object] = {
        "read_image": read,
        "rows": np.arange(IMAGES, dtype=np.int64),
        "content": content(),
        "short_side": SHORT_SIDE,
        "interpolation": "bicubic",
        "folder": folder,
        **changes,
    }
    return PixelCache(**settings)  # type: ignore[arg-type]


def built(folder: Path, read: Callable[[int], torch.Tensor] = image, **changes: object) -> PixelCache:
    made = cache(folder, read, **changes)
    made.build(10**9, 0)
    return made


def assert_reads(made: PixelCache, rows: Sequence[int] = range(IMAGES)) -> None:
    for row in rows:
        assert torch.equal(made.read(row), scale_down(image(row), SHORT_SIDE, "bicubic"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_cache, "CHUNK", 4)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pixels"))


@pytest.mark.parametrize("workers", [0, 2])
def test_gives_what_decoding_and_scaling_gives(tmp_path: Path, workers: int) -> None:
    made = cache(tmp_path)
    made.build(10**9, workers)
    assert len(files(tmp_path)) == 3
    assert_reads(made)


def test_a_second_one_decodes_nothing(tmp_path: Path) -> None:
    cache(tmp_path).build(10**9, 0)

    def unreadable(row: int) -> torch.Tensor:
        raise AssertionError("decoded again")

    again = built(tmp_path, read_image=unreadable)
    assert_reads(again, [10])


def test_only_the_chunk_of_a_changed_image_is_written_again(tmp_path: Path) -> None:
    cache(tmp_path).build(10**9, 0)
    decoded: list[int] = []

    def noting(row: int) -> torch.Tensor:
        decoded.append(row)
        return image(row)

    changed = cache(tmp_path, noting, content=content(changed=5))
    assert changed.missing() == [1]
    changed.build(10**9, 0)
    assert set(decoded) >= {4, 5, 6, 7}
    assert len(files(tmp_path)) == 4


@pytest.mark.parametrize("changed", range(IMAGES))
def test_a_change_of_any_image_changes_the_name_of_its_chunk_and_no_other(tmp_path: Path, changed: int) -> None:
    """The first and the last image of a chunk too, and those of the last chunk, which is shorter."""
    before, after = cache(tmp_path)._names, cache(tmp_path, content=content(changed))._names
    assert [number for number in range(3) if before[number] != after[number]] == [changed // 4]


def test_a_chunk_with_fewer_images_has_another_name(tmp_path: Path) -> None:
    for count in range(1, IMAGES):
        fewer = cache(tmp_path, rows=np.arange(count, dtype=np.int64))._names
        last = -(-count // 4) - 1
        assert (fewer[last] == cache(tmp_path)._names[last]) == (count % 4 == 0)


@pytest.mark.parametrize("other", [{"short_side": 13}, {"interpolation": "bilinear"}])
def test_another_size_has_other_chunks(tmp_path: Path, other: dict[str, object]) -> None:
    cache(tmp_path).build(10**9, 0)
    assert len(cache(tmp_path, image, **other).missing()) == 3


def test_some_rows_of_a_table(tmp_path: Path) -> None:
    rows = np.array([1, 4, 7, 9, 10], dtype=np.int64)
    made = built(tmp_path, rows=rows)
    assert_reads(made, rows.tolist())


def test_changing_a_image_does_not_reach_the_file(tmp_path: Path) -> None:
    made = built(tmp_path)
    made.read(2).zero_()
    assert_reads(cache(tmp_path), [2])


def test_a_removed_chunk_is_made_again_when_it_is_read(tmp_path: Path) -> None:
    made = built(tmp_path)
    for name in files(tmp_path):
        (tmp_path / name).unlink()
    assert_reads(made, [6])
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("damage", [b"", b"something else that is long enough for a header", None])
def test_a_broken_chunk_is_made_again(tmp_path: Path, damage: bytes | None) -> None:
    made = built(tmp_path)
    for name in files(tmp_path):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    assert_reads(made)


def test_every_changed_byte_of_a_chunk_is_noticed_and_mended(tmp_path: Path) -> None:
    built(tmp_path, rows=np.arange(2, dtype=np.int64), short_side=3)
    [name] = files(tmp_path)
    path, whole = tmp_path / name, (tmp_path / name).read_bytes()
    expected = [scale_down(image(row), 3, "bicubic") for row in range(2)]
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x40
        # A new file as a copying program writes it: what is mapped is never changed in place.
        path.unlink()
        path.write_bytes(damaged)
        again = cache(tmp_path, rows=np.arange(2, dtype=np.int64), short_side=3)
        with pytest.warns(UserWarning, match=f"{name}: is damaged.*; its images are decoded again"):
            read = [again.read(row) for row in range(2)]
        assert all(map(torch.equal, read, expected))
        assert path.read_bytes() == whole


def killed_while_building(folder: Path, die_at: int) -> None:
    def read(row: int) -> torch.Tensor:
        if row == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return image(row)

    killed = cache(folder, read)
    # Estimating the size reads images too, and is not what is to be killed.
    killed.estimated_bytes = lambda *, everything=False: 0  # type: ignore[method-assign]
    killed.build(10**9, 0)


@pytest.mark.parametrize("die_at", [0, 3, 4, 6, 10])
def test_a_kill_leaves_whole_chunks_or_none(tmp_path: Path, die_at: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed_while_building, args=(tmp_path, die_at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(files(tmp_path)) == die_at // 4
    assert list(tmp_path.glob(".*.pixels.*")), "the chunk that was being written"
    after = built(tmp_path)
    assert not list(tmp_path.glob(".*.pixels.*"))
    assert_reads(after)


def build_and_count(folder: Path, counter: Path) -> None:
    def slow(row: int) -> torch.Tensor:
        with counter.open("ab") as file:
            file.write(b"x")
        time.sleep(0.01)
        return image(row)

    made = cache(folder, slow)
    made.estimated_bytes = lambda *, everything=False: 0  # type: ignore[method-assign]
    made.build(10**9, 0)


def test_two_runs_at_once_decode_each_image_once(tmp_path: Path) -> None:
    counter = tmp_path / "decoded"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build_and_count, args=(tmp_path / "cache", counter)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counter.stat().st_size == IMAGES


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    sizes = []
    for age, side in enumerate((10, 11, 12)):
        made = built(tmp_path, short_side=side)
        for name in made._names:
            os.utime(tmp_path / name, (1_000 + age, 1_000 + age))
        sizes.append(sum((tmp_path / name).stat().st_size for name in made._names))
    newest = cache(tmp_path, short_side=9)
    newest.build(newest.estimated_bytes() + sizes[2] + 1, 0)
    assert len(cache(tmp_path, short_side=10).missing()) == 3
    assert len(cache(tmp_path, short_side=11).missing()) == 3
    assert not cache(tmp_path, short_side=12).missing()
    assert not newest.missing()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=r"the disk is full; .*VITRAIL_CACHE") as caught:
        cache(tmp_path).build(10**9, workers)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.pixels"))
    assert not list(tmp_path.glob(".*.pixels.*"))


def test_a_really_full_disk(tmp_path: Path) -> None:
    # Every write to this device fails as on a full disk.
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("this system has no /dev/full")
    made = cache(tmp_path)
    for number, name in enumerate(made._names):
        (tmp_path / f".{name}.{os.getpid()}").symlink_to(device)
        with pytest.raises(OSError, match="No space left") as caught:
            made.make(number)
        assert caught.value.errno == errno.ENOSPC
    assert not files(tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written to"):
        cache(tmp_path / "file" / "pixels").build(10**9, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_image_that_became_unreadable(tmp_path: Path, workers: int) -> None:
    def bad(row: int) -> torch.Tensor:
        if row == 5:
            raise UserError("bottle.jpg: no such file")
        return image(row)

    made = cache(tmp_path, bad)
    made.estimated_bytes = lambda *, everything=False: 0  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"^bottle.jpg: no such file$"):
        made.build(10**9, workers)


def test_the_estimate_is_near(tmp_path: Path) -> None:
    made = cache(tmp_path)
    estimate = made.estimated_bytes()
    made.build(10**9, 0)
    written = sum((tmp_path / name).stat().st_size for name in files(tmp_path))
    assert estimate == pytest.approx(written, rel=0.1)
    assert made.estimated_bytes() == 0


def test_what_does_not_fit_is_decoded_each_time_and_the_rest_is_kept(tmp_path: Path) -> None:
    whole = cache(tmp_path)
    part = whole.fitting(whole.estimated_bytes() * 2 // 3)
    part.build(10**9, 0)
    assert part.kept == len(files(tmp_path)) == 2
    assert_reads(part)
    (tmp_path / files(tmp_path)[0]).unlink()
    assert_reads(part)
    assert len(files(tmp_path)) == 1, "there was no room for both"


def test_a_lossy_cache_gives_the_same_pixels_from_the_disk_and_without(tmp_path: Path) -> None:
    cached, decoded = built(tmp_path, lossy=True), cache(tmp_path / "none", lossy=True, kept=0)
    decoded.build(10**9, 0)
    for row in range(IMAGES):
        assert torch.equal(cached.read(row), decoded.read(row))
        assert cached.read(row).shape == scale_down(image(row), SHORT_SIDE, "bicubic").shape
    assert not set(files(tmp_path)) & set(files(built(tmp_path / "exact").folder))


@pytest.mark.parametrize(("limit", "state"), [(1e-5, "jpeg"), (1.0, None)])
def test_only_training_with_random_crops_may_be_lossy_and_says_so(
    folder: Path, caplog: pytest.LogCaptureFixture, limit: float, state: str | None
) -> None:
    augment = AugmentOptions(preset="light")
    exact = batches(data(folder, augment, cache="never"), "val")
    made = data(folder, augment, cache="auto", cache_limit_gb=limit)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        batches(made, "train")
    assert made.state_dict().get("cache") == state
    assert ("JPEG files of quality 95" in caplog.text) == (state == "jpeg")
    for one, other in zip(batches(made, "val"), exact, strict=True):
        assert torch.equal(one["image"], other["image"])
