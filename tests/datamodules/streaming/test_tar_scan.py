from __future__ import annotations

import io
import json
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest

from datamodules.checks.verify import cache_directory
from datamodules.streaming import index as tar_scan
from datamodules.streaming.index import OTHERS_KEY, scanned, stamp_of
from tests.datamodules.shard_sets import encoded, served, write_tar
from vitrail.errors import UserError

IMAGE = encoded(0)


def simple(path: Path, count: int = 3) -> Path:
    return write_tar(path, [(f"k{n}", {"cls": str(n), "png": encoded(n)}) for n in range(count)])


class Scans:
    """Counts how often a shard is read through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = tar_scan._scan

        def counting(*arguments: Any) -> Any:
            self.count += 1
            return original(*arguments)

        monkeypatch.setattr(tar_scan, "_scan", counting)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_images_and_texts_are_found(mode: str, tmp_path: Path) -> None:
    samples: list[tuple[str, dict[str, Any]]] = [
        ("deep/a", {"txt": "grün", "jpg": b"one", "json": {"colour": "red"}}),
        ("b", {"PNG": b"second", "seg.png": b"not this one", "npy": b"\xff\x00"}),
        ("c", {"webp": b"3"}),
    ]
    path = write_tar(tmp_path / ("a.tar.gz" if mode == "w:gz" else "a.tar"), samples, mode)
    table = scanned(str(path), "")
    assert table["key"].to_pylist() == ["deep/a", "b", "c"]
    assert json.loads(table["fields"][0].as_py()) == {"txt": "grün", "json": '{"colour": "red"}'}
    assert json.loads(table["fields"][1].as_py()) == {}, "what is no text is left where it is"
    with tarfile.open(path) as archive:
        assert archive.fileobj is not None
        for row, content in enumerate((b"one", b"second", b"3")):
            archive.fileobj.seek(table["offset"][row].as_py())
            assert archive.fileobj.read(table["size"][row].as_py()) == content
    others = json.loads(table.schema.metadata[OTHERS_KEY])
    assert others == {"txt": 1, "json": 1, "seg.png": 1, "npy": 1}, "all members but the images"
    assert scanned(str(write_tar(tmp_path / "b.tar", samples[1:2])), "seg.png")["size"].to_pylist() == [12]


def test_folders_hidden_files_and_links_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("x.jpg", tarfile.DIRTYPE), ("._k0.png", tarfile.REGTYPE), ("l.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info)
        for suffix, content in (("cls", b"1"), ("png", IMAGE)):
            info = tarfile.TarInfo(f"./k0.{suffix}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert scanned(str(path), "")["key"].to_pylist() == ["k0"]


def test_a_shard_is_read_through_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = Scans(monkeypatch)
    path = simple(tmp_path / "a.tar")
    first = scanned(str(path), "")
    assert scanned(str(path), "").equals(first)
    assert scans.count == 1
    scanned(str(path), "png")
    assert scans.count == 2, "of other members"
    simple(path, 4)
    assert scanned(str(path), "").num_rows == 4
    assert scans.count == 3


def test_a_damaged_note_of_what_is_in_a_shard_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = Scans(monkeypatch)
    path = simple(tmp_path / "a.tar")
    first = scanned(str(path), "")
    [note] = (cache_directory() / "shards").glob("*.parquet")
    whole = note.read_bytes()
    for number, content in enumerate([whole[:-50], bytes(len(whole)), whole.replace(b"k1", b"k2")], start=2):
        assert content != whole
        note.write_bytes(content)
        with pytest.warns(UserWarning, match=r"parquet: .*; .*a\.tar is read through again"):
            found = scanned(str(path), "")
        assert found.equals(first)
        assert scans.count == number
        assert note.read_bytes() == whole


def test_of_many_that_begin_together_one_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = Scans(monkeypatch)
    path = str(simple(tmp_path / "a.tar"))
    threads = [threading.Thread(target=scanned, args=(path, "")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scans.count == 1


def test_a_server_that_tells_sizes_only_is_asked_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = Scans(monkeypatch)
    path = simple(tmp_path / "a.tar")
    with served(tmp_path) as (address, _):
        for _ in range(2):
            assert scanned(f"{address}/a.tar", "").equals(scanned(str(path), ""))
        assert stamp_of(f"{address}/a.tar") == ""
    assert scans.count == 3, "the size of a tar file is a round number, so it may stay when the content changes"


def test_without_a_cache_it_works_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"cannot keep what is in .*a\.tar.*set \$VITRAIL_CACHE"):
        assert scanned(str(simple(tmp_path / "a.tar")), "").num_rows == 3


def test_wherever_a_shard_is_cut_off_it_is_told(tmp_path: Path) -> None:
    whole = simple(tmp_path / "a.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    assert scanned(str(tmp_path / "a.tar"), "").num_rows == 3
    for size in (*range(300, end, 700), *range(512, end, 512)):
        path = tmp_path / f"{size}.tar"
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"{size}\.tar is truncated") as caught:
            scanned(str(path), "")
        assert "\n" not in str(caught.value)


def test_a_zipped_shard_that_is_cut_off_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tgz", [("k", {"png": IMAGE})], "w:gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.tgz is truncated"):
        scanned(str(path), "")


@pytest.mark.parametrize(
    ("samples", "suffix", "message"),
    [
        ([], "", "has no samples"),
        ([("k", {"cls": "1"})], "", "sample 'k' has no image .* but cls; .*columns: {image: …}"),
        ([("k", {"png": b"1", "cls": "1"})], "jpg", r"sample 'k' has no image \(jpg\) but cls, png"),
        ([("k", {"png": b"1"}), ("k", {"png": b"1"})], "", r"sample 'k' has two files \.png"),
    ],
)
def test_what_is_no_web_dataset_is_told(samples: Any, suffix: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        scanned(str(write_tar(tmp_path / "a.tar", samples)), suffix)
    assert "\n" not in str(caught.value)


def test_what_is_no_tar_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"something else" * 100)
    with pytest.raises(UserError, match="is truncated or no tar file"):
        scanned(str(tmp_path / "a.tar"), "")
