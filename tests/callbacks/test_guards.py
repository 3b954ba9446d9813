from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from callbacks import MonitoredMetrics, NonFiniteLoss
from tests.support.runs import MadePhotos, tiny_task, tiny_trainer
from vitrail.errors import UserError

BATCH = 4
STEPS = 6
"""Batches of an epoch: 24 images."""


class Spoil(Callback):
    """Makes some batches of one epoch infinite or not a number in front of all BatchNorm, and watches the weights."""

    def __init__(self, batches: tuple[int, ...], value: float = math.nan, epoch: int = 0) -> None:
        self.batches, self.value, self.epoch = batches, value, epoch
        self.seen: list[list[int]] = []
        self.states: list[dict[str, torch.Tensor]] = []
        self.moments: list[dict[str, torch.Tensor]] = []
        self.learning_rates: list[float] = []
        self._hook: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch["sample_id"].tolist())
        if trainer.current_epoch == self.epoch and batch_idx in self.batches:
            normalize = pl_module.get_submodule("encoder.normalize")
            self._hook = normalize.register_forward_hook(lambda module, inputs, output: output * self.value)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})
        state = trainer.optimizers[0].state_dict()["state"]
        self.moments.append({f"{key}/{name}": v.clone() for key, one in state.items() for name, v in one.items()})
        self.learning_rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(folder: Path, spoil: Spoil, *callbacks: Callback, **changes: Any) -> Trainer:
    trainer = tiny_trainer(folder, callbacks=[spoil, *callbacks], **changes)
    trainer.fit(tiny_task(), datamodule=MadePhotos(BATCH))
    return trainer


def written(folder: Path) -> dict[str, Any]:
    def refused(constant: str) -> None:
        raise AssertionError(constant)

    content: dict[str, Any] = json.loads((folder / "non_finite.json").read_text(), parse_constant=refused)
    return content


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_stop_names_the_samples_and_leaves_the_weights(tmp_path: Path, value: float) -> None:
    spoil = Spoil((2,), value)
    with pytest.raises(UserError, match=r"training loss is nan at epoch 0, batch 2; .*non_finite.json") as error:
        fit(tmp_path, spoil, NonFiniteLoss())
    assert "\n" not in str(error.value)
    [event] = written(tmp_path)["batches"]
    ids = spoil.seen[2]
    [process] = event.pop("processes")
    assert event == {"epoch": 0, "step": 2, "batch": 2, "action": "stopped"}
    assert process == {"rank": 0, "loss": "nan", "sample_id": ids, "name": [f"photo {index}" for index in ids]}
    assert len(spoil.states) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["non_finite.json"]


def test_nothing_is_written_where_all_is_well(tmp_path: Path) -> None:
    fit(tmp_path / "watched", watched := Spoil(()), NonFiniteLoss("skip"))
    fit(tmp_path / "alone", alone := Spoil(()))
    assert not (tmp_path / "watched" / "non_finite.json").exists()
    assert same(watched.states[-1], alone.states[-1])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("batch", [0, 3])
def test_a_skipped_step_moves_nothing_but_the_schedule(tmp_path: Path, precision: str, batch: int) -> None:
    spoil = Spoil((batch,))
    trainer = fit(tmp_path, spoil, NonFiniteLoss("skip"), precision=precision)
    begin = tiny_task().state_dict() if batch == 0 else spoil.states[batch - 1]
    assert same(spoil.states[batch], begin)
    assert same(spoil.moments[batch], {} if batch == 0 else spoil.moments[batch - 1])
    assert not same(spoil.states[batch + 1], begin)
    assert trainer.global_step == STEPS
    assert spoil.learning_rates[batch + 1] < spoil.learning_rates[batch]
    assert all(torch.isfinite(value).all() for value in spoil.states[-1].values())
    # The averages of the epoch and of validation know nothing of it.
    assert math.isfinite(trainer.callback_metrics["train/loss"])
    assert math.isfinite(trainer.callback_metrics["val/loss"])
    assert written(tmp_path)["skipped_steps"] == 1


