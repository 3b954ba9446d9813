"""Tests of images streamed from shards: order, shares of processes, resuming, what is held at a time, and servers."""

from __future__ import annotations

import gc
import json
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.streaming import JOURNAL
from datamodules.streaming import shards as shards_module
from datamodules.streaming.shards import open_shard
from tests.datamodules.streaming.shard_sets import (
    SIZES,
    TRAIN,
    assert_same,
    batches,
    ids_of,
    on_rank,
    served,
    streamed,
    write_tar,
)
from tests.support.data import Recorder, Reporting, Seen, from_yaml, trainer
from vitrail.errors import UserError


def test_an_epoch_shows_every_sample_once_and_the_next_one_in_another_order(shards: str) -> None:
    loader = streamed(shards).train_dataloader()
    first, second = batches(loader, 0), batches(loader, 1)
    assert len(loader) == len(first) == 9
    assert sorted(ids_of(first)) == sorted(ids_of(second)) == sorted(TRAIN)
    assert ids_of(first) != ids_of(second)
    assert_same(batches(loader, 0), first)


def test_both_formats_show_the_same(packed: Path) -> None:
    one, other = (streamed(str(packed / kind)).train_dataloader() for kind in ("parquet", "webdataset"))
    assert_same(batches(one, 2), batches(other, 2))


def test_the_number_of_workers_changes_nothing(shards: str) -> None:
    alone = batches(streamed(shards).train_dataloader(), 1)
    for workers in (1, 2):
        loader = streamed(shards, loader={"num_workers": workers}).train_dataloader()
        # The second epoch of workers that stay alive, after a first one that was not finished.
        next(iter(loader))
        assert_same(batches(loader, 1), alone)
        evaluated = batches(streamed(shards, loader={"num_workers": workers}).val_dataloader())
        assert_same(evaluated, batches(streamed(shards).val_dataloader()))


def test_targets_captions_and_images_belong_together(shards: str) -> None:
    data = streamed(shards, augment={"preset": "none"})
    reference = data.dataset("train")  # image by image, each out of its shard
    place = {int(row): index for index, row in enumerate(reference.indices)}
    for batch in batches(data.train_dataloader()):
        for i, row in enumerate(batch["sample_id"].tolist()):
            assert batch["image"][i].equal(reference[place[row]]["image"])
            assert batch["label"][i] == data.table.targets["class"][row]
            assert batch["caption"][i] == data.table.caption(row)
    assert set(batch["attributes"]) == {"colour", "material"}


def test_views_of_frozen_features_keep_one_order(shards: str) -> None:
    data = streamed(shards)
    first, second = (batches(data.view_dataloader("train", view)) for view in (0, 1))
    assert ids_of(first) == ids_of(second)
    assert sorted(ids_of(first)) == sorted(TRAIN)
    assert not all(one["image"].equal(other["image"]) for one, other in zip(first, second, strict=True))


