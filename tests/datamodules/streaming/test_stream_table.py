from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.streaming.index import StreamColumns, read_streams
from datamodules.streaming.shards import Shards
from datamodules.table import SampleTable
from tests.datamodules.shard_sets import encoded, write_tar
from vitrail.errors import UserError
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


def test_numbers_without_names_are_in_order_of_size(tmp_path: Path) -> None:
    table, _ = read({"train": [parquet(tmp_path / "a.parquet", {"label": [10, 9, 10, 2]})]})
    assert table.tasks["class"] == ["2", "9", "10"]


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


def test_captions_alone_are_enough(tmp_path: Path) -> None:
    url = parquet(tmp_path / "a.parquet", {"text": ["a cup", "a hat"]})
    table, _ = read({"train": [url]}, {"label": "", "caption": "text"})
    assert table.tasks == {}
    assert table.caption(1) == "a hat"


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
    table, _ = read({"train": [url]}, {"label": "json.colour", "caption": "json.texts", "group": "json.id"})
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
        ({"kind": ["a"]}, {}, {}, r"columns\.label: .*a\.parquet has no column 'label' but image, kind; .*'' for none"),
        ({"label": ["a"]}, {"group": "product"}, {}, r"columns\.group: .* has no column 'product' but image, label"),
        ({"label": [0.5]}, {}, {}, "holds double, which is no class"),
        ({"label": [0, 4]}, {}, {"class": ["x", "y"]}, r"a\.parquet: row 1 has the label 4, but there are 2"),
        ({"label": ["x", "z"]}, {}, {"class": ["x", "y"]}, r"vocabulary\.class: .* has 'z' \(first in row 1\)"),
        ({"colour": ["x"]}, {"label": "", "attributes": ["colour"]}, {}, "need a main task besides"),
        ({"label": ["x"]}, {}, {"colour": ["x"]}, "vocabulary: 'colour' is no task; tasks are class"),
        ({"label": ["x"], "class": ["k"]}, {"attributes": ["class"]}, {}, "the name 'class' is taken by another task"),
        ({"label": ["x", "x", "x"], "id": ["k", "l", "k"]}, {"key": "id"}, {}, r"1 repeated keys, first 'k' in row 2"),
        ({"label": ["x", "x"], "id": ["k", None]}, {"key": "id"}, {}, "empty name"),
    ],
)
def test_mistakes_are_told(content: Any, columns: Any, vocabulary: Any, message: str, tmp_path: Path) -> None:
    url = parquet(tmp_path / "a.parquet", content)
    with pytest.raises(UserError, match=message):
        read({"train": [url]}, columns, vocabulary)


def test_members_that_no_sample_has_are_told(tmp_path: Path) -> None:
    url = str(write_tar(tmp_path / "a.tar", [("a", {"png": encoded(0), "cls": "0"})]))
    with pytest.raises(UserError, match=r"columns\.caption: no sample of .*a\.tar has 'json\.text' but cls"):
        read({"train": [url]}, {"caption": "json.text"})
    twice = [("a", {"png": encoded(0)}), ("b", {"png": encoded(0)}), ("a", {"png": encoded(0)})]
    with pytest.raises(UserError, match=r"twice\.tar has 1 repeated keys, first 'a' in row 2"):
        read({"train": [str(write_tar(tmp_path / "twice.tar", twice))]})


def test_a_large_table_keeps_its_order(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 7, 3000)
    urls = []
    for number, part in enumerate(np.split(labels, 30)):
        pq.write_table(
            pa.table({"image": pa.nulls(100, pa.binary()), "label": part}), tmp_path / f"{number:02}.parquet"
        )
        urls.append(str(tmp_path / f"{number:02}.parquet"))
    table, shards = read({"train": urls})
    assert table.targets["class"].tolist() == labels.tolist()
    assert shards.shard_of(np.array([0, 99, 100, 2999])).tolist() == [0, 0, 1, 29]
