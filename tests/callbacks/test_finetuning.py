from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.lr_scheduler import CosineAnnealingLR

from callbacks import BackboneUnfreezing, StartWeights
from datamodules.options import AugmentOptions
from lightning_modules.base import VisionTask
from lightning_modules.classification import ImageClassifier
from lightning_modules.options import FinetuningPhase
from tests.support.runs import TASKS, MadePhotos, tiny_task, tiny_trainer
from vitrail.errors import UserError

EPOCHS, UNFREEZE, STEPS = 4, 2, 6  # epochs, first epoch of phase two, steps an epoch
CHECKPOINTS = [
    "step2",  # in phase one, in the middle of an epoch
    "val0",  # in phase one, after the epoch's validation
    "end0",
    "step11",  # the last step but one of phase one
    "step12",  # exactly at the boundary, before the validation
    "val1",
    "end1",
    "step13",  # the first step of phase two is done
    "step15",
    "val2",
    "end2",
]
LR, BACKBONE_LR, HEAD_LR, MIN_LR = 3e-3, 1e-3, 2e-3, 1e-6


def unfreezing(unfreeze_epoch: int = UNFREEZE, **changes: Any) -> BackboneUnfreezing:
    arguments: dict[str, Any] = {"lr": LR, "backbone_lr": BACKBONE_LR, "head_lr": HEAD_LR, "min_lr": MIN_LR}
    return BackboneUnfreezing(unfreeze_epoch, **{**arguments, **changes})


class Recorder(Callback):
    """Notes learning rates before each step, and the weights at the beginning and end of each epoch."""

    def __init__(self) -> None:
        self.lr: dict[str, list[float]] = {"backbone": [], "head": []}
        self.weights: list[dict[str, torch.Tensor]] = []
        self.frozen: list[bool] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights.append(copy.deepcopy(pl_module.state_dict()))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for part, rates in self.lr.items():
            rates.extend({group["lr"] for group in optimizer.param_groups if group["part"] == part})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VisionTask)
        self.weights.append(copy.deepcopy(pl_module.state_dict()))
        self.frozen.append(pl_module.backbone_frozen)


class Saver(Callback):
    """Saves wherever ``ModelCheckpoint`` may: after a step, after a validation, at the end of an epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._save(trainer, f"step{trainer.global_step}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, f"val{trainer.current_epoch}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, f"end{trainer.current_epoch}")

    def _save(self, trainer: Trainer, name: str) -> None:
        if name in CHECKPOINTS:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")


class Finished:
    """An undisturbed run with a checkpoint after every step, after every validation and after every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recorder = Recorder()
        self.task = tiny_task()
        trainer = tiny_trainer(folder, max_epochs=EPOCHS, callbacks=[unfreezing(), self.recorder, Saver(folder)])
        trainer.fit(self.task, datamodule=MadePhotos())
        self.optimizer = trainer.optimizers[0].state_dict()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("finished"))


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All leaves of nested dicts and lists."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from tensors(item, f"{path}/{place}")
    else:
        yield path, value


def assert_bit_identical(left: Any, right: Any) -> None:
    left_leaves, right_leaves = dict(tensors(left)), dict(tensors(right))
    assert left_leaves.keys() == right_leaves.keys()
    for path, value in left_leaves.items():
        same = torch.equal(value, right_leaves[path]) if torch.is_tensor(value) else value == right_leaves[path]
        assert same, path


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_resumed_run_ends_bit_identical(finished: Finished, tmp_path: Path, checkpoint: str) -> None:
    torch.manual_seed(12345)
    task = tiny_task()
    trainer = tiny_trainer(tmp_path, max_epochs=EPOCHS, callbacks=[unfreezing()])
    trainer.fit(task, datamodule=MadePhotos(), ckpt_path=finished.folder / f"{checkpoint}.ckpt", weights_only=True)
    assert trainer.global_step == EPOCHS * STEPS
    assert_bit_identical(finished.task.state_dict(), task.state_dict())
    assert_bit_identical(finished.optimizer, trainer.optimizers[0].state_dict())