def run(shards: str, folder: Path, *callbacks: ModelCheckpoint, ckpt: Path | None = None, **options: Any) -> Seen:
    model = Recorder()
    workers = options.pop("workers", 0)
    buffer = options.pop("shuffle_buffer", 12)
    data = streamed(shards, loader={"num_workers": workers}, shuffle_buffer=buffer)
    trainer(folder, 2, *callbacks, **options).fit(model, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return model.seen


@pytest.fixture(scope="module")
def undisturbed(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return run(str(packed / "parquet"), tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("steps", "workers", "then"),
    [(4, 0, 0), (9, 0, 0), (6, 2, 0), (13, 2, 4)],
)
def test_resuming_anywhere_with_any_workers_changes_nothing(
    shards: str, tmp_path: Path, undisturbed: Seen, steps: int, workers: int, then: int
) -> None:
    assert len(undisturbed) == 18
    saver = ModelCheckpoint(tmp_path, filename="at", every_n_train_steps=steps, save_top_k=-1)
    before = run(shards, tmp_path, saver, max_steps=steps, workers=workers)
    after = run(shards, tmp_path, ckpt=tmp_path / "at.ckpt", workers=then)
    assert before + after == undisturbed


def test_resuming_within_an_epoch_with_another_buffer_is_refused(packed: Path, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="at", every_n_train_steps=4, save_top_k=-1)
    run(str(packed / "parquet"), tmp_path, saver, max_steps=4)
    with pytest.raises(UserError, match="with shuffle_buffer 12, now 24"):
        run(str(packed / "parquet"), tmp_path, ckpt=tmp_path / "at.ckpt", shuffle_buffer=24)


def test_resuming_within_an_epoch_of_an_order_without_interleaving_is_refused(shards: str) -> None:
    loader = streamed(shards).train_dataloader()
    old = {**loader.state_dict(), "batches": 3}
    del old["interleave"]  # as earlier versions wrote it
    loader.load_state_dict(old)
    with pytest.raises(UserError, match=r"in the middle of epoch 0 with interleave None, now 4; .* epoch's end"):
        batches(loader)


class Watch:
    """Counts shards that are open and images that are held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = self.most_open = self.opened = 0
        original = open_shard

        @contextmanager
        def counting(url: str) -> Iterator[IO[bytes]]:
            self.open += 1
            self.opened += 1
            self.most_open = max(self.most_open, self.open)
            try:
                with original(url) as file:
                    yield file
            finally:
                self.open -= 1

        monkeypatch.setattr(shards_module, "open_shard", counting)


@pytest.mark.parametrize(("buffer", "interleave"), [(1, 2), (8, 1), (20, 3)])
def test_open_shards_and_held_images_are_bounded(
    shards: str, buffer: int, interleave: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    loader = streamed(shards, streams=2, shuffle_buffer=buffer, interleave=interleave).train_dataloader()
    most = 0
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for _ in loader:
            most = max(most, loader.dataset.buffered)  # type: ignore[attr-defined]
    assert most <= buffer, "however many samples there are"
    assert (most > 0) == (buffer > 2)
    assert watch.most_open == 2 * interleave, "of each stream"
    # Six shards, of which the one at the cut between the streams is read by both.
    assert watch.opened <= 3 * 7
    assert watch.open == 0


def test_what_was_delivered_is_not_read_again(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = streamed(shards, streams=1, shuffle_buffer=4, interleave=2).train_dataloader()
    whole = batches(loader, 1)
    watch = Watch(monkeypatch)
    loader.load_state_dict({**loader.state_dict(), "batches": 7})
    rest = batches(loader, 1)
    assert_same(rest, whole[7:])
    assert watch.opened <= 3, "eight of 36 samples, in shards of six"


def test_remote_shards_are_streamed(packed: Path) -> None:
    with served(packed) as (address, asked):
        parquet = {
            split: [f"{address}/parquet/{path.name}" for path in sorted((packed / "parquet").glob(f"{split}-*"))]
            for split in SIZES
        }
        tars = {
            "train": f"{address}/webdataset/train-{{00000..00005}}-of-00006.tar",
            "val": f"{address}/webdataset/val-{{00000..00001}}-of-00002.tar",
        }
        for remote, kind in ((parquet, "parquet"), (tars, "webdataset")):
            data = streamed(remote)
            assert data.class_names == streamed(str(packed / kind)).class_names
            if kind == "webdataset":  # the index says what is inside; a shard is asked for its size alone, once
                assert sorted(path for path in asked if path.endswith(".tar")) == sorted(
                    f"/webdataset/{path.name}" for path in (packed / "webdataset").glob("[tv][ra]*-*.tar")
                )
            assert_same(batches(data.train_dataloader()), batches(streamed(str(packed / kind)).train_dataloader()))
        assert any(path.endswith("index.parquet") for path in asked)


def test_workers_stream_from_a_server(packed: Path) -> None:
    """The connections of the process that they are forked from are of no use to them."""
    with served(packed) as (address, asked):
        data = streamed(
            {"train": f"{address}/webdataset/train-{{00000..00005}}-of-00006.tar"}, loader={"num_workers": 2}
        )
        seen = batches(data.train_dataloader())
        assert any("train-00003" in path for path in asked)
    assert_same(seen, batches(streamed(str(packed / "webdataset")).train_dataloader()))


def test_the_yaml_form_and_what_a_checkpoint_keeps(packed: Path, tmp_path: Path) -> None:
    data = from_yaml(
        f"""
class_path: datamodules.StreamedImages
init_args:
  shards: {{train: [{packed}/parquet/train-*.parquet], val: {packed}/parquet/val-*.parquet}}
  columns: {{attributes: [colour]}}
  image: {{size: 16}}
"""
    )
    assert list(data.tasks) == ["class", "colour"]
    torch.save(dict(data.hparams), tmp_path / "hparams.pt")
    assert torch.load(tmp_path / "hparams.pt", weights_only=True)["columns"] == {"attributes": ["colour"]}


def test_two_real_processes_with_workers(shards: str, tmp_path: Path) -> None:
    runner = trainer(tmp_path, 2, devices=2, strategy="ddp_fork")
    runner.fit(Reporting(tmp_path), datamodule=streamed(shards, loader={"num_workers": 1}))
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for epoch in range(2):
        shares = [[row for e, _, ids, _ in report["seen"] if e == epoch for row in ids] for report in reports]
        assert [len(share) for share in shares] == [18, 18]
        assert set(shares[0] + shares[1]) == TRAIN
    validated = streamed(shards).split_indices("val").tolist()
    assert sorted(reports[0]["val"] + reports[1]["val"]) == sorted(validated * 2)


def test_other_files_and_unused_members_are_counted_as_left_out(packed: Path, tmp_path: Path) -> None:
    sample = {"jpg": b"a", "cls": "x", "json": "{}", "mask.png": b"b"}
    write_tar(tmp_path / "tars" / "train-0.tar", [("a", sample), ("b", sample), ("notes", {"md": "x", "jpg": b"c"})])
    (tmp_path / "tars" / "more").mkdir()
    for name in ("README", "photo.JPG", "more/photo.jpg", ".hidden"):
        (tmp_path / "tars" / name).write_bytes(b"")
    data = streamed(str(tmp_path / "tars"), columns={"label": "", "attributes": []})
    assert data.files_left_out == {".cls": 2, ".jpg": 2, ".json": 2, ".png": 2, "": 1, ".md": 1}
    data = streamed(str(tmp_path / "tars" / "train-0.tar"), columns={"label": "cls"})
    assert data.files_left_out == {".json": 2, ".png": 2, "": 1, ".jpg": 1, ".md": 1}, "next to the shard that is named"
    for folder in ("webdataset", "parquet"):
        record = streamed(str(packed / folder)).data_record()
        assert (record["files_left_out"], record["shards"], record["skipped"]) == ({}, 10, [])


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


def test_a_split_without_shards_is_refused(packed: Path) -> None:
    data = streamed({"train": str(packed / "parquet" / "train-*.parquet")})
    with pytest.raises(UserError, match=r"the val split is empty; name its shards with shards\.val"):
        data.val_dataloader()


def test_fewer_shards_than_processes_are_reported_and_work(packed: Path, tmp_path: Path) -> None:
    url = str(packed / "parquet" / "train-00000-of-00006.parquet")
    ranks = [on_rank(url, rank, 3, tmp_path, loader={"num_workers": 0}) for rank in range(3)]
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
