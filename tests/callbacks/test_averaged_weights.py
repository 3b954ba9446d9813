"""Averages of frozen weights, of counters, and of tasks whose checkpoints leave weights out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging

from callbacks import AveragedWeights, BackboneUnfreezing, LastCheckpoint, StartWeights
from callbacks.averaged_weights import EmaOptions
from tests.support.runs import MadePhotos, tiny_task, tiny_trainer


def test_frozen_weights_and_statistics_of_pixels_stay_what_they_are(tmp_path: Path) -> None:
    task = tiny_task()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    unfreezing = BackboneUnfreezing(50, lr=0.1, backbone_lr=0.1, head_lr=0.1)
    # 60 updates: torch's own formula has moved them by then.
    callbacks = [LastCheckpoint(), AveragedWeights(), EmaOptions(decay=0.9).callback(), unfreezing]
    trainer = tiny_trainer(tmp_path, max_epochs=51, max_steps=60, callbacks=callbacks, limit_val_batches=0)
    trainer.fit(task, MadePhotos(batch_size=12))
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in before.items():
        if name.startswith("encoder."):
            assert torch.equal(saved[name], value), name
        elif name.startswith("heads."):
            assert not torch.equal(saved[name], value), name


class EveryOther(WeightAveraging):
    """A user's own average: the mean of every other step's weights, from the fourth step on."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx >= 3 and step_idx % 2 == 1


@pytest.mark.parametrize("average", [EmaOptions(decay=0.5, start_step=3, every_n_steps=3).callback, EveryOther])
def test_the_weights_of_the_start_are_those_before_training(tmp_path: Path, average: Any) -> None:
    task = tiny_task()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    callbacks = [LastCheckpoint(), AveragedWeights(), average(), StartWeights()]
    # Made after the callback's copy, as weights are that are fetched when training begins.
    task.on_fit_start = lambda: task.load_state_dict({k: v * 0 for k, v in before.items()})  # type: ignore[method-assign]
    trainer = tiny_trainer(tmp_path, callbacks=callbacks, max_steps=2)
    trainer.fit(task, MadePhotos())
    saved = torch.load(tmp_path / "checkpoints" / "start.ckpt", weights_only=True)["state_dict"]
    assert all(not value.any() for value in saved.values())


def test_a_network_that_is_made_after_the_copy_is_averaged_too(tmp_path: Path) -> None:
    task = tiny_task()
    average = EmaOptions(decay=0.5).callback()

    def make_more() -> None:
        task.late = torch.nn.Linear(2, 2)

    task.on_fit_start = make_more  # type: ignore[method-assign]  # as tasks do that load what a checkpoint leaves out
    callbacks = [LastCheckpoint(), AveragedWeights(), average]
    tiny_trainer(tmp_path, callbacks=callbacks).fit(task, MadePhotos())
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["late.weight"], task.state_dict()["late.weight"])


def test_the_average_is_kept_where_the_network_is_and_its_count_on_the_cpu(tmp_path: Path) -> None:
    """Lightning copies the network before it is on its device; every update would copy all weights to the CPU."""
    task, average = tiny_task(), EmaOptions().callback()
    guard = AveragedWeights()
    trainer = tiny_trainer(tmp_path, callbacks=[guard, average])
    average.setup(trainer, task, "fit")
    task.to("meta")
    guard.on_train_start(trainer, task)
    assert average._average_model is not None
    assert {parameter.device.type for parameter in average._average_model.module.parameters()} == {"meta"}
    assert average._average_model.n_averaged.device.type == "cpu"
