from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from datamodules import ImageFolder, Products, StreamedImages, Wares
from datamodules.base import ImageDataModule
from datamodules.checks.verify import content_of
from datamodules.options import AugmentOptions, CheckOptions, ImageOptions, LoaderOptions, Preset
from datamodules.streaming.pack import PackFormat, pack
from datamodules.table import SampleTable
from tests.support.data import (
    CLASSES,
    Noise,
    Recorder,
    Reporting,
    Seen,
    frame,
    noise,
    run,
    small,
    trainer,
    write_image_folder,
    write_products,
)
from vitrail.errors import UserError
from vitrail.types import UNKNOWN, Batch, DescribesImages


class Files(ImageDataModule):
    """Images in a folder."""

    def __init__(self, root: str, checks: CheckOptions = CheckOptions()) -> None:
        super().__init__(ImageOptions(size=16), loader=LoaderOptions(batch_size=5), checks=checks)
        self.root = root

    def load_table(self) -> SampleTable:
        return SampleTable.from_frame(frame(), ["class", "colour"], root=self.root)


def test_what_models_are_linked_to_is_there_before_any_setup() -> None:
    data = Noise(image=ImageOptions(size=40))
    assert data.tasks == {"class": CLASSES, "colour": ["blue", "red"]}
    assert data.class_names == CLASSES
    assert data.num_classes == 3
    assert data.class_counts == {"class": [6, 6, 18], "colour": [13, 12]}
    assert data.image_size == 40
    assert data.sample_names()[31] == "n31"
    assert data.group_names()[31] == "g31"


def test_the_table_is_read_once() -> None:
    class Counting(Noise):
        reads = 0

        def load_table(self) -> SampleTable:
            Counting.reads += 1
            return super().load_table()

    data = Counting()
    assert Counting.reads == 0, "construction reads nothing"
    data.setup("fit")
    assert data.num_classes + len(data.tasks) + data.train_dataloader().batch_size == 3 + 2 + 32  # type: ignore[operator]
    assert Counting.reads == 1


def test_an_attribute_error_while_reading_is_not_taken_for_a_missing_attribute() -> None:
    class Broken(Noise):
        def load_table(self) -> SampleTable:
            return self.no_such_thing  # type: ignore[attr-defined, no-any-return]

    with pytest.raises(RuntimeError, match="no_such_thing"):
        getattr(Broken(), "tasks", None)


def test_the_subclasss_own_arguments_are_saved_and_load_with_weights_only(tmp_path: Path) -> None:
    data = Noise(
        12,
        ["a", "b"],
        image=ImageOptions(size=16),
        augment=AugmentOptions(preset="light"),
        loader=LoaderOptions(batch_size=4),
        checks=CheckOptions(allow_leaks=["near"]),
        seed=7,
    )
    expected = {
        "n": 12,
        "tags": ["a", "b"],
        "image": asdict(ImageOptions(size=16)),
        "augment": asdict(AugmentOptions(preset="light")),
        "loader": asdict(LoaderOptions(batch_size=4)),
        "checks": asdict(CheckOptions(allow_leaks=["near"])),
        "seed": 7,
        "shots": 0,
        "prompts": None,
        "caption": "random",
    }
    assert dict(data.hparams) == expected
    path = ModelCheckpoint(dirpath=tmp_path, filename="c")
    trainer(tmp_path, 1, path).fit(Recorder(), datamodule=data)
    stored = torch.load(path.best_model_path, weights_only=True)
    assert stored["datamodule_hyper_parameters"] == expected
    assert stored["Noise"] == {"fingerprint": data.table.fingerprint(), "value_range": "auto"}
    again = Noise.load_from_checkpoint(path.best_model_path, weights_only=True)
    assert dict(again.hparams) == expected
    assert again.image_options == data.image_options
    assert again.table.fingerprint() == data.table.fingerprint()


