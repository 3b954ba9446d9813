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
from tests.support.models import SIZE, TinyData, make_batch, seeded_multitask, tiny_classifier, tiny_trainer
from vitrail.errors import UserError


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


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_weight_decay_that_makes_weights_grow_is_refused(value: float) -> None:
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


def test_a_classifier_needs_training_before_it_is_tested() -> None:
    assert not tiny_classifier().ready_without_training


class Gradients(pl.Callback):
    """The gradient that each optimizer step is made with, as callbacks see it."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        self.steps.append(torch.cat(gradients).clone())


def gradients_of(folder: Path, batches: list[list[int]], *callbacks: pl.Callback, **options: Any) -> list[torch.Tensor]:
    """Gradients of an epoch over batches of these samples, which see nothing of each other, with weights that rest."""

    class Data(TinyData):
        def train_dataloader(self) -> DataLoader[Any]:
            return self._loader([make_batch(ids) for ids in batches])

    task = seeded_multitask(lr=0.0, weight_decay=0.0)
    task.fix_batchnorm()
    for module in task.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found = Gradients()
    tiny_trainer(folder, callbacks=[*callbacks, found], limit_val_batches=0, **options).fit(task, Data())
    return found.steps


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
    assert recorder.lrs == pytest.approx([(1 + math.cos(math.pi * done)) / 2 for done in progress])


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_same_weights_have_the_same_name() -> None:
    first, second = network(), network(1)
    assert weights_digest(first) == weights_digest(network())
    assert weights_digest(first) != weights_digest(second)
    second.load_state_dict(first.state_dict())
    assert weights_digest(first) == weights_digest(second)
    assert len(weights_digest(first)) == 64


def test_one_bit_a_type_a_shape_and_a_buffer_count() -> None:
    digests = {weights_digest(network()), weights_digest(network().half())}
    nudged = network()
    with torch.no_grad():
        weight = next(nudged.parameters())
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    digests.add(weights_digest(nudged))
    counted = network()
    dict(counted.named_buffers())["1.running_mean"].add_(1)
    digests.add(weights_digest(counted))
    flat = nn.Module()
    flat.register_buffer("x", torch.zeros(4))
    square = nn.Module()
    square.register_buffer("x", torch.zeros(2, 2))
    digests |= {weights_digest(flat), weights_digest(square)}
    assert len(digests) == 6


def test_all_names_can_be_had() -> None:
    for name in lightning_modules.__all__:
        assert getattr(lightning_modules, name).__name__ == name
    assert dir(lightning_modules) == sorted(lightning_modules.__all__)


def test_other_names_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = lightning_modules.nothing


def test_tasks_take_no_more_than_twelve_arguments_and_none_unnamed() -> None:
    for name in ("ImageClassifier", "MultiTaskClassifier"):
        task = getattr(lightning_modules, name)
        assert issubclass(task, VisionTask)
        parameters = inspect.signature(task).parameters.values()
        assert len(parameters) <= 12
        assert not any(p.kind in {p.VAR_POSITIONAL, p.VAR_KEYWORD} for p in parameters)
