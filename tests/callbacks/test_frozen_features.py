from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from callbacks import BackboneUnfreezing, FrozenFeatures
from callbacks.finetuning import FeatureTable
from datamodules.base import ImageDataModule
from datamodules.options import AugmentOptions
from datamodules.table import SampleTable
from lightning_modules.base import VisionTask
from lightning_modules.dual_encoder import DualEncoder
from tests.support.models import tiny_pair, write_clip
from tests.support.runs import SIZE, SPLIT_SIZES, MadePhotos, tiny_task, tiny_trainer
from vitrail.errors import UserError

FROZEN, EPOCHS = 3, 4


class Augmented(MadePhotos):
    """As its base, with augmentation, and it counts the images that are read."""

    def __init__(self, augment: AugmentOptions = AugmentOptions()) -> None:
        super().__init__()
        self._augment = AugmentOptions.of(augment)
        self.read = 0

    def read_image(self, index: int) -> torch.Tensor:
        self.read += 1
        return super().read_image(index)


class Noting(Callback):
    """Notes losses and what was computed from them, step by step and epoch by epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.validated: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated.append(float(trainer.callback_metrics["val/loss"]))


class Done:
    """A training and what was seen of it."""

    def __init__(self, folder: Path, data: ImageDataModule, task: VisionTask, *extra: Callback, **changes: Any) -> None:
        self.task, self.data, self.noted = task, data, Noting()
        changes = {"max_epochs": EPOCHS, **changes}
        with images_encoded(task) as self.encoded:
            self.trainer = tiny_trainer(folder, callbacks=[*extra, self.noted], **changes)
            ckpt_path = changes.pop("ckpt_path", None)
            self.trainer.fit(task, datamodule=data, ckpt_path=ckpt_path)


@contextmanager
def images_encoded(task: VisionTask) -> Iterator[list[int]]:
    """Sizes of the batches that go through the image backbone."""
    sizes: list[int] = []
    original = task.image_features

    def noting(image: torch.Tensor) -> torch.Tensor:
        sizes.append(len(image))
        return original(image)

    task.image_features = noting  # type: ignore[method-assign]
    yield sizes
    del task.image_features


def two_phases(
    folder: Path, features: FrozenFeatures, augment: AugmentOptions = AugmentOptions(), **changes: Any
) -> Done:
    unfreezing = BackboneUnfreezing(FROZEN, lr=3e-3, backbone_lr=1e-3, head_lr=2e-3)
    return Done(folder, Augmented(augment), tiny_task(), unfreezing, features, **changes)


def assert_same(left: Done, right: Done, tolerance: float = 1e-5) -> None:
    assert left.noted.losses == pytest.approx(right.noted.losses, abs=tolerance)
    assert left.noted.validated == pytest.approx(right.noted.validated, abs=tolerance)
    theirs = right.task.state_dict()
    for key, value in left.task.state_dict().items():
        assert torch.allclose(value.float(), theirs[key].float(), atol=tolerance), key


@pytest.fixture(scope="module")
def naive(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return two_phases(tmp_path_factory.mktemp("naive"), FrozenFeatures("never"), precision="64-true")


def test_two_phases_end_as_on_the_way_through_the_whole_network(tmp_path: Path, naive: Done) -> None:
    # In double precision: in single one, networks that all learn drift apart from differences in the last digit.
    once = two_phases(tmp_path, FrozenFeatures(), precision="64-true")
    assert_same(once, naive, tolerance=1e-9)
    assert isinstance(once.data, Augmented)
    assert isinstance(naive.data, Augmented)
    both = SPLIT_SIZES["train"] + SPLIT_SIZES["val"]
    # Once for the features, and once in the epoch in which everything learns.
    assert once.data.read == 2 * both
    assert naive.data.read == EPOCHS * both
    assert sum(once.encoded) == both, "all other images go through the task's own way"


def test_heads_learn_the_same_in_single_precision(tmp_path: Path) -> None:
    steps = FROZEN * SPLIT_SIZES["train"] // 4
    limits: dict[str, Any] = {"max_steps": steps, "max_epochs": EPOCHS}
    once = two_phases(tmp_path / "once", FrozenFeatures("auto"), **limits)
    never = two_phases(tmp_path / "never", FrozenFeatures("never"), **limits)
    assert_same(once, never, tolerance=1e-5)
    assert len(never.noted.losses) == steps


def test_as_many_views_as_epochs_are_the_epochs_own_augmentation(tmp_path: Path) -> None:
    augment = AugmentOptions(random_resized_crop=[0.5, 1.0], horizontal_flip=0.5)
    once = two_phases(tmp_path / "once", FrozenFeatures(n_views=FROZEN), augment)
    assert_same(once, two_phases(tmp_path / "never", FrozenFeatures("never"), augment))


def test_fewer_views_come_again(tmp_path: Path) -> None:
    augment = AugmentOptions(random_resized_crop=[0.5, 1.0])
    done = two_phases(tmp_path, FrozenFeatures(n_views=2), augment)
    assert sum(done.encoded) == 2 * SPLIT_SIZES["train"] + SPLIT_SIZES["val"]


def test_lookup_by_sample_and_view() -> None:
    table = FeatureTable(torch.tensor([3, 5, 9]), torch.arange(12.0).reshape(2, 3, 2))
    found = table(torch.tensor([9, 3, 9]), torch.tensor([0, 1, 3]))
    assert found.tolist() == [[4, 5], [6, 7], [10, 11]]


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(record.getMessage() for record in caplog.records)


def test_augmentation_without_views_is_trained_as_before_and_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        done = two_phases(tmp_path, FrozenFeatures(), AugmentOptions(horizontal_flip=0.5))
    assert not done.encoded
    assert messages(caplog).count("set features.n_views, or no augmentation") == 1


def test_part_of_an_epoch_is_trained_as_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        done = two_phases(tmp_path, FrozenFeatures(), limit_train_batches=2)
    assert not done.encoded
    assert "only part of an epoch" in messages(caplog)


@pytest.mark.parametrize(
    ("augment", "reason"),
    [({"mixup": 0.5}, "mixup and CutMix mix images"), ({"rotation": 5.0}, "set features.n_views")],
)
def test_always_where_it_is_impossible(tmp_path: Path, augment: AugmentOptions, reason: str) -> None:
    with pytest.raises(UserError, match=f"features.mode: always, but .*{reason}.*; or set features.mode: never"):
        two_phases(tmp_path, FrozenFeatures("always"), augment)


def test_features_that_do_not_fit_into_memory(
    tmp_path: Path, naive: Done, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("callbacks.finetuning.LARGEST_SHARE", 1e-9)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        assert_same(two_phases(tmp_path / "auto", FrozenFeatures(), precision="64-true"), naive, 0)
    assert "of the machine's" in messages(caplog)
    with pytest.raises(UserError, match=r"features of the training split need .* lower features.n_views"):
        two_phases(tmp_path / "always", FrozenFeatures("always"))


@pytest.mark.parametrize("wrong", [{"mode": "sometimes"}, {"n_views": -1}])
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="features"):
        FrozenFeatures(**wrong)


def test_the_order_of_callbacks_is_checked(tmp_path: Path) -> None:
    unfreezing = BackboneUnfreezing(1, lr=1e-3, backbone_lr=1e-3, head_lr=1e-3)
    with pytest.raises(UserError, match="put FrozenFeatures behind BackboneUnfreezing"):
        Done(tmp_path, Augmented(), tiny_task(), FrozenFeatures(), unfreezing)


class SavedAt(Callback):
    """Saves a checkpoint after some step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    @property
    def state_key(self) -> str:
        return str(self.step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    whole = two_phases(tmp_path, FrozenFeatures())
    steps = (3, 8, 17, 20)
    savers = [SavedAt(tmp_path / f"{step}.ckpt", step) for step in steps]
    unfreezing = BackboneUnfreezing(FROZEN, lr=3e-3, backbone_lr=1e-3, head_lr=2e-3)
    Done(tmp_path, Augmented(), tiny_task(), unfreezing, FrozenFeatures(), *savers)
    for step in steps:
        unfreezing = BackboneUnfreezing(FROZEN, lr=3e-3, backbone_lr=1e-3, head_lr=2e-3)
        again = tiny_trainer(tmp_path, max_epochs=EPOCHS, callbacks=[unfreezing, FrozenFeatures(), Noting()])
        torch.manual_seed(99)
        task = tiny_task()
        again.fit(task, datamodule=Augmented(), ckpt_path=tmp_path / f"{step}.ckpt", weights_only=True)
        for key, value in whole.task.state_dict().items():
            assert torch.equal(value, task.state_dict()[key]), (step, key)


class Captioned(MadePhotos):
    """Images with two captions each."""

    generated: ClassVar[bool] = True

    def load_table(self) -> SampleTable:
        splits = [split for split, size in SPLIT_SIZES.items() for _ in range(size)]
        rows = range(len(splits))
        frame = pd.DataFrame(
            {
                "name": [f"photo {row}" for row in rows],
                "source": [str(row) for row in rows],
                "split": splits,
                "caption": [[f"an image number {row}", f"another {row % 7}"] for row in rows],
            }
        )
        return SampleTable.from_frame(frame, [], origin="made")


def pairs(folder: Path, mode: Any, data: ImageDataModule, **changes: Any) -> tuple[Done, int]:
    """The training, and how often texts went through the text backbone."""
    task = tiny_pair(write_clip(folder / "clip", image_size=SIZE), **changes)
    calls = []
    task.towers.backbone("text").register_forward_hook(lambda *_: calls.append(1))
    return Done(folder, data, task, FrozenFeatures(mode)), len(calls)


@pytest.mark.parametrize("data", [Captioned, MadePhotos])
def test_projections_learn_the_same_from_features(tmp_path: Path, data: type[MadePhotos]) -> None:
    changes: dict[str, Any] = {"freeze": "towers", "class_names": None}
    if data is MadePhotos:
        names = data().class_names
        changes |= {"class_names": names, "class_prompts": [[f"a {name}"] for name in names]}
    once, calls_once = pairs(tmp_path / "once", "auto", data(), **changes)
    never, calls_never = pairs(tmp_path / "never", "never", data(), **changes)
    assert isinstance(once.task, DualEncoder)
    assert_same(once, never)
    # The texts of training and validation, each once.
    assert calls_once == 1
    assert calls_never > EPOCHS
    assert sum(once.encoded) == SPLIT_SIZES["train"] + SPLIT_SIZES["val"]


@pytest.mark.parametrize(("freeze", "sides"), [("vision_only", ["image"]), ("text_only", ["text"])])
def test_one_frozen_tower(tmp_path: Path, freeze: str, sides: list[str]) -> None:
    once, calls = pairs(tmp_path / "once", "auto", Captioned(), freeze=freeze, class_names=None)
    never, _ = pairs(tmp_path / "never", "never", Captioned(), freeze=freeze, class_names=None)
    assert_same(once, never)
    assert once.task.frozen_sides == sides
    assert (calls == 1) == (freeze == "text_only")
    if freeze == "vision_only":
        assert sum(once.encoded) == SPLIT_SIZES["train"] + SPLIT_SIZES["val"]


def test_a_network_that_learns_has_no_frozen_side() -> None:
    task = tiny_task().eval()
    assert task.frozen_sides == []
    task.freeze_backbone()
    assert task.frozen_sides == ["image"]
    task.encoder.backbone.train()
    assert task.frozen_sides == []
    assert isinstance(task.encoder.backbone, nn.Module)
