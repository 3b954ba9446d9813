from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.streaming import index as tar_scan
from datamodules.streaming.index import (
    OTHERS_KEY,
    StreamColumns,
    index_parquet,
    index_tars,
    read_streams,
    scanned,
    stamp_of,
)
from datamodules.streaming.shards import Shards
from datamodules.table import SampleTable
from tests.datamodules.streaming.shard_sets import encoded, served, streamed, write_tar
from tests.support.data import TAGS, labelled_rows
from vitrail.errors import UserError
from vitrail.files import cache_directory
from vitrail.types import UNKNOWN


def parquet(path: Path, columns: Mapping[str, Any], features: Mapping[str, Any] | None = None) -> str:
    """A shard with an image in each row, foreign to us but for the library's features where they are given."""
    count = len(next(iter(columns.values())))
    table = pa.table({"image": [encoded(row) for row in range(count)], **columns})
    if features:
        known = datasets.Features({"image": datasets.Value("binary"), **features})
        table = table.cast(known.arrow_schema)
    pq.write_table(table, path)
    return str(path)


def read(
    urls: Mapping[str, Sequence[str]],
    columns: StreamColumns | None = None,
    vocabulary: Mapping[str, Sequence[str]] | None = None,
) -> tuple[SampleTable, Shards]:
    kind = "parquet" if next(iter(urls.values()))[0].endswith("parquet") else "webdataset"
    return read_streams(urls, kind, columns or {}, vocabulary or {}, "set")


def test_rows_stand_shard_by_shard_with_their_splits(tmp_path: Path) -> None:
    train = [parquet(tmp_path / f"{n}.parquet", {"label": ["hat", "cup"]}) for n in range(2)]
    val = parquet(tmp_path / "val.parquet", {"label": ["cup", "boot", None]})
    table, shards = read({"train": train, "val": [val]})
    assert shards.urls == [*train, val]
    assert shards.ends.tolist() == [2, 4, 7]
    assert [table.split(row) for row in range(7)] == ["train"] * 4 + ["val"] * 3
    assert table.tasks == {"class": ["cup", "hat"]}
    assert table.targets["class"].tolist() == [1, 0, 1, 0, 0, UNKNOWN, UNKNOWN]
    assert table.unseen == {"class": {"boot": 1}}
    assert table.name(3) == "1.parquet/1"
    assert shards.encoded(5) == encoded(1)


@pytest.mark.parametrize("given", [None, ["boot", "cup", "hat"]])
def test_numbers_are_the_features_names_or_those_given(given: list[str] | None, tmp_path: Path) -> None:
    features = {"label": datasets.ClassLabel(names=["hat", "cup"])}
    url = parquet(tmp_path / "a.parquet", {"label": [0, 1, -1]}, None if given else features)
    table, _ = read({"train": [url]}, vocabulary={"class": given} if given else {})
    assert table.tasks["class"] == (given or ["hat", "cup"])
    assert table.targets["class"].tolist() == [0, 1, UNKNOWN]


def test_shards_that_number_classes_differently_mean_the_same(tmp_path: Path) -> None:
    urls = [
        parquet(tmp_path / f"{n}.parquet", {"label": [0, 1]}, {"label": datasets.ClassLabel(names=names)})
        for n, names in enumerate((["cup", "hat"], ["hat", "cup"]))
    ]
    table, _ = read({"train": urls})
    assert table.targets["class"].tolist() == [0, 1, 1, 0]


def test_columns_are_what_the_user_says(tmp_path: Path) -> None:
    columns = {
        "kind": ["cup", "hat"],
        "text": [["a  cup", "one\ncup"], ["a hat"]],
        "product": ["p1", "p2"],
        "id": ["x", "y"],
        "colour": ["red", None],
    }
    chosen: StreamColumns = {
        "label": "kind",
        "caption": "text",
        "group": "product",
        "key": "id",
        "attributes": ["colour"],
    }
    table, _ = read({"train": [parquet(tmp_path / "a.parquet", columns)]}, chosen)
    assert table.tasks == {"class": ["cup", "hat"], "colour": ["red"]}
    assert table.caption_lists.of([0, 1]) == [["a cup", "one cup"], ["a hat"]]
    assert [table.group(0), table.name(1)] == ["p1", "y"]
    assert table.targets["colour"].tolist() == [0, UNKNOWN]

    captions_alone, _ = read({"train": [parquet(tmp_path / "a.parquet", columns)]}, {"label": "", "caption": "text"})
    assert captions_alone.tasks == {}