def test_what_the_options_leave_open_is_as_the_model_wants_it() -> None:
    own = {"size": 99, "resize": "squash", "crop_fraction": 0.9, "interpolation": "bilinear", "crop_rounding": "down"}
    open_, chosen = (
        Noise(image=ImageOptions(size=16)),
        Noise(image=ImageOptions(size=16, resize="crop", crop_fraction=1.0)),
    )
    for data in (open_, chosen):
        data.adopt_image_options(own)
    assert {**open_.image_options, **own, "size": 16} == open_.image_options
    assert chosen.image_options["resize"] == "crop"
    assert chosen.image_options["crop_fraction"] == 1.0
    assert chosen.image_options["interpolation"] == "bilinear"
    # A checkpoint of a version without these options was trained on cropped images.
    open_.adopt_image_options({"size": 16, "crop_fraction": 1.0, "interpolation": "bicubic"})
    assert open_.image_options["resize"] == "crop"


def test_options_of_an_old_checkpoint_are_dictionaries() -> None:
    options: dict[str, Any] = {"image": {"size": 16}, "loader": {"batch_size": 3}, "augment": None}
    data = Noise(**options)
    assert (data.image_size, data.loader_options.batch_size, data.augments) == (16, 3, False)
    with pytest.raises(UserError, match="data loader: unknown key 'shuffle'"):
        Noise(**{**options, "loader": {"shuffle": True}})


def test_hue_jitter_is_off_where_a_colour_is_the_target() -> None:
    assert Noise(augment=AugmentOptions(preset="reference")).augment_options.hue == 0
    assert Noise(augment=AugmentOptions(preset="reference", hue=0.1)).augment_options.hue == 0.1


def test_splits_go_to_their_loaders() -> None:
    data = small()
    data.setup()
    train = [sample for batch in data.train_dataloader() for sample in batch["sample_id"].tolist()]
    assert sorted(train) == list(range(30))
    for loader, expected in (
        (data.val_dataloader(), range(30, 39)),
        (data.test_dataloader(), range(39, 47)),
        (data.predict_dataloader(), range(39, 47)),
        (data.eval_dataloader("train"), range(30)),
    ):
        batches = list(loader)
        assert [sample for batch in batches for sample in batch["sample_id"].tolist()] == list(expected)
        assert not any("mix" in batch for batch in batches)
        assert all(batch["image"].shape[1:] == (3, 16, 16) for batch in batches)


class Described(Noise):
    """Every third image has no caption."""

    def load_table(self) -> SampleTable:
        rows = frame(self.n)
        rows["caption"] = [["", " ", f"image {number}"][number % 3] for number in range(len(rows))]
        return SampleTable.from_frame(rows, ["class", "colour"])


def test_images_without_a_caption_are_counted_and_ask_nothing() -> None:
    data = Described(image=ImageOptions(size=16), loader=LoaderOptions(batch_size=3))
    data.setup("fit")
    assert (data.without_caption("train"), data.without_caption("val")) == (20, 6)
    batch = next(iter(data.eval_dataloader("val")))
    assert batch["captions"] == [[], [], ["image 32"]]
    facts = data.table.facts(batch["sample_id"].numpy(), [""] * 3, image_files=False)
    assert facts["captions"].to_pylist() == batch["captions"]
    assert Noise().without_caption("train") == 0


def test_evaluation_images_are_not_augmented() -> None:
    data = small()
    first, again = (torch.cat([batch["image"] for batch in data.val_dataloader()]) for _ in range(2))
    assert first.equal(again)
    plain = Noise(image=ImageOptions(size=16), loader=LoaderOptions(batch_size=4))
    plain.setup()
    assert first.equal(torch.cat([batch["image"] for batch in plain.val_dataloader()]))
    assert plain.dataset("train", augmented=True)[5]["image"].equal(plain.dataset("train")[5]["image"])


def test_balanced_loading_evens_the_classes_out() -> None:
    data = Noise(300, image=ImageOptions(size=4), loader=LoaderOptions(batch_size=50, sampling="balanced"))
    labels = torch.cat([batch["label"] for batch in data.train_dataloader()])
    assert len(labels) == 300
    assert torch.bincount(labels).min() > 70, "60 of them are cups, 180 are hats"
    by_colour = Noise(300, image=ImageOptions(size=4), loader=LoaderOptions(sampling="balanced", balance_on="colour"))
    colours = torch.cat([batch["attributes"]["colour"] for batch in by_colour.train_dataloader()])
    assert 20 < int((colours == UNKNOWN).sum()) < 70, "unknown ones are as frequent as they are"


