from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.loading import cache as pixel_cache
from datamodules.loading.cache import PixelCache
from datamodules.loading.transforms import scale_down
from vitrail.errors import UserError

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
    for row in range(IMAGES):
        assert torch.equal(made.read(row), scale_down(image(row), SHORT_SIDE, "bicubic"))


def test_smaller_images_keep_their_size(tmp_path: Path) -> None:
    made = cache(tmp_path)
    made.build(10**9, 0)
    assert torch.equal(made.read(0), image(0))


def test_a_second_one_decodes_nothing(tmp_path: Path) -> None:
    cache(tmp_path).build(10**9, 0)

    def unreadable(row: int) -> torch.Tensor:
        raise AssertionError("decoded again")

    again = cache(tmp_path, unreadable)
    again.build(10**9, 0)
    assert torch.equal(again.read(10), scale_down(image(10), SHORT_SIDE, "bicubic"))


def test_only_the_chunk_of_a_changed_image_is_made_anew(tmp_path: Path) -> None:
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
    made = cache(tmp_path, rows=rows)
    made.build(10**9, 0)
    for row in rows.tolist():
        assert torch.equal(made.read(row), scale_down(image(row), SHORT_SIDE, "bicubic"))


def test_changing_a_image_does_not_reach_the_file(tmp_path: Path) -> None:
    made = cache(tmp_path)
    made.build(10**9, 0)
    made.read(2).zero_()
    assert torch.equal(cache(tmp_path).read(2), scale_down(image(2), SHORT_SIDE, "bicubic"))


def test_a_removed_chunk_is_made_again_when_it_is_read(tmp_path: Path) -> None:
    made = cache(tmp_path)
    made.build(10**9, 0)
    for name in files(tmp_path):
        (tmp_path / name).unlink()
    assert torch.equal(made.read(6), scale_down(image(6), SHORT_SIDE, "bicubic"))
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("damage", [b"", b"something else that is long enough for a header", None])
def test_a_broken_chunk_is_made_again(tmp_path: Path, damage: bytes | None) -> None:
    made = cache(tmp_path)
    made.build(10**9, 0)
    for name in files(tmp_path):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    for row in range(IMAGES):
        assert torch.equal(made.read(row), scale_down(image(row), SHORT_SIDE, "bicubic"))


def test_every_changed_byte_of_a_chunk_is_noticed_and_mended(tmp_path: Path) -> None:
    made = cache(tmp_path, rows=np.arange(2, dtype=np.int64), short_side=3)
    made.build(10**9, 0)
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


def test_noise_and_zeros_in_the_place_of_pixels_are_noticed(tmp_path: Path) -> None:
    made = cache(tmp_path)
    made.build(10**9, 0)
    random = np.random.default_rng(0)
    for name in files(tmp_path):
        path = tmp_path / name
        whole = path.read_bytes()
        path.unlink()
        half = len(whole) // 2
        path.write_bytes(whole[:half] + (bytes(len(whole) - half) if name < "8" else random.bytes(len(whole) - half)))
    again = cache(tmp_path)
    with pytest.warns(UserWarning, match="is damaged"):
        read = [again.read(row) for row in range(IMAGES)]
    assert all(torch.equal(read[row], scale_down(image(row), SHORT_SIDE, "bicubic")) for row in range(IMAGES))


def killed_while_building(folder: Path, die_at: int) -> None:
    def read(row: int) -> torch.Tensor:
        if row == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return image(row)

    killed = cache(folder, read)
    # Estimating the size reads images too, and is not what is to be killed.
    killed.estimated_bytes = lambda: 0  # type: ignore[method-assign]
    killed.build(10**9, 0)


@pytest.mark.parametrize("die_at", [0, 3, 4, 6, 10])
def test_a_kill_leaves_whole_chunks_or_none(tmp_path: Path, die_at: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed_while_building, args=(tmp_path, die_at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(files(tmp_path)) == die_at // 4
    assert list(tmp_path.glob(".*.pixels.*")), "the chunk that was being written"
    after = cache(tmp_path)
    after.build(10**9, 0)
    assert not list(tmp_path.glob(".*.pixels.*"))
    for row in range(IMAGES):
        assert torch.equal(after.read(row), scale_down(image(row), SHORT_SIDE, "bicubic"))


def build_and_count(folder: Path, counter: Path) -> None:
    def slow(row: int) -> torch.Tensor:
        with counter.open("ab") as file:
            file.write(b"x")
        time.sleep(0.01)
        return image(row)

    made = cache(folder, slow)
    made.estimated_bytes = lambda: 0  # type: ignore[method-assign]
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
        made = cache(tmp_path, short_side=side)
        made.build(10**9, 0)
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
    made.estimated_bytes = lambda: 0  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"^bottle.jpg: no such file$"):
        made.build(10**9, workers)


def test_the_estimate_is_near(tmp_path: Path) -> None:
    made = cache(tmp_path)
    estimate = made.estimated_bytes()
    made.build(10**9, 0)
    written = sum((tmp_path / name).stat().st_size for name in files(tmp_path))
    assert estimate == pytest.approx(written, rel=0.1)
    assert made.estimated_bytes() == 0