def test_members_of_tar_files(tmp_path: Path) -> None:
    described = {"colour": "red", "material": {"main": "wool"}, "texts": ["one", "two"], "id": 7}
    samples: list[tuple[str, dict[str, Any]]] = [
        ("a", {"png": encoded(0), "json": described}),
        # The usual members are looked for in all samples, not only in the first.
        ("b", {"png": encoded(1), "cls": "1", "txt": "a hat\n", "json": {"colour": "blue"}}),
        ("c", {"png": encoded(2), "cls": "0", "json": "no JSON"}),
    ]
    url = str(write_tar(tmp_path / "a.tar", samples))
    table, shards = read({"train": [url]}, {"attributes": ["json.colour"]}, {"class": ["cup", "hat"]})
    assert table.tasks == {"class": ["cup", "hat"], "colour": ["blue", "red"]}
    assert table.targets["class"].tolist() == [UNKNOWN, 1, 0]
    assert table.targets["colour"].tolist() == [1, 0, UNKNOWN]
    assert [table.caption(row) for row in range(3)] == ["", "a hat", ""]
    assert [table.name(row) for row in range(3)] == ["a", "b", "c"]
    assert shards.column == ""
    assert shards.encoded(2) == encoded(2)
    columns: StreamColumns = {"label": "json.colour", "caption": "json.texts", "group": "json.id"}
    table, _ = read({"train": [url]}, columns)
    assert table.tasks == {"class": ["blue", "red"]}
    assert table.caption_lists.of([0]) == [["one", "two"]]
    assert table.group(0) == "7"


def test_keys_that_come_back_in_other_shards_get_the_shards_name(tmp_path: Path) -> None:
    urls = [
        str(write_tar(tmp_path / f"{n}.tar", [(key, {"png": encoded(n), "cls": "0"}) for key in ("a", "b")]))
        for n in range(2)
    ]
    table, _ = read({"train": urls})
    assert table.names.to_pylist() == ["0.tar/a", "0.tar/b", "1.tar/a", "1.tar/b"]


def test_the_fingerprint_is_the_same_wherever_the_set_lies(tmp_path: Path) -> None:
    found = set()
    for folder in ("one", "two/deep"):
        (tmp_path / folder).mkdir(parents=True)
        urls = [parquet(tmp_path / folder / f"{n}.parquet", {"label": ["cup", "hat"]}) for n in range(2)]
        found.add(read({"train": urls})[0].fingerprint())
    assert len(found) == 1
    parquet(tmp_path / "one" / "1.parquet", {"label": ["hat", "hat"]})
    changed = read({"train": [str(tmp_path / "one" / f"{n}.parquet") for n in range(2)]})[0]
    assert changed.fingerprint() not in found


@pytest.mark.parametrize(
    ("content", "columns", "vocabulary", "message"),
    [
        ({"kind": ["a"]}, {}, {}, r"columns\.label: .*a\.parquet has no column 'label'; it has kind: .*'' for none"),
        ({"label": ["a"]}, {"group": "product"}, {}, r"columns\.group: .* has no column 'product'; it has label"),
        ({"label": [0.5]}, {}, {}, "holds double, which is not a class"),
        ({"label": [0, 4]}, {}, {"class": ["x", "y"]}, r"a\.parquet: row 1 has the label 4, but there are 2"),
        ({"label": ["x", "z"]}, {}, {"class": ["x", "y"]}, r"vocabulary\.class: .* has 'z' \(first in row 1\)"),
        ({"colour": ["x"]}, {"label": "", "attributes": ["colour"]}, {}, "need a main task as well"),
        ({"label": ["x"]}, {}, {"colour": ["x"]}, "vocabulary: 'colour' is not a task; tasks are class"),
        ({"label": ["x"], "class": ["k"]}, {"attributes": ["class"]}, {}, "the name 'class' is taken by another task"),
        ({"label": ["x", "x", "x"], "id": ["k", "l", "k"]}, {"key": "id"}, {}, r"1 repeated keys, first 'k' in row 2"),
        ({"label": ["x", "x"], "id": ["k", None]}, {"key": "id"}, {}, "empty name"),
    ],
)
def test_mistakes_are_refused(content: Any, columns: Any, vocabulary: Any, message: str, tmp_path: Path) -> None:
    url = parquet(tmp_path / "a.parquet", content)
    with pytest.raises(UserError, match=message):
        read({"train": [url]}, columns, vocabulary)