def test_loaders_refuse_options_that_the_data_cannot_meet() -> None:
    with pytest.raises(UserError, match=r"data loader.balance_on: no task 'size'; tasks are class, colour"):
        small(sampling="balanced", balance_on="size").train_dataloader()
    with pytest.raises(UserError, match=r"do not fill one batch of 64"):
        small(batch_size=64, drop_last=True).train_dataloader()
    assert len(small(drop_last=True).train_dataloader()) == 7


def test_empty_splits_are_refused() -> None:
    class OnlyVal(Noise):
        def load_table(self) -> SampleTable:
            return SampleTable.from_frame(frame(0, n_test=0), ["class"], {"class": CLASSES}, origin="labels.csv")

    data = OnlyVal()
    assert len(data.val_dataloader()) == 1
    for name in ("train", "test"):
        with pytest.raises(UserError, match=rf"labels\.csv: the {name} split is empty"):
            getattr(data, f"{name}_dataloader")()


@pytest.mark.parametrize(("batch_size", "batches"), [(29, 1), (28, 2), (1, 30)])
def test_a_last_training_batch_of_one_image_is_left_out(batch_size: int, batches: int) -> None:
    loader = Noise(loader=LoaderOptions(batch_size=batch_size)).train_dataloader()
    assert len(loader) == len(list(loader)) == batches


def test_copies_for_spawned_workers_leave_the_trainer_behind() -> None:
    data = small()
    data.trainer = trainer(Path(), 1)
    copy = pickle.loads(pickle.dumps(data))  # noqa: S301 -- our own bytes
    assert copy.trainer is None
    assert copy.dataset("train")[2]["image"].equal(data.dataset("train")[2]["image"])


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(47):
        Image.fromarray(noise(index)).save(folder / f"{index}.png")
    return folder


def test_images_are_read_from_their_files(images: Path) -> None:
    data = Files(str(images))
    assert data.read_image(5).equal(torch.from_numpy(noise(5)).permute(2, 0, 1))
    data.prepare_data()
    data.setup("fit")
    record = data.data_record()
    assert record["samples"] == {"train": 30, "val": 9, "test": 8}
    assert record["groups"] == {"train": 30, "val": 9, "test": 8}
    assert record["skipped"] == []
    assert record["fingerprint"] == data.table.fingerprint()
    assert record["data"] == "Files"


def test_bad_images_are_listed_by_row_before_any_training(images: Path) -> None:
    (images / "9.png").write_bytes((images / "9.png").read_bytes()[:200])
    (images / "3.png").unlink()
    (images / "40.png").write_text("a letter")
    for refuse in (Files(str(images)).prepare_data, Files(str(images)).setup):
        with pytest.raises(UserError) as caught:
            refuse()
        lines = str(caught.value).splitlines()
        assert lines[0].startswith("labels.csv: 3 problems; ")
        assert "checks.on_bad_image: skip" in lines[0]
        assert [line.split(": ")[0] for line in lines[1:]] == ["  labels.csv:5", "  labels.csv:11", "  labels.csv:42"]
        assert "3.png" in lines[1]
        assert "9.png" in lines[2]


def test_skipped_images_are_left_out_and_recorded_and_others_keep_their_ids(images: Path, tmp_path: Path) -> None:
    (images / "9.png").write_text("a letter")
    (images / "40.png").unlink()
    data = Files(str(images), CheckOptions(on_bad_image="skip"))
    model = Recorder()
    runner = trainer(tmp_path, 1)
    runner.fit(model, datamodule=data)
    seen = sorted(sample for _, _, ids, _ in model.seen for sample in ids)
    assert seen == [index for index in range(30) if index != 9]
    runner.test(model, datamodule=data, verbose=False)
    assert model.evaluated["test"] == [39, 41, 42, 43, 44, 45, 46]
    record = data.data_record()
    assert record["samples"] == {"train": 29, "val": 9, "test": 7}
    assert [(skipped["name"], skipped["row"]) for skipped in record["skipped"]] == [("n9", 11), ("n40", 42)]
    assert "no such file" in record["skipped"][1]["reason"]
    assert len(data.sample_names()) == 47