def test_the_average_of_an_epoch_is_that_of_the_other_batches(tmp_path: Path) -> None:
    losses: list[torch.Tensor] = []

    class Keep(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            losses.append(outputs["loss"])

    changes = {"limit_train_batches": 3, "limit_val_batches": 0}
    trainer = tiny_trainer(tmp_path, callbacks=[Spoil((1,)), Keep(), NonFiniteLoss("skip")], **changes)
    # One task whose targets are all known, so that all batches weigh the same.
    task = tiny_task()
    task.task_weights = {"class": 1.0, "colour": 0.0}
    for split in (task.train_metrics, task.val_metrics):
        split.task_weights = task.task_weights
    trainer.fit(task, datamodule=MadePhotos(BATCH))
    assert math.isnan(losses[1])
    assert float(trainer.callback_metrics["train/class/loss"]) == pytest.approx(float(losses[0] + losses[2]) / 2)


def test_a_whole_window_of_accumulation_is_left_out(tmp_path: Path) -> None:
    spoil = Spoil((3,))
    trainer = fit(tmp_path, spoil, NonFiniteLoss("skip"), accumulate_grad_batches=3)
    parameters = dict(tiny_task().named_parameters())
    assert trainer.global_step == 2
    # The second window, with batches 3 to 5, changes nothing, statistics included, although two of them were good.
    assert same(spoil.states[5], spoil.states[2])
    assert not all(torch.equal(spoil.states[2][name], value) for name, value in parameters.items())
    assert [event["batch"] for event in written(tmp_path)["batches"]] == [3]


def test_two_bad_batches_of_one_step_count_as_one(tmp_path: Path) -> None:
    fit(tmp_path, Spoil((0, 1, 2)), NonFiniteLoss("skip", max_skipped=1), accumulate_grad_batches=3)
    content = written(tmp_path)
    assert content["skipped_steps"] == 1
    assert [event["batch"] for event in content["batches"]] == [0, 1, 2]


def test_one_more_than_allowed_stops(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch 4 after 2 steps were left out"):
        fit(tmp_path, Spoil((1, 3, 4)), NonFiniteLoss("skip", max_skipped=2))
    content = written(tmp_path)
    assert content["skipped_steps"] == 2
    assert [event["action"] for event in content["batches"]] == ["skipped", "skipped", "stopped"]


def test_averaged_weights_pass_by_a_skipped_step(tmp_path: Path) -> None:
    averages: list[dict[str, torch.Tensor]] = []

    class Watch(EMAWeightAveraging):
        def on_train_batch_end(self, *arguments: Any, **named: Any) -> None:
            super().on_train_batch_end(*arguments, **named)
            assert self._average_model is not None
            averages.append({name: value.clone() for name, value in self._average_model.state_dict().items()})

    fit(tmp_path, Spoil((3,)), NonFiniteLoss("skip"), Watch(decay=0.5))
    assert same(averages[3], averages[2])
    assert not same(averages[4], averages[3])


def test_the_count_goes_on_after_a_resume(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Spoil((1, 2)), NonFiniteLoss("skip", max_skipped=2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = tiny_trainer(
        tmp_path / "resumed",
        max_epochs=2,
        callbacks=[Spoil((0,), epoch=1), NonFiniteLoss("skip", max_skipped=2)],
    )
    with pytest.raises(UserError, match="epoch 1, batch 0 after 2 steps"):
        resumed.fit(tiny_task(), datamodule=MadePhotos(BATCH), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("arguments", [{"action": "ignore"}, {"action": "skip", "max_skipped": 0}])
def test_values_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="non_finite"):
        NonFiniteLoss(**arguments)


def watch(folder: Path, saver: ModelCheckpoint, **options: object) -> Trainer:
    trainer = tiny_trainer(
        folder, enable_checkpointing=True, callbacks=[MonitoredMetrics(), saver], max_epochs=2, **options
    )
    trainer.fit(tiny_task(), datamodule=MadePhotos())
    return trainer


def test_a_monitored_metric_that_does_not_exist_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ModelCheckpoint\.monitor: there is no metric 'val/los'; .* val/loss"):
        watch(tmp_path, ModelCheckpoint(tmp_path, monitor="val/los"))
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("monitor", ["val/loss", "train/loss", None])
def test_a_monitored_metric_that_exists_is_accepted(tmp_path: Path, monitor: str | None) -> None:
    saver = ModelCheckpoint(tmp_path, monitor=monitor)
    watch(tmp_path, saver)
    assert Path(saver.best_model_path).exists()