def test_members_that_no_sample_has_are_refused(tmp_path: Path) -> None:
    url = str(write_tar(tmp_path / "a.tar", [("a", {"png": encoded(0), "cls": "0"})]))
    with pytest.raises(UserError, match=r"columns\.caption: .*a\.tar has no column 'json\.text'; it has cls, key"):
        read({"train": [url]}, {"caption": "json.text"})
    twice = [("a", {"png": encoded(0)}), ("b", {"png": encoded(0)}), ("a", {"png": encoded(0)})]
    with pytest.raises(UserError, match=r"twice\.tar has 1 repeated keys, first 'a' in row 2"):
        read({"train": [str(write_tar(tmp_path / "twice.tar", twice))]})


def test_of_parquet_only_the_wanted_columns_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"image": [b"x"] * 3, "label": [0, 1, 0], "mask": [b"y"] * 3, "embedding": [[0.5]] * 3})
    urls = [str(tmp_path / f"{number}.parquet") for number in range(3)]
    for url in urls:
        pq.write_table(table, url)
    read: list[str] = []
    original = pq.ParquetFile.read

    def counting(self: pq.ParquetFile, columns: list[str]) -> pa.Table:
        read.extend(columns)
        return original(self, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read", counting)
    indices = index_parquet(urls, "image", lambda layout: {"label", "image", "absent"})
    assert read == ["label"] * 3
    assert [index.columns.column_names for index in indices] == [["label"]] * 3
    assert list(indices[0].features) == ["label", "mask", "embedding"], "for messages all are known"
    (nothing,) = index_parquet(urls[:1], "image", lambda layout: set())
    assert nothing.columns.num_rows == 3


def test_broken_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"x"], "label": [0]}), path)
    with pytest.raises(UserError, match=r"columns\.image: .*a\.parquet has no column 'photo'; it has image, label"):
        index_parquet([str(path)], "photo", lambda layout: set())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"^[^\n]*a\.parquet cannot be read [^\n]*; get an intact copy[^\n]*$"):
        index_parquet([str(path)], "image", lambda layout: set())
    with pytest.raises(UserError, match=r"there is no .*gone\.parquet"):
        index_parquet([str(tmp_path / "gone.parquet")], "image", lambda layout: set())


@pytest.fixture
def tars(packed: Path) -> Path:
    return packed / "webdataset"


