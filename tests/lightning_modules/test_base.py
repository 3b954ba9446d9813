from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.base import VisionTask
from lightning_modules.encoders import ImageEncoder
from lightning_modules.optim import TrainingPhase
from tests.lightning_modules.tiny import (
    SIZE,
    TinyData,
    make_batch,
    seeded_multitask,
    tiny_classifier,
    tiny_trainer,
)


class Recorder(pl.Callback):
    """What happens in a training, for looking at it afterwards."""

    def __init__(self) -> None:
        self.lrs: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.lrs.append(optimizer.param_groups[0]["lr"])


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, first), second in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(first, second), name


def test_a_run_in_two_parts_ends_as_one_that_was_never_interrupted(tmp_path: Path) -> None:
    keep_all = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    straight = seeded_multitask()
    tiny_trainer(tmp_path, max_epochs=4, callbacks=[keep_all], enable_checkpointing=True).fit(straight, TinyData())
    resumed = seeded_multitask()
    torch.rand(17)
    tiny_trainer(tmp_path, max_epochs=4).fit(resumed, TinyData(), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert_same_weights(straight, resumed)
    other_seed = seeded_multitask()
    pl.seed_everything(4)
    tiny_trainer(tmp_path, max_epochs=4).fit(other_seed, TinyData(), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    with pytest.raises(AssertionError):
        assert_same_weights(straight, other_seed)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_learning_rates_follow_the_phases_step_by_step(tmp_path: Path, accumulate: int) -> None:
    recorder, task = Recorder(), seeded_multitask()
    phases = [
        TrainingPhase(first_epoch=0, lr={"backbone": 1e-5, "head": 1e-3}, schedule="constant", warmup_epochs=1.0),
        TrainingPhase(first_epoch=2, lr={"backbone": 1e-4, "head": 1e-3}, schedule="step", step_size=1, gamma=0.1),
    ]
    task.phases = phases
    trainer = tiny_trainer(tmp_path, max_epochs=4, callbacks=[recorder], accumulate_grad_batches=accumulate)
    trainer.fit(task, TinyData())
    # Three batches an epoch make three steps, or two when two are accumulated.
    if accumulate == 1:
        expected = [1e-5 / 4, 2e-5 / 4, 3e-5 / 4] + [1e-5] * 3 + [1e-4] * 3 + [1e-5] * 3
    else:
        expected = [1e-5 / 3, 2e-5 / 3] + [1e-5] * 2 + [1e-4] * 2 + [1e-5] * 2
    assert recorder.lrs == pytest.approx(expected)


def test_lightnings_monitor_logs_the_learning_rate_of_the_step(tmp_path: Path) -> None:
    recorder, logger = Recorder(), CSVLogger(tmp_path)
    monitor = LearningRateMonitor("step")
    trainer = tiny_trainer(tmp_path, max_epochs=2, callbacks=[monitor, recorder], logger=logger, log_every_n_steps=1)
    task = seeded_multitask()
    trainer.fit(task, TinyData())
    [name] = [name for name in monitor.lrs if name.endswith(trainer.optimizers[0].param_groups[0]["name"])]
    assert name.startswith("lr-AdamW/backbone")
    assert monitor.lrs[name] == recorder.lrs
    assert len(set(recorder.lrs)) == 6
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        assert [float(row[name]) for row in csv.DictReader(file) if row[name]] == pytest.approx(recorder.lrs)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_learns_with_all_that_a_loss_may_have(tmp_path: Path, precision: Any) -> None:
    counts = {"class": [1, 2, 3, 4], "type": [2, 9]}
    task = seeded_multitask(class_counts=counts, class_weighting="inverse", label_smoothing=0.1)
    batch = make_batch([0, 1, 2, 3])
    batch["mix"] = {"partner": torch.tensor([3, 2, 1, 0]), "lam": torch.tensor([0.9, 0.8, 0.7, 0.6])}
    trainer = tiny_trainer(tmp_path, precision=precision, limit_val_batches=1)
    trainer.fit(task, DataLoader(cast("Any", [batch]), batch_size=None), TinyData().val_dataloader())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


def test_a_frozen_backbone_keeps_its_weights_and_statistics(tmp_path: Path) -> None:
    class Freeze(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.freeze_backbone()

    task = seeded_multitask()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    trainer = tiny_trainer(tmp_path, max_epochs=2, callbacks=[Freeze()])
    trainer.fit(task, TinyData())
    after = task.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("encoder."))
    assert not torch.equal(before["heads.0.0.weight"], after["heads.0.0.weight"])
    grouped = sum(len(group["params"]) for group in trainer.optimizers[0].param_groups)
    assert grouped == len(list(task.parameters()))


def test_freezing_is_undone_and_leaves_fixed_parameters_fixed() -> None:
    task = tiny_classifier()
    fixed = next(task.encoder.backbone.parameters())
    fixed.requires_grad_(False)
    task.freeze_backbone()
    task.train()
    assert task.backbone_frozen
    assert not any(module.training for module in task.encoder.backbone.modules())
    assert task.head.training
    assert not any(parameter.requires_grad for parameter in task.encoder.parameters())
    task.unfreeze_backbone()
    assert not task.backbone_frozen
    assert all(module.training for module in task.encoder.backbone.modules())
    assert [p for p in task.encoder.parameters() if not p.requires_grad] == [fixed]


def test_ema_averages_and_its_checkpoint_holds_the_average(tmp_path: Path) -> None:
    average = EMAWeightAveraging(decay=0.5)
    keep = ModelCheckpoint(tmp_path, filename="ema")
    task, plain = seeded_multitask(), seeded_multitask()
    trainer = tiny_trainer(tmp_path, max_epochs=2, callbacks=[average, keep], enable_checkpointing=True)
    trainer.fit(task, TinyData())
    tiny_trainer(tmp_path, max_epochs=2).fit(plain, TinyData())
    saved = torch.load(tmp_path / "ema.ckpt", weights_only=True)
    weight = "heads.0.0.weight"
    assert torch.equal(saved["state_dict"][weight], task.state_dict()[weight])
    assert torch.equal(saved["current_model_state"][weight], plain.state_dict()[weight])
    assert not torch.equal(saved["state_dict"][weight], plain.state_dict()[weight])


def test_ema_resumes_exactly(tmp_path: Path) -> None:
    def fit(root: Path, ckpt_path: str | None = None) -> VisionTask:
        callbacks = [EMAWeightAveraging(decay=0.5), ModelCheckpoint(root, filename="{epoch}", save_top_k=-1)]
        task = seeded_multitask()
        trainer = tiny_trainer(root, max_epochs=4, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(task, TinyData(), ckpt_path=ckpt_path)
        return task

    straight = fit(tmp_path / "a")
    assert_same_weights(straight, fit(tmp_path / "b", str(tmp_path / "a" / "epoch=1.ckpt")))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts what would go to the hub."""
    asked: list[str] = []
    monkeypatch.setattr(ImageEncoder, "load_pretrained", lambda encoder: asked.append(encoder.name))
    return asked


def test_pretrained_weights_are_fetched_when_training_begins(tmp_path: Path, loads: list[str]) -> None:
    task = seeded_multitask(pretrained=True)
    assert not loads
    tiny_trainer(tmp_path, fast_dev_run=True).fit(task, TinyData())
    assert len(loads) == 1


def test_what_a_checkpoint_replaces_is_never_fetched(tmp_path: Path, loads: list[str]) -> None:
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(seeded_multitask(), TinyData())
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    loads.clear()
    tiny_trainer(tmp_path, max_epochs=2).fit(seeded_multitask(pretrained=True), TinyData(), ckpt_path=str(path))
    tiny_trainer(tmp_path).test(seeded_multitask(pretrained=True), TinyData(), ckpt_path=str(path), verbose=False)
    tiny_trainer(tmp_path).predict(seeded_multitask(pretrained=True), TinyData(), ckpt_path=str(path))
    assert not loads


def test_differing_pictures_are_told_once_at_the_start(tmp_path: Path, loads: list[str]) -> None:
    def warned(**changes: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny_trainer(tmp_path, fast_dev_run=True).fit(seeded_multitask(**changes), TinyData())
        return [str(warning.message) for warning in caught if "data.image differs" in str(warning.message)]

    assert len(warned(pretrained=True)) == 1
    assert not warned(pretrained=False)


def test_a_checkpoint_remembers_how_pictures_were_made(tmp_path: Path) -> None:
    data = TinyData({"size": SIZE, "crop_fraction": 0.8, "interpolation": "bilinear"})
    trainer = tiny_trainer(tmp_path)
    trainer.fit(seeded_multitask(), data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = seeded_multitask()
    other.on_load_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=True))
    assert other.input_options == data.image_options


def test_a_classifier_needs_training_before_it_is_tested() -> None:
    assert not tiny_classifier().ready_without_training
