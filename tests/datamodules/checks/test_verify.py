from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.checks import verify
from datamodules.checks.audit import find_leaks
from datamodules.checks.verify import HASH_BOXES, Verification, cached, content_of, hash_boxes
from datamodules.image_folder import ImageFolder
from datamodules.options import CheckOptions, ImageOptions, LoaderOptions
from tests.support.data import write_deep_folder, write_image_folder
from vitrail.errors import UserError
from vitrail.files import cache_directory


class Counting(ImageFolder):
    """Notes which images are read."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.read: list[int] = []

    def read_image(self, index: int) -> torch.Tensor:
        self.read.append(index)
        return super().read_image(index)


def decoded(data: ImageFolder, count: int) -> list[str]:
    """Hashes of the images as they are read now."""
    images = [data.read_image(row).permute(1, 2, 0).contiguous().numpy() for row in range(count)]
    return [content_of(pixels).hex() for pixels in images]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    return write_image_folder(tmp_path / "data", objects=3)


def cache_files() -> list[Path]:
    return sorted(cache_directory().iterdir())


def assert_same(one: Verification, other: Verification) -> None:
    assert one.bad == other.bad
    assert one.key == other.key
    np.testing.assert_array_equal(one.content, other.content)
    np.testing.assert_array_equal(one.perceptual, other.perceptual)


def test_the_content_is_the_pixels_and_their_shape_and_not_the_file(root: Path) -> None:
    folder = root / "train" / "bag"
    first = folder / "bag_o0_0.png"
    Image.open(first).save(folder / "again.bmp")
    for width in (10, 20):
        Image.new("RGB", (width, 200 // width), (9, 9, 9)).save(folder / f"{width}.png")
    data = ImageFolder(str(root))
    found = data.verification()
    assert (found.content.shape, str(found.content.dtype)) == ((21, 32), "uint8")
    assert (found.perceptual.shape, str(found.perceptual.dtype)) == ((21, len(HASH_BOXES)), "uint64")
    assert found.readable.all()
    assert len(np.unique(found.content, axis=0)) == 20
    content = dict(zip(data.sample_names(), found.content.tolist(), strict=True))
    assert content["train/bag/again.bmp"] == content["train/bag/bag_o0_0.png"]


def test_bad_images_are_listed_with_their_reason(root: Path) -> None:
    data = ImageFolder(str(root))
    table = data.table
    broken, missing, text = (Path(table.source(index)) for index in (1, 4, 7))
    broken.write_bytes(broken.read_bytes()[:100])
    missing.unlink()
    text.write_text("no image", encoding="utf-8")
    found = data.verification()
    assert sorted(found.bad) == [1, 4, 7]
    assert found.bad[1].startswith(f"{broken}: cannot be decoded")
    assert found.bad[4].startswith(f"{missing}: no such file")
    assert found.bad[7].startswith(f"{text}: not an image")
    assert np.flatnonzero(~found.readable).tolist() == [1, 4, 7]
    assert not found.content[[1, 4, 7]].any()
    again = Counting(str(root))
    again._table = table
    assert_same(again.verification(), found)
    assert again.read == [], "the reasons come from the cache as well"


def test_a_mistake_of_ours_is_no_bad_image(root: Path) -> None:
    class Broken(ImageFolder):
        def read_image(self, index: int) -> torch.Tensor:
            raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        Broken(str(root)).verification()
    assert not cache_directory().exists()


def test_a_second_run_reads_no_image(root: Path) -> None:
    first, second = Counting(str(root)), Counting(str(root))
    found = first.verification()
    assert sorted(first.read) == list(range(18))
    assert_same(second.verification(), found)
    assert second.read == []
    assert len(cache_files()) == 1, "nothing temporary is left"


def test_a_changed_file_is_read_again(root: Path) -> None:
    before = ImageFolder(str(root)).verification()
    path = Path(ImageFolder(str(root)).table.source(3))
    image = Image.open(path).convert("L")
    image.save(path)
    data = Counting(str(root))
    after = data.verification()
    assert len(data.read) == 18
    assert np.flatnonzero((before.content != after.content).any(axis=1)).tolist() == [3]
    os.utime(path, ns=(1, 1))
    touched = Counting(str(root))
    touched.verification()
    assert len(touched.read) == 18


def test_other_labels_are_another_state(root: Path) -> None:
    before = ImageFolder(str(root)).verification().key
    shutil.move(root / "train" / "bag" / "bag_o0_0.png", root / "train" / "cap" / "bag_o0_0.png")
    assert ImageFolder(str(root)).verification().key != before


def test_a_damaged_cache_file_is_written_again(root: Path) -> None:
    found = ImageFolder(str(root)).verification()
    files = cache_files()
    (file,) = (path for path in files if path.name.startswith("verification-"))
    whole = file.read_bytes()
    arrays = dict(np.load(file))
    contents: list[bytes] = [b"", b"rubbish", b"PK\x03\x04 cut off", whole[: len(whole) // 2], whole[:-40] + bytes(40)]
    for changes in ({"content": found.content[:5]}, {"content": np.array([{"a": 1}], object)}, {"range": np.zeros(3)}):
        np.savez(file, **{**arrays, **changes})
        contents.append(file.read_bytes())
    for content in contents:
        file.write_bytes(content)
        data = Counting(str(root))
        assert_same(data.verification(), found)
        assert len(data.read) == 18
        assert cache_files() == files


def test_without_a_place_for_the_cache_it_works_and_warns(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match=r"cannot keep what is known of the images .*; set \$VITRAIL_CACHE"):
        found = ImageFolder(str(root)).verification()
    assert found.bad == {}


def test_a_failed_write_leaves_the_old_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached("numbers", lambda: {"a": np.arange(3)}, lambda arrays: None)
    (file,) = cache_files()
    before = file.read_bytes()

    def full_disk(stream: object, **arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)

    with pytest.warns(UserWarning, match="No space left"):  # the check refuses the old file: it has no "b"
        found = cached("numbers", lambda: {"a": np.arange(4)}, lambda arrays: arrays["b"])  # type: ignore[arg-type]
    assert found["a"].tolist() == [0, 1, 2, 3]
    assert cache_files() == [file]
    assert file.read_bytes() == before


def test_the_cache_lies_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VITRAIL_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "vitrail"


def test_the_first_hash_is_the_difference_hash_of_the_whole() -> None:
    imagehash = pytest.importorskip("imagehash")
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((100, 100))
    values = hash_boxes(image)
    assert len(values) == len(HASH_BOXES)
    assert f"{values[0]:016x}" == str(imagehash.dhash(image.convert("L")))


def test_images_inside_a_larger_file_are_read_again_when_it_changes(tmp_path: Path) -> None:
    from datamodules.hub_images import HubImages
    from tests.support.data import write_hub_dataset

    path = write_hub_dataset(tmp_path / "hub")
    first = HubImages(str(path)).verification().key
    assert HubImages(str(path)).verification().key == first
    file = next(found for found in sorted(Path(path).rglob("*")) if found.is_file())
    os.utime(file, ns=(1, 1))
    assert HubImages(str(path)).verification().key != first


def test_a_set_that_grows_is_not_read_all_over_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_image_folder(tmp_path / "shop", objects=6, splits=())
    first = ImageFolder(str(root)).verification()
    new = root / "bag" / "new.png"
    other = sorted((root / "cap").rglob("*_1.png"))[0]
    new.write_bytes(sorted((root / "bag").rglob("*.png"))[-1].read_bytes())
    other.write_bytes(new.read_bytes())
    os.utime(other, ns=(1, 1))
    read: list[str] = []
    whole = ImageFolder.read_image

    def watched(self: ImageFolder, index: int) -> Any:
        read.append(self.table.name(index))
        return whole(self, index)

    data = ImageFolder(str(root))
    assert data.image_files
    monkeypatch.setattr(ImageFolder, "read_image", watched)
    monkeypatch.setattr(ImageFolder, "image_files", True)
    again = data.verification()
    assert sorted(read) == sorted(str(path.relative_to(root)) for path in (new, other))
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "other cache"))
    fresh = data.verification()
    np.testing.assert_array_equal(again.content, fresh.content)
    np.testing.assert_array_equal(again.perceptual, fresh.perceptual)
    assert len(again.content) == len(first.content) + 1


def test_a_bad_image_is_read_again_when_others_change(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "shop", objects=6, splits=())
    bad = sorted((root / "cap").rglob("*_1.png"))[0]
    bad.write_bytes(b"no image")
    assert len(ImageFolder(str(root)).verification().bad) == 1
    (root / "bag" / "new.png").write_bytes(b"no image either")
    assert len(ImageFolder(str(root)).verification().bad) == 2


def test_a_damaged_cache_of_single_images_is_ignored(root: Path) -> None:
    found = ImageFolder(str(root)).verification()
    for path in cache_files():
        path.write_bytes(b"rubbish")
    assert_same(ImageFolder(str(root)).verification(), found)


def expected_deep(path: str, highest: int) -> torch.Tensor:
    values = np.asarray(Image.open(path)).astype(np.float64)
    return torch.from_numpy(np.round((values / highest * 255).clip(0, 255)).astype(np.uint8))


@pytest.mark.parametrize(("highest", "white"), [(200, 255), (255, 255), (1000, 1023), (4095, 4095), (9000, 16383)])
def test_the_data_set_decides_the_value_range(root: Path, tmp_path: Path, highest: int, white: int) -> None:
    data = ImageFolder(str(write_deep_folder(tmp_path / "deep", highest)), loader=LoaderOptions(cache="always"))
    data.setup("fit")
    assert data.image_options["value_range"] == [0, white]
    record = data.data_record()["value_range"]
    assert record["option"] == "auto"
    assert record["range"] == [0, white]
    assert record["images"] == 12
    assert sum(record["used"].values()) == 12
    assert data.read_image(3)[0].equal(expected_deep(data.table.source(3), white))
    assert len(np.unique(data.verification().content, axis=0)) == 12, "they are not all black"
    # The next run finds it, and so do the other processes.
    again = ImageFolder(str(tmp_path / "deep"))
    again.setup("fit")
    assert again.image_options["value_range"] == [0, white]
    assert again.data_record()["value_range"] == record
    facts = data.image_facts(np.arange(12))
    assert facts.column("content").to_pylist() == decoded(data, 12)


def test_the_range_follows_a_data_set_that_grows(root: Path, tmp_path: Path) -> None:
    write_deep_folder(tmp_path / "deep", 255)
    small = ImageFolder(str(tmp_path / "deep"))
    small.setup("fit")
    assert small.image_options["value_range"] == [0, 255]
    Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(tmp_path / "deep" / "bag" / "new.png")
    grown = ImageFolder(str(tmp_path / "deep"))
    grown.setup("fit")
    assert grown.image_options["value_range"] == [0, 4095]
    facts = grown.image_facts(np.arange(13)).column("content").to_pylist()
    assert facts == decoded(grown, 13), "all were read again with the new range"
    shutil.rmtree(tmp_path / "deep" / "bag")
    (tmp_path / "deep" / "bag").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "deep" / "bag" / "a.png")
    for path in (tmp_path / "deep" / "cup").iterdir():
        path.unlink()
    Image.new("RGB", (9, 8)).save(tmp_path / "deep" / "cup" / "a.png")
    shallow = ImageFolder(str(tmp_path / "deep"))
    shallow.setup("fit")
    assert shallow.image_options["value_range"] == "auto"
    assert shallow.data_record()["value_range"] == {"option": "auto", "range": None}


def test_a_stated_range_holds(root: Path, tmp_path: Path) -> None:
    write_deep_folder(tmp_path / "deep")
    for option in ("dtype", [100, 3000]):
        data = ImageFolder(str(tmp_path / "deep"), image={"value_range": option})
        data.setup("fit")
        assert data.image_options["value_range"] == option
        assert data.data_record()["value_range"] == {"option": option, "range": option}
    assert int(ImageFolder(str(tmp_path / "deep"), image=ImageOptions(value_range="dtype")).read_image(0).max()) == 15


def test_ranges_that_no_usual_one_holds_are_refused_by_name(root: Path, tmp_path: Path) -> None:
    write_deep_folder(tmp_path / "deep")
    Image.fromarray(np.full((8, 8), -5, np.int32)).save(tmp_path / "deep" / "cup" / "odd.tif")
    with pytest.raises(
        UserError, match=r"values from -5 \(cup/odd.tif\) to 4095 \(bag/0.png\).*value_range: \[lo, hi\]"
    ):
        ImageFolder(str(tmp_path / "deep")).setup("fit")
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "deep" / "cup" / "odd.tif")
    with pytest.raises(UserError, match="1 of them floating point"):
        ImageFolder(str(tmp_path / "deep")).setup("fit")


def test_a_checkpoints_range_applies_to_darker_data(root: Path, tmp_path: Path) -> None:
    trained = ImageFolder(str(write_deep_folder(tmp_path / "deep")))
    trained.setup("fit")
    other = ImageFolder(str(write_deep_folder(tmp_path / "other", 250)))
    other.setup("test")
    assert other.image_options["value_range"] == [0, 255]
    state = trained.state_dict()
    assert state["value_range"] == [0, 4095]
    other.load_state_dict(state)
    assert other.image_options["value_range"] == [0, 4095]
    assert int(other.read_image(0).max()) == round(250 / 4095 * 255)
    facts = other.image_facts(np.arange(12)).column("content").to_pylist()
    assert facts == decoded(other, 12)
    assert other.dataset("train")[0]["image"].max() <= 32, "the cache of decoded images, too"


def test_a_raised_limit_of_pixels_reads_what_was_refused_before(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "photos")
    low = ImageFolder(str(tmp_path / "photos"), image=ImageOptions(max_pixels=32 * 32 - 1))

    bad = low.verification().bad

    assert len(bad) == len(low.table)
    assert "raise max_pixels (data image.max_pixels" in next(iter(bad.values()))
    assert not ImageFolder(str(tmp_path / "photos"), image=ImageOptions(max_pixels=32 * 32)).verification().bad
    assert "max_pixels" not in low.image_options, "galleries and checkpoints are of the same model"


@pytest.mark.parametrize("option", ["headers", "never"])
def test_less_than_all_is_read_where_that_is_asked_for(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, option: Any
) -> None:
    data = ImageFolder(str(root), checks=CheckOptions(verify=option, allow_leaks=["exact"]))
    first, cut, broken, missing, last = (Path(data.table.source(row)) for row in (0, 1, 4, 7, 17))
    first.write_bytes(last.read_bytes())
    cut.write_bytes(cut.read_bytes()[:-20])
    broken.write_text("no image", encoding="utf-8")
    missing.unlink()
    read: list[int] = []
    monkeypatch.setattr(ImageFolder, "image_files", True)
    monkeypatch.setattr(ImageFolder, "read_image", lambda self, index: read.append(index))
    found = data.verification()
    assert not read
    assert (found.mode, sorted(found.bad)) == (option, [4, 7] if option == "headers" else [])
    same = (found.content[0] == found.content[17]).all()
    assert same == (option == "headers"), "identical files are found by their bytes"
    assert len(np.unique(found.content, axis=0)) == {"headers": 16, "never": 18}[option]
    leaks = find_leaks(data.table, found, data.read_image)
    assert leaks.near == []
    assert option in leaks.not_checked["near"]
    assert not read
    monkeypatch.undo()


def test_headers_need_files_and_a_run_records_what_was_verified(root: Path, tmp_path: Path) -> None:
    from datamodules.hub_images import HubImages
    from tests.support.data import write_hub_dataset

    hub = HubImages(str(write_hub_dataset(tmp_path / "hub")), checks=CheckOptions(verify="headers"))
    with pytest.raises(
        UserError, match=r"checks.verify: headers, but the images of .* are no files; set full or never"
    ):
        hub.verification()
    hub.check_options = CheckOptions(verify="never", allow_leaks=["groups"])
    hub.setup("fit")
    record = hub.data_record()
    assert (record["verify"], record["identical"]) == ("never", None)
    assert ImageFolder(str(root)).data_record()["verify"] == "full"
    # Galleries compare pixels, so they get their hashes all the same.
    content = hub.image_facts(np.arange(2)).column("content").to_pylist()
    assert content == HubImages(str(tmp_path / "hub")).image_facts(np.arange(2)).column("content").to_pylist()


def test_a_cache_of_unverified_images_knows_their_range(tmp_path: Path, root: Path) -> None:
    deep = write_deep_folder(tmp_path / "deep")
    names = {}
    for option in ("headers", "never"):
        for highest in (4095, 8000):
            image = ImageOptions(value_range=[0, highest])
            data = ImageFolder(str(deep), image=image, checks=CheckOptions(verify=option))
            names[option, highest] = data.verification().content.tobytes()
    assert len(set(names.values())) == 4


def test_quality_facts_are_measured_once_and_only_when_asked_for(root: Path) -> None:
    first = Counting(str(root))
    plain = first.verification()
    assert plain.quality is not None
    assert np.isnan(plain.quality).all()
    audited = Counting(str(root))
    facts = audited.verification(quality=True).quality
    assert facts is not None
    assert np.isfinite(facts).all()
    assert len(audited.read) == 18
    for wants_quality in (True, False):
        again = Counting(str(root))
        np.testing.assert_array_equal(again.verification(quality=wants_quality).quality, facts)
        assert again.read == []


def test_a_long_first_start_is_announced(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(verify, "_SAMPLED", 3)
    monkeypatch.setattr(verify, "_ANNOUNCED", 0.0)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        ImageFolder(str(root)).verification()
    assert re.search(r"18 images are read once, which takes about \d+ s", caplog.text)
    assert [verify._duration(seconds) for seconds in (12.3, 300, 9000)] == ["12 s", "5 min", "2.5 h"]
