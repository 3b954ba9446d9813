from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from datamodules.files.label_csv import read_label_file
from tests.support.runs import recorded_files
from vitrail.errors import UserError
from vitrail.files import (
    DamagedFileError,
    check_zip,
    fetch,
    flush,
    read_csv,
    read_parquet,
    remote_names,
    upload,
    write_atomically,
    write_csv,
    write_parquet,
    write_remotely,
    write_text_atomically,
)


def test_content_is_flushed_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = recorded_files(monkeypatch)
    with write_atomically(tmp_path / "new" / "deep" / "file.txt") as partial:
        partial.write_text("content")
    assert events == [
        # The folders that were made, the uppermost one's entry last: without it nothing below would be found.
        ("flush", tmp_path / "new"),
        ("flush", tmp_path),
        ("flush", partial),
        ("rename", tmp_path / "new" / "deep" / "file.txt"),
        ("flush", tmp_path / "new" / "deep"),
    ]
    assert (tmp_path / "new" / "deep" / "file.txt").read_text() == "content"


def test_where_flushing_fails_the_old_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), write_atomically(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_a_text_that_is_cut_short_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    write_text_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "half a table \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on file systems that know no such thing."""

    def refused(number: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refused)
    flush(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Invalid argument"):
        flush(tmp_path / "file")


TABLE = pa.table(
    {
        "number": np.arange(40),
        "text": [f"name {row % 7}" for row in range(40)],
        "list": pa.array([[1.5, 2.5]] * 40, pa.list_(pa.float32())),
    }
).replace_schema_metadata({b"classes": b'["mug", "cap"]'})


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_parquet(TABLE, tmp_path / "a.parquet")
    found = read_parquet(tmp_path / "a.parquet")
    assert found.equals(TABLE)
    assert found.schema.metadata == TABLE.schema.metadata
    assert read_parquet(tmp_path / "a.parquet", ["text"]).column_names == ["text"]
    with (tmp_path / "a.parquet").open("rb") as file:
        assert read_parquet(file).equals(TABLE)
    with pytest.raises(FileNotFoundError):
        read_parquet(tmp_path / "b.parquet")


def test_every_changed_byte_of_a_table_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(TABLE, path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = io.BytesIO(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        if whole.rindex(b"crc32 of this") <= place < whole.rindex(b"crc32 of this") + 36:
            assert read_parquet(changed).equals(TABLE)  # without that mark nothing is compared, and nothing is wrong
            continue
        with pytest.raises(DamagedFileError, match=r"^a\.parquet: "):
            read_parquet(changed, name="a.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"nothing of the kind", bytes(1000)])
def test_what_is_no_table_is_called_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"a\.parquet"):
        read_parquet(tmp_path / "a.parquet")


def test_a_checkpoint_with_a_changed_byte_of_content_is_refused(tmp_path: Path) -> None:
    """PyTorch itself reads it without a word."""
    path = tmp_path / "best.ckpt"
    weights = {"state_dict": {"weight": torch.arange(1000.0)}}
    torch.save(weights, path)
    check_zip(path, "train again")
    whole = path.read_bytes()
    place = whole.index(torch.arange(500.0, 502.0).numpy().tobytes())
    path.write_bytes(whole[:place] + b"\0\0\0\0" + whole[place + 4 :])
    assert not torch.equal(torch.load(path, weights_only=True)["state_dict"]["weight"], torch.arange(1000.0))
    with pytest.raises(DamagedFileError, match=r"best\.ckpt: is damaged, the checksum of .*; train again"):
        check_zip(path, "train again")


@pytest.mark.parametrize("damage", ["cut", "zeros", "noise"])
def test_a_broken_checkpoint_is_refused_or_left_to_its_reader(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "best.ckpt"
    torch.save({"weight": torch.arange(1000.0)}, path)
    whole = path.read_bytes()
    half = len(whole) // 2
    rest = {"cut": b"", "zeros": bytes(len(whole) - half), "noise": np.random.default_rng(0).bytes(len(whole) - half)}
    path.write_bytes(whole[:half] + rest[damage])
    with pytest.raises((DamagedFileError, RuntimeError, OSError, ValueError, KeyError)):
        _check_and_load(path)


def _check_and_load(path: Path) -> None:
    check_zip(path, "train again")
    torch.load(path, weights_only=True)


@pytest.mark.parametrize("number", [28, 30])
@pytest.mark.parametrize("named", [False, True])
def test_an_error_names_the_file_that_was_to_be_written(tmp_path: Path, number: int, named: bool) -> None:
    path = tmp_path / "file.txt"

    def write(partial: Path) -> None:
        raise OSError(number, os.strerror(number), *([str(partial)] if named else []))

    with pytest.raises(OSError, match="file") as raised, write_atomically(path) as partial:
        write(partial)
    assert raised.value.filename == str(path)


FORMULAS = [
    *("=1+1", "+cmd|' /C calc'!A0", "-2+3+cmd|' /C calc'!A0", "@SUM(A1)", "\tx", "\rx", '=HYPERLINK("http://x")'),
    *("-bag", "'=1", "''-x", "'-5", "+a", "-"),
]
PLAIN = ["mug", "a=b", "'quoted'", "5", "-5", "+0.012 [-0.030, +0.055]", "-1e-05", "-.5", "0.5 ± 0.1", "ä", " =1"]


def test_no_cell_header_or_row_name_is_a_formula(tmp_path: Path) -> None:
    frame = pd.DataFrame({"=name": FORMULAS}, index=pd.Index(FORMULAS, name="@index"))
    write_csv(tmp_path / "a.csv", frame, index=True)
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert len(cells) == 2 * len(FORMULAS) + 2
    assert all(cell.startswith("'") for cell in cells)


def test_numbers_and_other_texts_are_as_they_are(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": PLAIN, "number": np.linspace(-1, 1, len(PLAIN)), "count": range(-3, len(PLAIN) - 3)})
    write_csv(tmp_path / "a.csv", frame)
    assert "'-" not in (tmp_path / "a.csv").read_text(encoding="utf-8")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "a.csv"), frame)


@pytest.mark.parametrize("text", [*FORMULAS, *PLAIN])
def test_what_is_read_back_is_what_was_written(tmp_path: Path, text: str) -> None:
    frame = pd.DataFrame({"=a": [text, "between", text], "b": [1.5, -2.5, np.nan]})
    write_csv(tmp_path / "a.csv", frame)
    pd.testing.assert_frame_equal(read_csv(tmp_path / "a.csv"), frame)
    labels = read_label_file(tmp_path / "a.csv", ["=a"])
    assert labels.columns["=a"] == [text, "between", text], "also as the labels of a data set"


@pytest.mark.parametrize("name", ["None", "NA", "nan", "null"])
def test_a_name_that_pandas_takes_for_a_missing_value_is_a_text(tmp_path: Path, name: str) -> None:
    frame = pd.DataFrame({"class": [name, "cup", None], "b": [1.5, -2.5, np.nan]})
    write_csv(tmp_path / "a.csv", frame)
    pd.testing.assert_frame_equal(read_csv(tmp_path / "a.csv"), frame)


def test_an_empty_table(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [], "=b": []})
    write_csv(tmp_path / "a.csv", frame)
    assert list(read_csv(tmp_path / "a.csv").columns) == ["a", "=b"]


def test_a_file_of_an_object_store_is_fetched_once_and_again_when_it_changes(tmp_path: Path, bucket: str) -> None:
    url = f"{bucket}/folder/a.bin"
    for content in (b"first", b"other"):
        (tmp_path / "a.bin").write_bytes(content)
        upload(tmp_path / "a.bin", url)
        fetched = fetch(url, tmp_path / "cache")
        assert fetched.read_bytes() == content
        stamp = fetched.stat().st_mtime_ns
        assert fetch(url, tmp_path / "cache").stat().st_mtime_ns == stamp
    assert remote_names(f"{bucket}/folder") == ["a.bin"]
    assert remote_names(f"{bucket}/none") == []
    with pytest.raises(UserError, match=r"s3://.*/b\.bin: cannot be read \(.*\); check address, credentials") as caught:
        fetch(f"{bucket}/b.bin", tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_nothing_is_uploaded_of_a_file_that_was_not_finished(bucket: str) -> None:
    with pytest.raises(FileNotFoundError), write_remotely(f"{bucket}/a.bin") as path:
        path.with_name("missing").read_bytes()
    assert remote_names(bucket) == []
