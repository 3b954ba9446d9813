from __future__ import annotations

import csv
import inspect
import math
import warnings
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

import lightning_modules
from lightning_modules.base import VisionTask, weights_digest
from lightning_modules.encoders.image import ImageEncoder
from lightning_modules.optim import TrainingPhase
from lightning_modules.options import LossOptions
from tests.support.models import (
    SIZE,
    Recorder,
    TinyData,
    make_batch,
    same_weights,
    seeded_multitask,
    tiny_classifier,
    tiny_trainer,
)
from vitrail.errors import UserError
from vitrail.types import TaskFacts


def test_a_run_in_two_parts_ends_as_one_that_was_never_interrupted(tmp_path: Path) -> None:
    keep_all = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    straight = seeded_multitask()
    tiny_trainer(tmp_path, max_epochs=4, callbacks=[keep_all], enable_checkpointing=True).fit(straight, TinyData())
    resumed = seeded_multitask()
    torch.rand(17)
    tiny_trainer(tmp_path, max_epochs=4).fit(resumed, TinyData(), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert same_weights(straight, resumed)
    other_seed = seeded_multitask()
    pl.seed_everything(4)
    tiny_trainer(tmp_path, max_epochs=4).fit(other_seed, TinyData(), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert not same_weights(straight, other_seed)


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
    assert [lrs[0] for lrs in recorder.lrs] == pytest.approx(expected)


def test_lightnings_monitor_logs_the_learning_rate_of_the_step(tmp_path: Path) -> None:
    recorder, logger = Recorder(), CSVLogger(tmp_path)
    monitor = LearningRateMonitor("step")
    trainer = tiny_trainer(tmp_path, max_epochs=2, callbacks=[monitor, recorder], logger=logger, log_every_n_steps=1)
    task = seeded_multitask()
    trainer.fit(task, TinyData())
    [name] = [name for name in monitor.lrs if name.endswith(trainer.optimizers[0].param_groups[0]["name"])]
    assert name.startswith("lr-AdamW/backbone")
    lrs = [lrs[0] for lrs in recorder.lrs]
    assert monitor.lrs[name] == lrs
    assert len(set(lrs)) == 6
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        assert [float(row[name]) for row in csv.DictReader(file) if row[name]] == pytest.approx(lrs)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains_with_every_option_of_the_loss(tmp_path: Path, precision: Any) -> None:
    counts = {"class": [1, 2, 3, 4], "type": [2, 9]}
    losses = LossOptions(class_weighting="inverse", label_smoothing=0.1)
    task = seeded_multitask(task_facts=TaskFacts(class_counts=counts), loss_options=losses)
    batch = make_batch([0, 1, 2, 3])
    batch["mix"] = {"partner": torch.tensor([3, 2, 1, 0]), "lam": torch.tensor([0.9, 0.8, 0.7, 0.6])}
    trainer = tiny_trainer(tmp_path, precision=precision, limit_val_batches=1)
    trainer.fit(task, DataLoader(cast("Any", [batch]), batch_size=None), TinyData().val_dataloader())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert torch.isfinite(trainer.callback_metrics["val/loss"])


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_weight_decay_must_be_a_number_that_is_not_negative(value: float) -> None:
    with pytest.raises(UserError, match=f"^weight_decay: must be a number that is not negative; got {value}"):
        tiny_classifier(weight_decay=value)


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
    assert not task.ready_without_training
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


def test_ema_resumes_exactly_and_its_checkpoint_contains_the_average(tmp_path: Path) -> None:
    def fit(root: Path, *callbacks: pl.Callback, ckpt_path: str | None = None) -> VisionTask:
        task = seeded_multitask()
        keep_all = ModelCheckpoint(root, filename="{epoch}", save_top_k=-1)
        trainer = tiny_trainer(root, max_epochs=4, callbacks=[*callbacks, keep_all], enable_checkpointing=True)
        trainer.fit(task, TinyData(), ckpt_path=ckpt_path)
        return task

    average, plain = fit(tmp_path / "a", EMAWeightAveraging(decay=0.5)), fit(tmp_path / "plain")
    saved = torch.load(tmp_path / "a" / "epoch=3.ckpt", weights_only=True)
    weight = "heads.0.0.weight"
    assert torch.equal(saved["state_dict"][weight], average.state_dict()[weight])
    assert torch.equal(saved["current_model_state"][weight], plain.state_dict()[weight])
    assert not torch.equal(saved["state_dict"][weight], plain.state_dict()[weight])
    resumed = fit(tmp_path / "b", EMAWeightAveraging(decay=0.5), ckpt_path=str(tmp_path / "a" / "epoch=1.ckpt"))
    assert same_weights(average, resumed)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []
    monkeypatch.setattr(ImageEncoder, "load_pretrained", lambda encoder: asked.append(encoder.name))
    return asked


def test_pretrained_weights_are_fetched_when_training_begins_unless_a_checkpoint_replaces_them(
    tmp_path: Path, loads: list[str]
) -> None:
    task, trainer = seeded_multitask(pretrained=True), tiny_trainer(tmp_path)
    assert not loads
    trainer.fit(task, TinyData())
    assert len(loads) == 1
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    loads.clear()
    tiny_trainer(tmp_path, max_epochs=2).fit(seeded_multitask(pretrained=True), TinyData(), ckpt_path=str(path))
    tiny_trainer(tmp_path).test(seeded_multitask(pretrained=True), TinyData(), ckpt_path=str(path), verbose=False)
    tiny_trainer(tmp_path).predict(seeded_multitask(pretrained=True), TinyData(), ckpt_path=str(path))
    assert not loads


def test_differing_images_give_one_warning_at_the_start(tmp_path: Path, loads: list[str]) -> None:
    def warned(**changes: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny_trainer(tmp_path, fast_dev_run=True).fit(seeded_multitask(**changes), TinyData())
        return [str(warning.message) for warning in caught if "data.image differs" in str(warning.message)]

    assert len(warned(pretrained=True)) == 1
    assert not warned(pretrained=False)


def test_a_checkpoint_remembers_how_images_were_made(tmp_path: Path) -> None:
    data = TinyData({"size": SIZE, "crop_fraction": 0.8, "interpolation": "bilinear"})
    trainer = tiny_trainer(tmp_path)
    trainer.fit(seeded_multitask(), data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = seeded_multitask()
    other.on_load_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=True))
    assert other.input_options == data.image_options


def gradients_of(folder: Path, batches: list[list[int]], *callbacks: pl.Callback, **options: Any) -> list[torch.Tensor]:
    """Gradients of the steps of an epoch without BatchNorm statistics, dropout and weight updates."""

    class Data(TinyData):
        def train_dataloader(self) -> DataLoader[Any]:
            return self._loader([make_batch(ids) for ids in batches])

    task = seeded_multitask(lr=0.0, weight_decay=0.0)
    task.fix_batchnorm()
    for module in task.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    recorder = Recorder()
    tiny_trainer(folder, callbacks=[*callbacks, recorder], limit_val_batches=0, **options).fit(task, Data())
    return [torch.cat([gradient.flatten() for gradient in step.values()]) for step in recorder.gradients]


def joined(batches: list[list[int]]) -> list[int]:
    return [sample for batch in batches for sample in batch]


# The second target is unknown for every third sample, which are left out.
FULL = [[1, 2, 4, 5], [7, 8, 10, 11], [13, 14, 16, 17], [19, 20, 22, 23]]


@pytest.mark.parametrize(
    ("batches", "options", "steps"),
    [
        (FULL, {"accumulate_grad_batches": 3}, [joined(FULL[:3]), FULL[3]]),
        (FULL, {"accumulate_grad_batches": 8}, [joined(FULL)]),
        (FULL, {"accumulate_grad_batches": 2}, [joined(FULL[:2]), joined(FULL[2:])]),
        (FULL, {"accumulate_grad_batches": 2, "limit_train_batches": 3}, [joined(FULL[:2]), FULL[2]]),
        # A smaller batch weighs by its samples, alone and with others.
        ([*FULL[:2], [13, 14]], {"accumulate_grad_batches": 2}, [joined(FULL[:2]), [13, 14]]),
        ([*FULL[:2], [13, 14]], {"accumulate_grad_batches": 3}, [[*joined(FULL[:2]), 13, 14]]),
    ],
)  # fmt: skip
def test_a_step_has_the_gradient_of_all_its_samples_at_once(
    tmp_path: Path, batches: list[list[int]], options: dict[str, Any], steps: list[list[int]]
) -> None:
    found = gradients_of(tmp_path, batches, **options)
    expected = gradients_of(tmp_path, steps)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_accumulation_that_changes_from_epoch_to_epoch(tmp_path: Path) -> None:
    scheduler = GradientAccumulationScheduler({0: 1, 1: 3})
    found = gradients_of(tmp_path, FULL, scheduler, max_epochs=2)
    expected = [*gradients_of(tmp_path, FULL), *gradients_of(tmp_path, [joined(FULL[:3]), FULL[3]])]
    assert len(found) == len(expected) == 6
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [{"max_epochs": 4}, {"max_epochs": 4, "max_steps": 8}])
def test_a_schedule_follows_the_epochs_where_accumulation_changes(tmp_path: Path, limit: dict[str, int]) -> None:
    recorder, task = Recorder(), seeded_multitask()
    task.phases = [TrainingPhase(0, {"backbone": 1.0, "head": 1.0}, schedule="cosine")]
    callbacks = [GradientAccumulationScheduler({0: 1, 2: 3}), recorder]
    tiny_trainer(tmp_path, callbacks=callbacks, limit_val_batches=0, **limit).fit(task, TinyData())
    # Three steps an epoch, and from the third epoch on one; after eight steps the four epochs are done as well.
    progress = [0, 1 / 12, 2 / 12, 3 / 12, 4 / 12, 5 / 12, 2 / 4, 3 / 4]
    lrs = [lrs[0] for lrs in recorder.lrs]
    assert lrs == pytest.approx([(1 + math.cos(math.pi * done)) / 2 for done in progress])


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_the_digest_depends_on_every_value_dtype_and_shape() -> None:
    second = network(1)
    second.load_state_dict(network().state_dict())
    assert weights_digest(network()) == weights_digest(second)
    digests = {weights_digest(network()), weights_digest(network(1)), weights_digest(network().half())}
    nudged, counted, flat, square = network(), network(), nn.Module(), nn.Module()
    with torch.no_grad():
        weight = next(nudged.parameters())
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    dict(counted.named_buffers())["1.running_mean"].add_(1)
    flat.register_buffer("x", torch.zeros(4))
    square.register_buffer("x", torch.zeros(2, 2))
    digests |= {weights_digest(module) for module in (nudged, counted, flat, square)}
    assert len(digests) == 7
    assert {len(digest) for digest in digests} == {64}


@pytest.mark.parametrize(("name", "most"), [("ImageClassifier", 14), ("MultiTaskClassifier", 14), ("DualEncoder", 17)])
def test_tasks_group_their_arguments_and_take_none_unnamed(name: str, most: int) -> None:
    parameters = inspect.signature(getattr(lightning_modules, name)).parameters.values()
    assert len(parameters) <= most
    assert not any(p.kind in {p.VAR_POSITIONAL, p.VAR_KEYWORD} for p in parameters)