IDS = np.array([5, 2, 30])


def products(root: Path, **options: object) -> Products:
    attributes = ["colour", "material"]
    data = Products(str(root), attributes=attributes, image={"size": 16}, **options)  # type: ignore[arg-type]
    data.setup("predict")
    return data


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_products(tmp_path_factory.mktemp("products"), grey=False)


def test_facts_are_the_tables(root: Path) -> None:
    data = products(root)
    assert isinstance(data, DescribesImages)
    facts = data.image_facts(IDS).to_pylist()
    table = data.table
    for row, fact in zip(IDS.tolist(), facts, strict=True):
        assert fact["id"] == table.name(row)
        assert fact["path"] == str(root / table.name(row))
        assert fact["content"] == content_of(data.read_image(row).permute(1, 2, 0).contiguous().numpy()).hex()
        assert (fact["caption"], fact["captions"]) == (table.caption(row), [table.caption(row)])
        assert (fact["group"], fact["split"]) == (table.group(row), table.split(row))
        for task, names in table.tasks.items():
            assert fact[f"label_{task}"] == names[table.targets[task][row]]

    data.table.targets["colour"][IDS[1]] = UNKNOWN
    assert data.image_facts(IDS).column("label_colour").is_null().to_pylist() == [False, True, False]


def test_generated_images_are_no_files(tmp_path: Path) -> None:
    data = Wares(n_samples=40, resolution=16)
    data.setup("predict")
    facts = data.image_facts(IDS).to_pylist()
    assert not data.image_files
    assert [fact["path"] for fact in facts] == [""] * 3
    assert facts[0]["content"] == content_of(data.read_image(5).permute(1, 2, 0).contiguous().numpy()).hex()
    assert len({fact["content"] for fact in facts}) == 3


@pytest.mark.parametrize("pack_format", ["parquet", "webdataset"])
def test_streamed_images_change_with_their_shard(root: Path, tmp_path: Path, pack_format: PackFormat) -> None:
    pack(products(root), tmp_path / "shards", pack_format, 10)

    def streamed() -> StreamedImages:
        data = StreamedImages(
            str(tmp_path / "shards"), image=ImageOptions(size=16), loader=LoaderOptions(batch_size=4), streams=2
        )
        data.setup("predict")
        return data

    data = streamed()
    everything = data.rows_of(["train", "val", "test"])
    before = data.image_facts(everything)
    assert before.column("id").to_pylist() == data.sample_names()
    assert len(set(before.column("content").to_pylist())) == len(everything)
    assert before.equals(streamed().image_facts(everything))
    first = sorted((tmp_path / "shards").glob("test-*"))[0]
    first.touch()
    other = np.array(before.column("content")) != np.array(streamed().image_facts(everything).column("content"))
    assert set(before.column("split").filter(other).to_pylist()) == {"test"}
    assert other.sum() == len(data.split_indices("test")[:10])


def assert_images_of_splits(data: ImageDataModule, batches: list[Batch]) -> None:
    by_row = {
        int(row): image
        for split in ("train", "val", "test")
        for batch in data.eval_dataloader(split)
        for row, image in zip(batch["sample_id"], batch["image"], strict=True)
    }
    for batch in batches:
        for row, image in zip(batch["sample_id"], batch["image"], strict=True):
            assert torch.equal(image, by_row[int(row)])


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_rows_come_in_their_order(root: Path, tmp_path: Path, workers: int) -> None:
    pack(products(root), tmp_path / "shards", "parquet", 10)
    loader = {"batch_size": 4, "num_workers": workers, "predict": ["train", "test"]}
    data = StreamedImages(str(tmp_path / "shards"), image={"size": 16}, loader=loader, streams=2)
    data.setup("predict")
    rows = np.array([1, 2, 5, 11, 12, 13, 22, 30, 35])
    batches = list(data.rows_dataloader(rows))
    assert torch.cat([batch["sample_id"] for batch in batches]).tolist() == rows.tolist()
    assert_images_of_splits(data, batches)
    seen = torch.cat([batch["sample_id"] for batch in data.predict_dataloader()])
    assert seen.tolist() == data.rows_of(["train", "test"]).tolist()