def backbone_entries(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    entries = {key: value for key, value in weights.items() if key.startswith("encoder.backbone.")}
    assert any("running_mean" in key for key in entries)
    return entries


def test_phase_one_leaves_the_backbone_and_its_batch_norm_alone(finished: Finished) -> None:
    before, after_one = finished.recorder.weights[0], finished.recorder.weights[UNFREEZE]
    assert_bit_identical(backbone_entries(before), backbone_entries(after_one))
    heads = [key for key in before if key.startswith("heads.")]
    assert heads
    assert all(not torch.equal(before[key], after_one[key]) for key in heads)


def test_phase_two_trains_everything(finished: Finished) -> None:
    after_one = backbone_entries(finished.recorder.weights[UNFREEZE])
    after_two = backbone_entries(finished.recorder.weights[EPOCHS])
    unchanged = [key for key in after_one if torch.equal(after_one[key], after_two[key])]
    assert unchanged == []
    assert finished.recorder.frozen == [True, True, False, False]


def test_fixed_batch_norm_keeps_its_statistics_in_both_phases(tmp_path: Path) -> None:
    task, recorder = tiny_task(), Recorder()
    trainer = tiny_trainer(tmp_path, max_epochs=EPOCHS, callbacks=[unfreezing(fixed_batchnorm=True), recorder])
    trainer.fit(task, datamodule=MadePhotos())
    before, after = backbone_entries(recorder.weights[0]), backbone_entries(recorder.weights[EPOCHS])
    statistics = {key for key in before if "running_" in key or "num_batches" in key}
    assert {key for key in before if torch.equal(before[key], after[key])} == statistics


def torch_cosine(highest: float, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=highest)
    scheduler = CosineAnnealingLR(optimizer, T_max=steps, eta_min=MIN_LR)
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


def test_each_phase_has_a_cosine_of_its_own(finished: Finished) -> None:
    one, two = UNFREEZE * STEPS, (EPOCHS - UNFREEZE) * STEPS
    assert finished.recorder.lr["head"] == pytest.approx([*torch_cosine(LR, one), *torch_cosine(HEAD_LR, two)])
    assert finished.recorder.lr["backbone"] == pytest.approx([*[0.0] * one, *torch_cosine(BACKBONE_LR, two)])


def test_warmup_begins_each_phase(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = tiny_trainer(
        tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[unfreezing(1, warmup_epochs=0.5), recorder]
    )
    trainer.fit(tiny_task(), datamodule=MadePhotos())
    head = recorder.lr["head"]
    assert head[0] < head[1] < head[2] < head[3] == pytest.approx(LR)
    assert head[6] < head[7] < head[8] < head[9] == pytest.approx(HEAD_LR)
    assert recorder.lr["backbone"][9] == pytest.approx(BACKBONE_LR)


def test_optimizer_groups_never_change(finished: Finished) -> None:
    first = torch.load(finished.folder / "step2.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    last = finished.optimizer["param_groups"]
    assert [group["params"] for group in first] == [group["params"] for group in last]
    assert [group["name"] for group in first] == [group["name"] for group in last]


def test_task_that_was_frozen_before_is_wrapped_unfrozen(tmp_path: Path) -> None:
    task = tiny_task()
    task.freeze_backbone()
    required: list[bool] = []

    class AtFitStart(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            required.extend(parameter.requires_grad for parameter in pl_module.parameters())

    trainer = tiny_trainer(
        tmp_path, max_epochs=2, limit_train_batches=1, limit_val_batches=0, callbacks=[unfreezing(1), AtFitStart()]
    )
    trainer.fit(task, datamodule=MadePhotos())
    assert all(required)
    assert not task.backbone_frozen


@pytest.mark.parametrize("unfreeze_epoch", [2, 3])
def test_phase_two_must_begin_before_the_end(tmp_path: Path, unfreeze_epoch: int) -> None:
    trainer = tiny_trainer(tmp_path, max_epochs=2, callbacks=[unfreezing(unfreeze_epoch)])
    with pytest.raises(UserError, match=rf"begin at epoch {unfreeze_epoch}, but training ends after 2 epochs"):
        trainer.fit(tiny_task(), datamodule=MadePhotos())


def test_smoke_test_needs_no_second_phase(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, fast_dev_run=True, callbacks=[unfreezing(8)])
    trainer.fit(tiny_task(), datamodule=MadePhotos())
    assert trainer.global_step == 1


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="unfreeze_epoch: must be at least 1"):
        unfreezing(0)
    with pytest.raises(UserError, match=r"head_lr: must be greater than or equal to 0; got -1"):
        unfreezing(1, lr=-1.0)
    with pytest.raises(UserError, match="head_lr: is missing"):
        BackboneUnfreezing(1, lr=1e-3, backbone_lr=1e-3)
    with pytest.raises(UserError, match="lr: does not go with phases"):
        BackboneUnfreezing(lr=1e-3, phases=[FinetuningPhase(1e-3)])
    with pytest.raises(UserError, match=r"phases\[0\].epochs: all but the last phase need it"):
        BackboneUnfreezing(phases=[FinetuningPhase(1e-3), FinetuningPhase(1e-3)])
    with pytest.raises(UserError, match=r"phases\[0\].epochs: the last phase lasts"):
        BackboneUnfreezing(phases=[FinetuningPhase(1e-3, epochs=2)])
    with pytest.raises(UserError, match="there is none"):
        BackboneUnfreezing(phases=[])


def phases() -> BackboneUnfreezing:
    """Heads, everything, heads once more, by an own schedule."""
    return BackboneUnfreezing(
        phases=[
            FinetuningPhase(LR, epochs=1),
            FinetuningPhase(HEAD_LR, BACKBONE_LR, epochs=1, min_lr=BACKBONE_LR / 10),
            FinetuningPhase(1e-3, schedule="polynomial"),
        ],
        min_lr=MIN_LR,
    )


def test_any_number_of_phases_freezes_and_trains_and_resumes_exactly_in_each(tmp_path: Path) -> None:
    def trainer(*callbacks: Callback) -> Trainer:
        return tiny_trainer(tmp_path, max_epochs=3, callbacks=[phases(), *callbacks])

    recorder, task = Recorder(), tiny_task()
    whole = trainer(recorder, Saver(tmp_path))
    whole.fit(task, datamodule=MadePhotos())
    assert recorder.frozen == [True, False, True]
    assert recorder.lr["backbone"][6:12] != [0.0] * 6
    assert recorder.lr["backbone"][:6] == recorder.lr["backbone"][12:] == [0.0] * 6
    assert recorder.lr["head"][12:] == pytest.approx([1e-3 + (MIN_LR - 1e-3) * step / 6 for step in range(6)])
    for checkpoint in ("step2", "end1"):
        resumed, again = tiny_task(), trainer()
        again.fit(resumed, datamodule=MadePhotos(), ckpt_path=tmp_path / f"{checkpoint}.ckpt")
        assert_bit_identical(resumed.state_dict(), task.state_dict())
        assert_bit_identical(again.optimizers[0].state_dict(), whole.optimizers[0].state_dict())


class Plain(LightningModule):
    """A task without parts."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.head(torch.ones(1, 1)).sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_task_without_parts_is_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, max_epochs=2, callbacks=[unfreezing(1)])
    with pytest.raises(UserError, match="Plain has no backbone"):
        trainer.fit(Plain(), datamodule=MadePhotos())


def test_optimizer_without_parts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task()
    monkeypatch.setattr(task, "configure_optimizers", lambda: torch.optim.SGD(task.parameters(), lr=0.1))
    monkeypatch.setattr(task, "set_learning_rates", lambda: None)
    trainer = tiny_trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[unfreezing(1)])
    with pytest.raises(UserError, match="no parameter groups of the parts backbone and head"):
        trainer.fit(task, datamodule=MadePhotos())


def start(root: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(root / "checkpoints" / "start.ckpt", weights_only=True)["state_dict"]
    return weights


def test_the_weights_before_the_first_step_are_kept(tmp_path: Path) -> None:
    task = tiny_task()
    begin = {name: value.clone() for name, value in task.state_dict().items()}
    tiny_trainer(tmp_path, callbacks=[StartWeights()]).fit(task, MadePhotos())
    kept = start(tmp_path)
    assert all(torch.equal(kept[name], value) for name, value in begin.items() if "metrics" not in name)


def test_a_resumed_run_keeps_those_it_has(tmp_path: Path) -> None:
    first = tiny_trainer(tmp_path, callbacks=[StartWeights()])
    first.fit(tiny_task(), MadePhotos())
    first.save_checkpoint(tmp_path / "last.ckpt")
    before = start(tmp_path)
    resumed = tiny_trainer(tmp_path, callbacks=[StartWeights()], max_epochs=2)
    resumed.fit(tiny_task(), MadePhotos(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert all(torch.equal(value, start(tmp_path)[name]) for name, value in before.items())


class Growing(MadePhotos):
    """Images of 16 px in the first epoch, of 24 px in the second, mixed on the device."""

    def __init__(self, **augment: Any) -> None:
        super().__init__()
        self._augment = AugmentOptions(sizes=[[0, 16], [1, 24]], **augment)


class Sides(Callback):
    """Notes the sides of training and validation images, and saves in the second epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.training, self.validation = folder, list[int](), set[int]()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert "pending" not in batch["mix"]
        self.training.append(batch["image"].shape[-1])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == STEPS + 2:
            trainer.save_checkpoint(self.folder / "second.ckpt")

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        self.validation.add(batch["image"].shape[-1])


def test_images_that_grow_and_are_mixed_on_the_device_resume_exactly(tmp_path: Path) -> None:
    def run(checkpoint: Path | None = None, **augment: Any) -> tuple[VisionTask, Sides]:
        task, sides = tiny_task(), Sides(tmp_path)
        trainer = tiny_trainer(tmp_path, max_epochs=2, callbacks=[sides])
        trainer.fit(task, datamodule=Growing(mixup=0.5, cutmix=0.5, **augment), ckpt_path=checkpoint)
        return task, sides

    whole, sides = run(mix_on_device=True)
    assert sides.training == [16] * STEPS + [24] * STEPS
    assert sides.validation == {32}
    resumed, rest = run(tmp_path / "second.ckpt", mix_on_device=True)
    assert rest.training == [24] * (STEPS - 2)
    assert_bit_identical(resumed.state_dict(), whole.state_dict())
    assert_bit_identical(run()[0].state_dict(), whole.state_dict())  # mixed in the loader


def test_a_network_of_one_size_is_refused_for_growing_images(tmp_path: Path) -> None:
    task = ImageClassifier("test_vit", TASKS["class"], pretrained=False, image_size=32)
    with pytest.raises(UserError, match=r"data augment.sizes: test_vit cannot take images of 24 px"):
        tiny_trainer(tmp_path, max_epochs=1).fit(task, datamodule=Growing())
