from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.streaming.index import index_tars
from datamodules.streaming.shards import Shards
from tests.datamodules.shard_sets import encoded, write_tar
from vitrail.errors import UserError

CONTENTS = [encoded(look) for look in range(10)]
NOWHERE = np.empty(0, dtype=np.int64)


def parquet(root: Path, kind: str = "struct") -> Shards:
    """Two files of six and four rows, in row groups of two."""
    urls = []
    for number, part in enumerate((CONTENTS[:6], CONTENTS[6:])):
        cells = [{"bytes": content, "path": None} for content in part] if kind == "struct" else part
        path = root / f"{number}.parquet"
        pq.write_table(pa.table({"image": cells}), path, row_group_size=2)
        urls.append(str(path))
    keys = pa.array([f"k{row}" for row in range(10)])
    return Shards(urls, np.array([6, 10]), keys, "image", NOWHERE, NOWHERE)


def tars(root: Path, *, zipped: bool = False) -> Shards:
    urls = []
    for number, rows in enumerate((range(6), range(6, 10))):
        samples = [(f"k{row}", {"cls": str(row), "png": CONTENTS[row]}) for row in rows]
        name = f"{number}.tar.gz" if zipped else f"{number}.tar"
        urls.append(str(write_tar(root / name, samples, "w:gz" if zipped else "w")))
    indices = index_tars(urls, "")
    keys = pa.array([key for index in indices for key in index.columns["key"].to_pylist()])
    offsets, sizes = (np.concatenate([getattr(index, key) for index in indices]) for key in ("offsets", "sizes"))
    return Shards(urls, np.array([6, 10]), keys, "", offsets, sizes)


MAKERS: dict[str, Any] = {
    "struct": parquet,
    "binary": lambda root: parquet(root, "binary"),
    "tar": tars,
    "tar.gz": lambda root: tars(root, zipped=True),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_rows_that_are_asked_for_come_in_order(kind: str, tmp_path: Path) -> None:
    shards = MAKERS[kind](tmp_path)
    for rows in ([0, 1, 2, 3, 4, 5], [1, 4], [5], [6, 9], []):
        assert list(shards.read(np.array(rows, dtype=np.int64))) == [CONTENTS[row] for row in rows]
    assert shards.encoded(7) == CONTENTS[7]
    assert shards.image(3).shape == (3, 10, 12)
    assert shards.label(8) == f"{shards.urls[1]}: k8"


def test_row_groups_without_wanted_rows_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = parquet(tmp_path)
    read: list[int] = []
    original = pq.ParquetFile.iter_batches

    def counting(self: Any, **options: Any) -> Any:
        read.extend(options["row_groups"])
        return original(self, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    assert len(list(shards.read(np.array([0, 5])))) == 2
    assert read == [0, 2]


@pytest.mark.parametrize("kind", ["struct", "tar", "tar.gz"])
def test_a_shard_that_was_cut_off_meanwhile_is_told(kind: str, tmp_path: Path) -> None:
    shards = MAKERS[kind](tmp_path)
    path = Path(shards.urls[0])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(UserError, match=f"{path.name}.*get it anew") as caught:
        list(shards.read(np.arange(6)))
    assert "\n" not in str(caught.value)


def test_a_shard_that_was_replaced_meanwhile_is_told(tmp_path: Path) -> None:
    shards = parquet(tmp_path)
    shutil.copy(shards.urls[1], shards.urls[0])
    with pytest.raises(UserError, match="fewer rows than when it was indexed"):
        list(shards.read(np.arange(6)))


def test_a_row_without_a_image_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [CONTENTS[0], None]}), path)
    shards = Shards([str(path)], np.array([2]), pa.array(["a", "b"]), "image", NOWHERE, NOWHERE)
    assert list(shards.read(np.arange(2))) == [CONTENTS[0], b""]
    with pytest.raises(UserError, match=r"a\.parquet: b: "):
        shards.image(1)


def test_gzip_is_really_what_was_read(tmp_path: Path) -> None:
    assert gzip.decompress(Path(tars(tmp_path, zipped=True).urls[0]).read_bytes())[:2] == b"k0"
