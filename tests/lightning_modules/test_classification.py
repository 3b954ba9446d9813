from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from tests.lightning_modules.tiny import TASKS, TinyData, make_batch, seeded_multitask, tiny_classifier, tiny_trainer
from vitrail.errors import UserError
from vitrail.types import UNKNOWN, Outputs


class Outcomes(pl.Callback):
    """The outputs of all validation steps."""

    def __init__(self) -> None:
        self.outputs: list[Outputs] = []

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *rest: Any) -> None:
        self.outputs.append(outputs)


def test_logged_values_are_over_samples_and_padding_is_not_one(tmp_path: Path) -> None:
    recorder, task = Outcomes(), seeded_multitask(task_weights={"class": 1.0, "type": 0.5}, label_smoothing=0.1)
    trainer = tiny_trainer(tmp_path, callbacks=[recorder], num_sanity_val_steps=0)
    trainer.fit(task, TinyData())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    ids = torch.cat([outputs["sample_id"] for outputs in recorder.outputs])
    assert ids.tolist() == [20, 21, 22, 23, 24, 25, 26]
    losses = {}
    for task_name in TASKS:
        logits = torch.cat([outputs["logits"][task_name] for outputs in recorder.outputs])
        targets = torch.cat([outputs["targets"][task_name] for outputs in recorder.outputs])
        known = targets != UNKNOWN
        assert known.sum() == (7 if task_name == "class" else 5)
        losses[task_name] = float(F.cross_entropy(logits[known], targets[known]))
        assert logged[f"val/{task_name}/loss"] == pytest.approx(losses[task_name], rel=1e-5)
        accuracy = float((logits[known].argmax(1) == targets[known]).float().mean())
        assert logged[f"val/{task_name}/accuracy"] == pytest.approx(accuracy)
    assert logged["val/loss"] == pytest.approx(losses["class"] + 0.5 * losses["type"], rel=1e-5)
    expected = {"val/class/top3", "val/class/f1_macro", "val/class/f1_weighted", "val/type/f1_macro", "train/loss"}
    assert expected | {"train/class/loss", "train/type/loss"} <= logged.keys()
    assert not {"val/class/top5", "val/type/top3", "train/class/accuracy"} & logged.keys()


def test_the_training_loss_of_an_epoch_is_over_samples_too(tmp_path: Path) -> None:
    task = seeded_multitask(lr=0.0)
    task.eval()  # without dropout the losses can be computed again
    trainer = tiny_trainer(tmp_path, limit_val_batches=0)
    trainer.fit(task, TinyData())
    batch = make_batch(list(range(10)))
    with torch.no_grad():
        loss, _ = task._shared_step(batch, "train")
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(loss), rel=1e-5)


def test_testing_and_predicting_give_outputs_of_the_same_shape(tmp_path: Path) -> None:
    task, trainer = seeded_multitask(), tiny_trainer(tmp_path)
    [metrics] = trainer.test(task, TinyData(), verbose=False)
    assert "test/class/f1_macro" in metrics
    batches: Any = trainer.predict(task, TinyData())
    assert [len(outputs["sample_id"]) for outputs in batches] == [4, 3]
    last = batches[-1]
    assert last["logits"]["class"].shape == (3, 4)
    assert last["logits"]["type"].dtype == torch.float32
    assert last["targets"]["type"].tolist() == [UNKNOWN, 1, 0]


def test_what_a_batch_does_not_know_is_unknown_in_the_outputs() -> None:
    batch = make_batch([0, 1])
    del batch["label"]
    outputs = seeded_multitask().eval().predict_step(batch, 0)
    assert outputs["targets"]["class"].tolist() == [UNKNOWN, UNKNOWN]


def test_a_batch_without_any_known_target_of_a_task_leaves_its_head_alone() -> None:
    task, batch = seeded_multitask(label_smoothing=0.1), make_batch([0, 3, 6])
    loss, _ = task._shared_step(batch, "train")
    loss.backward()  # type: ignore[no-untyped-call]
    heads: Any = task.heads
    assert torch.isfinite(loss)
    assert not any(parameter.grad.any() for parameter in heads[1].parameters())
    assert any(parameter.grad.any() for parameter in heads[0].parameters())


@pytest.mark.parametrize("changes", [{"class_names": []}, {"class_names": None}, {"class_names": ["one"]}])
def test_fewer_than_two_classes_are_a_user_error(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="fewer than two classes"):
        tiny_classifier(**changes)
