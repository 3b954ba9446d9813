from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.streaming import index as tar_scan
from datamodules.streaming.index import index_parquet, index_tars
from datamodules.streaming.pack import pack
from datamodules.streaming.shards import Shards
from tests.datamodules.shard_sets import encoded, served, source, write_tar
from vitrail.errors import UserError


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
    assert list(indices[0].features) == ["image", "label", "mask", "embedding"], "for messages all are known"
    (nothing,) = index_parquet(urls[:1], "image", lambda layout: set())
    assert nothing.columns.num_rows == 3


def test_broken_parquet_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"x"], "label": [0]}), path)
    with pytest.raises(UserError, match=r"columns\.image: .*a\.parquet has no column 'photo'; it has image, label"):
        index_parquet([str(path)], "photo", lambda layout: set())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.parquet cannot be read .*; get it anew") as caught:
        index_parquet([str(path)], "image", lambda layout: set())
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"there is no .*gone\.parquet"):
        index_parquet([str(tmp_path / "gone.parquet")], "image", lambda layout: set())


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("index")
    pack(source(root / "products"), root / "tars", "webdataset", shard_size=7)
    return root / "tars"


def test_the_index_beside_says_what_a_scan_finds(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = [str(path) for path in sorted(packed.glob("*.tar"), reverse=True)]  # in another order than it was written
    scans = [tar_scan.scanned(url, "") for url in urls]
    monkeypatch.delattr(tar_scan, "_scan")
    for index, scan in zip(index_tars(urls, ""), scans, strict=True):
        assert index.offsets.tolist() == scan["offset"].to_pylist()
        assert index.sizes.tolist() == scan["size"].to_pylist()
        assert index.layout["key"] == "key"
        assert index.columns.column_names == ["key", "label", "colour", "material", "caption", "group"]


def test_a_shard_of_another_length_than_the_index_says_is_told(packed: Path, tmp_path: Path) -> None:
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "val-00000-of-00002.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"val-00000-of-00002\.tar has \d+ bytes, index\.parquet beside it says \d+"):
        index_tars([str(shard)], "")
    (tmp_path / "index.parquet").write_bytes(b"no index")
    with pytest.raises(UserError, match=r"index\.parquet cannot be read"):
        index_tars([str(shard)], "")


def test_other_shards_and_other_indices_in_the_folder_do_no_harm(packed: Path, tmp_path: Path) -> None:
    foreign = write_tar(tmp_path / "other.tar", [("k", {"png": encoded(1), "cls": "4"})])
    for content in ((packed / "index.parquet").read_bytes(), None):
        if content is None:
            pq.write_table(pa.table({"shard": ["other.tar"]}), tmp_path / "index.parquet")
        else:
            (tmp_path / "index.parquet").write_bytes(content)
        (index,) = index_tars([str(foreign)], "")
        assert index.columns["key"].to_pylist() == ["k"]
        assert index.layout == {}


def test_a_server_that_fails_is_told_as_it_is(packed: Path) -> None:
    with served(packed) as (address, _):
        pass
    for url in (f"{address}/a.tar", f"{address}/a.parquet"):
        with pytest.raises(UserError, match=r"cannot be read \(Cannot connect .*correct the address") as caught:
            index_parquet([url], "image", lambda layout: set()) if url.endswith("t") else index_tars([url], "")
        assert "\n" not in str(caught.value)
    with served(packed) as (address, _), pytest.raises(UserError, match=r"(404|there is no).*"):
        index_tars([f"{address}/absent.tar"], "")


def test_each_shard_gets_its_own_rows_of_the_index(packed: Path) -> None:
    urls = [str(path) for path in sorted(packed.glob("*.tar"))]
    rows = pq.read_table(packed / "index.parquet")
    for url, index in zip(urls, index_tars(urls, ""), strict=True):
        here = [row for row, shard in enumerate(rows["shard"].to_pylist()) if shard == Path(url).name]
        assert len(here) > 0
        assert index.columns["key"].to_pylist() == rows["key"].take(here).to_pylist()


def test_a_image_that_is_not_the_packed_one_is_refused_by_name(packed: Path, tmp_path: Path) -> None:
    shard = tmp_path / "val-00000-of-00002.tar"
    for name in (shard.name, "index.parquet"):
        (tmp_path / name).write_bytes((packed / name).read_bytes())
    [index] = index_tars([str(shard)], "")
    count = len(index.offsets)
    shards = Shards([str(shard)], np.array([count]), index.columns["key"], "", index.offsets, index.sizes, index.checks)
    assert len(list(shards.read(np.arange(count)))) == count
    content = bytearray(shard.read_bytes())
    content[index.offsets[1] + index.sizes[1] // 2] ^= 1
    shard.write_bytes(content)
    assert shards.encoded(0)
    with pytest.raises(UserError, match=rf"{shard.name}: {index.columns['key'][1].as_py()} is damaged"):
        list(shards.read(np.arange(count)))


def test_an_index_without_checksums_is_read_as_before(packed: Path, tmp_path: Path) -> None:
    shard = tmp_path / "val-00000-of-00002.tar"
    shard.write_bytes((packed / shard.name).read_bytes())
    table = pq.read_table(packed / "index.parquet").drop_columns(["crc32"])
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"vitrail.check"}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "index.parquet")
    [index] = index_tars([str(shard)], "")
    assert set(index.checks.tolist()) == {-1}


def test_a_damaged_index_is_refused_by_name(packed: Path, tmp_path: Path) -> None:
    shard = tmp_path / "val-00000-of-00002.tar"
    shard.write_bytes((packed / shard.name).read_bytes())
    content = bytearray((packed / "index.parquet").read_bytes())
    content[len(content) // 3] ^= 1
    (tmp_path / "index.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"index\.parquet cannot be read \(index\.parquet: is damaged"):
        index_tars([str(shard)], "")