def test_the_index_file_has_what_a_scan_finds(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [str(path) for path in sorted(tars.glob("*.tar"), reverse=True)]  # in another order than it was written
    scans = [tar_scan.scanned(url, "") for url in urls]
    monkeypatch.delattr(tar_scan, "_scan")
    for index, scan in zip(index_tars(urls, ""), scans, strict=True):
        assert index.columns["key"].to_pylist() == scan["json.key"].to_pylist()
        assert index.places is not None
        for name in ("offset", "size"):
            assert index.places[name].to_pylist() == scan[f"/{name}"].to_pylist()
        assert index.layout["key"] == "key"
        assert index.columns.column_names == ["key", "label", "colour", "material", "caption", "group"]


def test_a_shard_of_another_length_than_in_the_index_is_refused(tars: Path, tmp_path: Path) -> None:
    shard = only_shard(tars, tmp_path)
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(
        UserError, match=r"val-00000-of-00002\.tar has \d+ bytes, index\.parquet next to it records \d+"
    ):
        index_tars([str(shard)], "")
    (tmp_path / "index.parquet").write_bytes(b"no index")
    with pytest.raises(UserError, match=r"index\.parquet cannot be read"):
        index_tars([str(shard)], "")


def test_other_shards_and_other_indices_in_the_folder_do_no_harm(tars: Path, tmp_path: Path) -> None:
    foreign = write_tar(tmp_path / "other.tar", [("k", {"png": encoded(1), "cls": "4"})])
    for content in ((tars / "index.parquet").read_bytes(), None):
        if content is None:
            pq.write_table(pa.table({"shard": ["other.tar"]}), tmp_path / "index.parquet")
        else:
            (tmp_path / "index.parquet").write_bytes(content)
        (index,) = index_tars([str(foreign)], "")
        assert index.columns["key"].to_pylist() == ["k"]
        assert index.layout == {}


def test_a_server_that_fails_is_reported(tars: Path) -> None:
    with served(tars) as (address, _):
        pass
    message = r"^[^\n]*cannot be read \(Cannot connect [^\n]*correct the address[^\n]*$"
    with pytest.raises(UserError, match=message):
        index_tars([f"{address}/a.tar"], "")
    with pytest.raises(UserError, match=message):
        index_parquet([f"{address}/a.parquet"], "image", lambda layout: set())
    with served(tars) as (address, _), pytest.raises(UserError, match=r"(404|there is no).*"):
        index_tars([f"{address}/absent.tar"], "")


def only_shard(tars: Path, folder: Path) -> Path:
    """A copy of one tars tar file and the index."""
    shard = folder / "val-00000-of-00002.tar"
    for name in (shard.name, "index.parquet"):
        (folder / name).write_bytes((tars / name).read_bytes())
    return shard


def test_a_flipped_byte_of_a_packed_image_is_refused_by_name(tars: Path, tmp_path: Path) -> None:
    shard = only_shard(tars, tmp_path)
    table, shards = read({"train": [str(shard)]})
    rows = np.arange(len(table))
    assert len(list(shards.read(rows))) == len(table)
    content = bytearray(shard.read_bytes())
    place = shards.images.to_pylist()[1]
    content[place["offset"] + place["size"] // 2] ^= 1
    shard.write_bytes(content)
    assert shards.encoded(0)
    with pytest.raises(UserError, match=rf"{shard.name}: {place['key']} is damaged"):
        list(shards.read(rows))


def test_an_index_without_checksums_is_read_as_before(tars: Path, tmp_path: Path) -> None:
    shard = only_shard(tars, tmp_path)
    table = pq.read_table(tars / "index.parquet").drop_columns(["crc32"])
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"vitrail.check"}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "index.parquet")
    [index] = index_tars([str(shard)], "")
    assert index.places is not None
    assert set(index.places["crc32"].to_pylist()) == {None}


