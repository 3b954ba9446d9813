from __future__ import annotations

import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

import datamodules
from datamodules.base import ImageDataModule
from datamodules.options import AugmentOptions, CheckOptions, ImageOptions, LoaderOptions
from datamodules.table import SampleTable
from tests.support.data import CLASSES, Noise, Recorder, frame, noise, small, trainer
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK, UNKNOWN


class Files(ImageDataModule):
    """Images in a folder."""

    def __init__(self, root: str, checks: CheckOptions = CheckOptions()) -> None:
        super().__init__(ImageOptions(size=16), loader=LoaderOptions(batch_size=5), checks=checks)
        self.root = root

    def load_table(self) -> SampleTable:
        return SampleTable.from_frame(frame(), ["class", "colour"], root=self.root)


# What depends on the table only.


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


def test_a_user_error_while_reading_stays_one() -> None:
    class Missing(Noise):
        def load_table(self) -> SampleTable:
            raise UserError("labels.csv: not there")

    with pytest.raises(UserError, match=r"labels\.csv: not there"):
        _ = Missing().num_classes


# Constructor arguments and checkpoints.


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


def test_hue_jitter_is_off_where_a_colour_is_learned() -> None:
    assert Noise(augment=AugmentOptions(preset="reference")).augment_options.hue == 0
    assert Noise(augment=AugmentOptions(preset="reference", hue=0.1)).augment_options.hue == 0.1


# Loaders.


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


def test_loaders_tell_what_cannot_be_done() -> None:
    with pytest.raises(UserError, match=r"data loader.balance_on: no task 'size'; tasks are class, colour"):
        small(sampling="balanced", balance_on="size").train_dataloader()
    with pytest.raises(UserError, match=r"do not fill one batch of 64"):
        small(batch_size=64, drop_last=True).train_dataloader()
    assert len(small(drop_last=True).train_dataloader()) == 7


def test_an_empty_train_split_is_refused() -> None:
    class Untrained(Noise):
        def load_table(self) -> SampleTable:
            vocabularies = {"class": CLASSES, "colour": ["red"]}
            return SampleTable.from_frame(frame(0), ["class", "colour"], vocabularies)

    data = Untrained()
    assert len(data.test_dataloader()) == 1
    with pytest.raises(UserError, match="the train split is empty"):
        data.train_dataloader()


def test_an_empty_evaluation_split_is_refused() -> None:
    class NoTest(Noise):
        def load_table(self) -> SampleTable:
            return SampleTable.from_frame(frame(n_test=0), ["class"], origin="labels.csv")

    with pytest.raises(UserError, match=r"labels\.csv: the test split is empty"):
        NoTest().test_dataloader()
    assert len(NoTest().val_dataloader()) == 1


@pytest.mark.parametrize(("batch_size", "batches"), [(29, 1), (28, 2), (1, 30)])
def test_a_last_training_batch_of_one_image_is_left_out(batch_size: int, batches: int) -> None:
    loader = Noise(loader=LoaderOptions(batch_size=batch_size)).train_dataloader()
    assert len(loader) == len(list(loader)) == batches


def test_two_processes_share_the_data() -> None:
    class Place:
        def __init__(self, rank: int) -> None:
            self.global_rank, self.world_size = rank, 2

    train: list[int] = []
    val: list[int] = []
    for rank in range(2):
        data = Noise(53, image=ImageOptions(size=4), loader=LoaderOptions(batch_size=8))
        data.trainer = Place(rank)  # type: ignore[assignment]
        batches = list(data.train_dataloader())
        assert sum(len(batch["label"]) for batch in batches) == 27
        train += [sample for batch in batches for sample in batch["sample_id"].tolist()]
        for batch in data.val_dataloader():
            val += batch["sample_id"][~batch["is_padding"]].tolist()
    assert set(train) == set(range(53))
    assert sorted(val) == list(range(53, 62))


def test_copies_for_spawned_workers_leave_the_trainer_behind() -> None:
    data = small()
    data.trainer = trainer(Path(), 1)
    copy = pickle.loads(pickle.dumps(data))  # noqa: S301 -- our own bytes
    assert copy.trainer is None
    assert copy.dataset("train")[2]["image"].equal(data.dataset("train")[2]["image"])


# Images in files.


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


def test_skipped_images_are_left_out_and_told_and_others_keep_their_ids(images: Path, tmp_path: Path) -> None:
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


def test_groups_across_splits_are_refused_for_generated_data_too(tmp_path: Path) -> None:
    class Leaking(Noise):
        def load_table(self) -> SampleTable:
            leaking = frame(self.n)
            leaking.loc[[2, 33], "group"] = "same"
            return SampleTable.from_frame(leaking, ["class", "colour"])

    with pytest.raises(UserError, match="same"):
        trainer(tmp_path, 1).fit(Recorder(), datamodule=Leaking(image=ImageOptions(size=4)))
    trainer(tmp_path, 1).fit(
        Recorder(), datamodule=Leaking(image=ImageOptions(size=4), checks=CheckOptions(allow_leaks=["groups"]))
    )


# The package.


def test_the_package_exports_its_names_lazily() -> None:
    assert datamodules.ImageDataModule is ImageDataModule
    assert datamodules.UserError is UserError
    assert datamodules.SampleTable is SampleTable
    assert set(datamodules.__all__) <= set(dir(datamodules))
    for name in datamodules.__all__:
        assert getattr(datamodules, name).__module__.startswith(("datamodules.", "vitrail."))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = datamodules.Nothing
    assert LABEL_TASK == "class"