@pytest.mark.parametrize("splits", [["test"], ["train", "val", "test"], ["test", "val"]])
def test_predict_sees_the_splits_that_are_asked_for(root: Path, splits: list[str]) -> None:
    data = products(root, loader={"batch_size": 8, "predict": splits})
    batches = list(data.predict_dataloader())
    seen = torch.cat([batch["sample_id"] for batch in batches])
    expected = np.sort(np.concatenate([data.split_indices(split) for split in splits]))
    assert seen.tolist() == expected.tolist()
    assert_images_of_splits(data, batches)


@pytest.mark.parametrize(("predict", "message"), [([], "at least one of"), (["exam"], "one of train, val, test")])
def test_unknown_splits_to_predict_are_refused(predict: list[str], message: str) -> None:
    with pytest.raises(UserError, match=rf"loader\.predict.*{message}"):
        Wares(loader={"predict": predict})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What four epochs show, in the main process and without a stop."""
    return run(tmp_path_factory.mktemp("whole"), 4)


def test_epochs_differ_and_each_shows_every_sample(uninterrupted: Seen) -> None:
    orders = [[place for e, _, ids, _ in uninterrupted if e == epoch for place in ids] for epoch in range(4)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize(("workers", "on_train_epoch_end"), [(0, False), (2, True)])
def test_resuming_between_epochs_changes_nothing(
    tmp_path: Path, uninterrupted: Seen, workers: int, on_train_epoch_end: bool
) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=on_train_epoch_end)
    first, second = Recorder(), Recorder()
    trainer(tmp_path, 2, saver).fit(first, datamodule=small(num_workers=workers))
    trainer(tmp_path, 4).fit(
        second, datamodule=small(num_workers=workers), ckpt_path=saver.last_model_path, weights_only=True
    )
    assert first.seen + second.seen == uninterrupted


@pytest.mark.parametrize(("workers", "steps"), [(0, 3), (0, 8), (0, 16), (2, 3)])
def test_resuming_within_an_epoch_changes_nothing(
    tmp_path: Path, uninterrupted: Seen, workers: int, steps: int
) -> None:
    saver = ModelCheckpoint(tmp_path, filename="at-{step}", every_n_train_steps=steps, save_top_k=-1)
    trainer(tmp_path, 4, saver, max_steps=steps).fit(Recorder(), datamodule=small(num_workers=workers))
    resumed = Recorder()
    path = next(tmp_path.glob(f"at-step={steps}.ckpt"))
    trainer(tmp_path, 4).fit(resumed, datamodule=small(num_workers=workers), ckpt_path=path, weights_only=True)
    assert resumed.seen == uninterrupted[steps:]


def test_resuming_after_a_validation_within_an_epoch_changes_nothing(tmp_path: Path, uninterrupted: Seen) -> None:
    saver = ModelCheckpoint(tmp_path, filename="at-{step}", save_top_k=-1, save_on_train_epoch_end=False)
    trainer(tmp_path, 2, saver, val_check_interval=3).fit(Recorder(), datamodule=small())
    for steps in (3, 14):
        resumed = Recorder()
        path = next(tmp_path.glob(f"at-step={steps}.ckpt"))
        trainer(tmp_path, 4, val_check_interval=3).fit(resumed, datamodule=small(), ckpt_path=path, weights_only=True)
        assert resumed.seen == uninterrupted[steps:]


def test_distinct_batches_are_resumed_within_an_epoch(tmp_path: Path) -> None:
    def data() -> Noise:
        return small(sampling="distinct", batch_size=2)

    whole, resumed = Recorder(), Recorder()
    trainer(tmp_path, 2).fit(whole, datamodule=data())
    steps = len(whole.seen) // 2 + 3
    saver = ModelCheckpoint(tmp_path, filename="at-{step}", every_n_train_steps=steps, save_top_k=-1)
    trainer(tmp_path, 2, saver, max_steps=steps).fit(Recorder(), datamodule=data())
    path = next(tmp_path.glob(f"at-step={steps}.ckpt"))
    trainer(tmp_path, 2).fit(resumed, datamodule=data(), ckpt_path=path, weights_only=True)
    assert resumed.seen == whole.seen[steps:]
    labels = data().table.targets["class"]
    assert all(labels[first] != labels[second] for _, _, (first, second), _ in whole.seen)


def test_changed_data_are_reported_on_resume(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, 1, saver).fit(Recorder(), datamodule=Noise(30, image=ImageOptions(size=4)))
    with pytest.warns(UserWarning, match="the data have changed since the checkpoint"):
        trainer(tmp_path, 2).fit(
            Recorder(),
            datamodule=Noise(31, image=ImageOptions(size=4)),
            ckpt_path=saver.last_model_path,
            weights_only=True,
        )


@pytest.mark.parametrize("injects_samplers", [False, True])
def test_two_real_processes_see_every_sample_once(tmp_path: Path, injects_samplers: bool) -> None:
    runner = trainer(tmp_path, 2, devices=2, strategy="ddp_fork", use_distributed_sampler=injects_samplers)
    runner.fit(
        Reporting(tmp_path), datamodule=Noise(53, image=ImageOptions(size=4), loader=LoaderOptions(batch_size=8))
    )
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for epoch in range(2):
        shares = [[place for e, _, ids, _ in report["seen"] if e == epoch for place in ids] for report in reports]
        assert [len(share) for share in shares] == [27, 27]
        assert set(shares[0] + shares[1]) == set(range(53))
    assert sorted(reports[0]["val"] + reports[1]["val"]) == sorted([*range(53, 62)] * 2)


def test_overfitting_on_few_batches_works(tmp_path: Path) -> None:
    model = Recorder()
    trainer(tmp_path, 2, overfit_batches=2).fit(model, datamodule=small())
    assert [ids for _, _, ids, _ in model.seen] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


@pytest.mark.parametrize(
    ("at_hand", "local", "images", "augment", "expected"),
    [
        (8, 1, "decoded", "light", 7),
        (8, 4, "decoded", "light", 1),
        (64, 1, "decoded", "none", 16),
        (1, 1, "decoded", "none", 0),
        (8, 1, "cached", "light", 0),
        (8, 1, "cached", "reference", 7),
    ],
)
def test_workers_are_chosen_by_cores_and_by_what_an_image_costs(
    at_hand: int,
    local: int,
    images: str,
    augment: Preset,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setattr("datamodules.base.cores", lambda: at_hand)
    notes: list[str] = []
    monkeypatch.setattr("datamodules.base.rank_zero_info", notes.append)
    data = ImageFolder(
        str(write_image_folder(tmp_path / "data", objects=3)),
        image=ImageOptions(size=16),
        loader=LoaderOptions(batch_size=4, cache="always" if images == "cached" else "never"),
        augment=AugmentOptions(preset=augment),
    )
    assert data.train_dataloader().num_workers == expected
    assert data.train_dataloader().num_workers == expected
    shown = [note for note in notes if "num_workers: auto" in note]
    assert len(shown) == 1, "never silently, and once"
    assert f"worker processes for images: {expected} " in shown[0]


def test_workers_that_were_asked_for_are_taken() -> None:
    assert Noise(12, image=ImageOptions(size=16), loader=LoaderOptions(num_workers=3)).worker_processes() == 3
    with pytest.raises(UserError, match=r"loader.num_workers: must be >=0 or one of auto; got 'many'"):
        LoaderOptions(num_workers="many")