def test_a_damaged_index_is_refused_by_name(tars: Path, tmp_path: Path) -> None:
    shard = only_shard(tars, tmp_path)
    content = bytearray((tars / "index.parquet").read_bytes())
    content[len(content) // 3] ^= 1
    (tmp_path / "index.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"index\.parquet cannot be read \(index\.parquet: is damaged"):
        index_tars([str(shard)], "")


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
    names = {"key", "/offset", "/size", "txt", "json.colour"}
    assert set(table.column_names) == names, "what is no text is left where it is"
    assert table.select(["txt", "json.colour"]).to_pylist()[:2] == [
        {"txt": "grün", "json.colour": "red"},
        {"txt": None, "json.colour": None},
    ]
    with tarfile.open(path) as archive:
        assert archive.fileobj is not None
        for row, content in enumerate((b"one", b"second", b"3")):
            archive.fileobj.seek(table["/offset"][row].as_py())
            assert archive.fileobj.read(table["/size"][row].as_py()) == content
    others = json.loads(table.schema.metadata[OTHERS_KEY])
    assert others == {"txt": 1, "json": 1, "seg.png": 1, "npy": 1}, "all members but the images"
    assert scanned(str(write_tar(tmp_path / "b.tar", samples[1:2])), "seg.png")["/size"].to_pylist() == [12]


def test_folders_hidden_files_and_links_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("x.jpg", tarfile.DIRTYPE), ("._k0.png", tarfile.REGTYPE), ("l.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info)
        for suffix, content in (("cls", b"1"), ("png", encoded(0))):
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


def test_a_damaged_cached_index_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_server_that_reports_sizes_only_is_asked_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.warns(UserWarning, match=r"cannot keep the index of .*a\.tar.*set \$VITRAIL_CACHE"):
        assert scanned(str(simple(tmp_path / "a.tar")), "").num_rows == 3


def test_a_shard_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = simple(tmp_path / "a.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    assert scanned(str(tmp_path / "a.tar"), "").num_rows == 3
    for size in (*range(300, end, 700), *range(512, end, 512)):
        path = tmp_path / f"{size}.tar"
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"^[^\n]*{size}\.tar is truncated[^\n]*$"):
            scanned(str(path), "")
    zipped = write_tar(tmp_path / "a.tgz", [("k", {"png": encoded(0)})], "w:gz").read_bytes()
    for name, content in (("b.tgz", zipped[:-20]), ("b.tar", b"something else" * 100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="is truncated or no tar file"):
            scanned(str(tmp_path / name), "")


@pytest.mark.parametrize(
    ("samples", "suffix", "message"),
    [
        ([], "", "has no samples"),
        ([("k", {"cls": "1"})], "", "sample 'k' has no image .* but cls; .*columns: {image: …}"),
        ([("k", {"png": b"1", "cls": "1"})], "jpg", r"sample 'k' has no image \(jpg\) but cls, png"),
        ([("k", {"png": b"1"}), ("k", {"png": b"1"})], "", r"sample 'k' has two files \.png"),
    ],
)
def test_what_is_no_web_dataset_is_refused(samples: Any, suffix: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        scanned(str(write_tar(tmp_path / "a.tar", samples)), suffix)


def test_labels_and_numbers_of_any_shards(tmp_path: Path) -> None:
    rows = labelled_rows(15)
    for number in range(2):
        samples = [
            (
                f"{place:03}",
                {"png": encoded(place), "json": {key: row[key] for key in ("tags", "price", "grade")}},
            )
            for place, row in enumerate(rows)
            if place % 2 == number
        ]
        write_tar(tmp_path / f"train-{number}.tar", samples)
    columns: dict[str, Any] = {
        "label": "json.tags",
        "attributes": ["json.price", "json.grade"],
        "kinds": {"json.tags": "multi_label", "json.price": "regression", "json.grade": "ordinal"},
    }
    order = {"grade": ["poor", "fair", "good"]}
    table = streamed(str(tmp_path), columns=columns, vocabulary=order).table
    assert table.tasks == {"class": ["blue", "green", "red"], "price": [], "grade": ["poor", "fair", "good"]}
    for row in range(len(table)):
        theirs = rows[int(Path(table.name(row)).name)]
        tags = [name for name, entry in zip(TAGS, table.targets["class"][row], strict=True) if entry == 1]
        assert tags == sorted(theirs["tags"])
        price, grade = table.targets["price"][row], table.targets["grade"][row]
        assert price == pytest.approx(theirs["price"]) if theirs["price"] is not None else np.isnan(price)
        assert grade == (UNKNOWN if theirs["grade"] is None else order["grade"].index(theirs["grade"]))
    for changes, message in (
        ({"kinds": {**columns["kinds"], "json.tags": "tags"}}, "must be one of single_label, multi_label"),
        ({"kinds": {**columns["kinds"], "json.size": "regression"}}, "'json.size' is no column of labels"),
        ({"kinds": {**columns["kinds"], "json.grade": "multi_label"}}, "columns.label_sep: .*'json.grade' holds texts"),
        ({"kinds": {**columns["kinds"], "json.grade": "regression"}}, "json.grade '.*' must be a number"),
    ):
        with pytest.raises(UserError, match=message):
            _ = streamed(str(tmp_path), columns={**columns, **changes}).table
    with pytest.raises(UserError, match=r"data vocabulary: .*'json.grade' is ordinal, and its classes are no whole"):
        _ = streamed(str(tmp_path), columns=columns).table


def test_lists_of_parquet_need_a_kind(tmp_path: Path) -> None:
    columns = {"image": [encoded(row) for row in range(6)], "label": [row["tags"] for row in labelled_rows(6)]}
    pq.write_table(pa.table(columns), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match=r"which is not a class; .* or its kind"):
        _ = streamed(str(tmp_path)).table
    table = streamed(str(tmp_path), columns={"kinds": {"label": "multi_label"}}).table
    assert table.targets["class"].sum(axis=1).tolist() == [len(row["tags"]) for row in labelled_rows(6)]
