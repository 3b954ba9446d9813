"""Tests of streamed images where something is wrong: with images, options, shards, or a server."""

from __future__ import annotations

import gc
import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.streaming import JOURNAL
from tests.datamodules.streaming.shard_sets import SIZES, TRAIN, assert_same, batches, ids_of, on_rank, served, streamed
from vitrail.errors import UserError


def test_a_server_without_parts_of_files_is_enough_for_tar_but_not_for_parquet(packed: Path, tmp_path: Path) -> None:
    with served(packed, ranges=False) as (address, _):
        tars = streamed({"train": f"{address}/webdataset/train-{{00000..00005}}-of-00006.tar"})
        assert sorted(ids_of(batches(tars.train_dataloader()))) == sorted(TRAIN)
    # Larger than what is read at a time: smaller files come whole.
    noise = np.random.default_rng(0).bytes(12_000_000)
    table = pa.table({"label": [0, 1, 0], "image": [noise, b"", b""]})
    pq.write_table(table, tmp_path / "train.parquet", compression="none")
    with (
        served(tmp_path, ranges=False) as (address, _),
        pytest.raises(UserError, match=r"train\.parquet: its server gives no parts of files"),
    ):
        _ = streamed(f"{address}/train.parquet").table
    with served(tmp_path) as (address, _):
        assert streamed(f"{address}/train.parquet").class_names == ["0", "1"]


@pytest.fixture(scope="module")
def spoiled(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One image of train and one of val that cannot be read."""
    folder = tmp_path_factory.mktemp("spoiled")
    for path in sorted((packed / "parquet").glob("*.parquet")):
        table = pq.read_table(path)
        if path.name.startswith(("train-00002", "val-00000")):
            cells = table["image"].to_pylist()
            cells[3] = {"bytes": b"no image", "path": None}
            column = pa.array(cells, type=table["image"].type)
            table = table.set_column(0, table.schema.field(0), column)
        pq.write_table(table, folder / path.name)
    return str(folder)


def test_an_unreadable_image_stops_with_its_shard_and_key(spoiled: str, tmp_path: Path) -> None:
    for workers in (0, 1):
        data = streamed(spoiled, loader={"num_workers": workers})
        row = 2 * 6 + 3
        message = f"train-00002-of-00006.parquet: {data.table.name(row)}: not an image.*on_bad_image: skip"
        with pytest.raises(UserError, match=message) as caught:
            batches(data.train_dataloader())
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:left out")
def test_a_skipped_image_is_replaced_in_training_and_left_out_of_evaluation(spoiled: str, tmp_path: Path) -> None:
    bad_train, bad_val = 2 * 6 + 3, SIZES["train"] + 3
    options: dict[str, Any] = {"checks": {"on_bad_image": "skip"}, "augment": {"preset": "light"}}
    seen = []
    for workers in (0, 2):
        data = on_rank(spoiled, 0, 1, tmp_path, **options, loader={"num_workers": workers})
        seen.append(batches(data.train_dataloader()))
        assert len(seen[-1]) == 9
        assert set(ids_of(seen[-1])) == TRAIN - {bad_train}
        assert len(ids_of(seen[-1])) == len(TRAIN), "as many as without a loss"
        evaluated = batches(data.val_dataloader())
        assert sorted(ids_of(evaluated, counted=True)) == sorted({*data.split_indices("val").tolist()} - {bad_val})
    assert_same(*seen)
    lines = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert {line["row"] for line in lines} == {bad_train, bad_val}
    record = data.data_record()["skipped"]
    assert [line["name"] for line in record] == [data.table.name(bad_train), data.table.name(bad_val)]
    with pytest.warns(UserWarning, match="2 images could not be read"):
        data.teardown("fit")
    gc.disable()  # which would end the workers, too, but not at once
    try:
        with pytest.raises(UserError, match="not an image"):
            batches(data.view_dataloader("train", None))
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streams": 4, "loader": {"num_workers": 3}}, "data streams: 4 cannot be dealt to loader.num_workers: 3"),
        ({"shuffle_buffer": 0}, "data shuffle_buffer"),
        ({"loader": {"sampling": "balanced"}}, "data loader.sampling: balanced"),
        ({"loader": {"cache": "always"}}, "data loader.cache"),
        ({"caption": "all"}, "data caption"),
        ({"columns": {"labels": "x"}}, "data columns: unknown key 'labels'"),
    ],
)
def test_options_that_streams_cannot_keep_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        streamed("nowhere", **options)


def test_a_split_without_shards_is_told(packed: Path) -> None:
    data = streamed({"train": str(packed / "parquet" / "train-*.parquet")})
    with pytest.raises(UserError, match=r"the val split is empty; name its shards with shards\.val"):
        data.val_dataloader()


def test_fewer_shards_than_processes_are_told_and_work(packed: Path, tmp_path: Path) -> None:
    url = str(packed / "parquet" / "train-00000-of-00006.parquet")
    ranks = [on_rank(url, rank, 3, tmp_path) for rank in range(3)]
    with pytest.warns(UserWarning, match="1 shards of train for 3 processes"):
        seen = [ids_of(batches(data.train_dataloader())) for data in ranks]
    assert sorted(row for part in seen for row in part) == list(range(6))


def test_the_audit_sees_that_a_shard_has_changed(packed: Path, tmp_path: Path) -> None:
    for path in (packed / "parquet").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shards = {split: f"{tmp_path}/{split}-*.parquet" for split in SIZES}
    assert streamed(shards).audit().skipped == []
    path = tmp_path / "val-00001-of-00002.parquet"
    table = pq.read_table(path)
    cells = [{"bytes": b"no image", "path": None}, *table["image"].to_pylist()[1:]]
    pq.write_table(table.set_column(0, table.schema.field(0), pa.array(cells, table["image"].type)), path)
    (skipped,) = streamed(shards).audit().skipped
    assert "val-00001-of-00002.parquet" in skipped.reason
