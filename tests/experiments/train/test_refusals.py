"""What would make a number untrustworthy is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint

from callbacks import BestCheckpoint, LastCheckpoint
from experiments.train.cli import (
    refuse_conflicting_checkpoint,
    refuse_other_checkpoints,
    refuse_reversed_selection,
    refuse_sections,
    refuse_test_metrics,
    refuse_trainer_options,
    refuse_untrained,
)
from vitrail.errors import UserError


class Model(LightningModule):
    def __init__(self, lr: float, class_names: list[str], class_counts: dict[str, list[int]] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()


class Ready(Model):
    ready_without_training = True


def checkpoint(path: Path, **hyper_parameters: object) -> Path:
    versions = {"pytorch-lightning_version": "2.6.6"}
    torch.save({**versions, "hyper_parameters": hyper_parameters, "state_dict": {}}, path)
    return path


def test_equal_hyper_parameters_pass(tmp_path: Path) -> None:
    refuse_conflicting_checkpoint(Model(0.1, ["a"]), checkpoint(tmp_path / "x.ckpt", lr=0.1, class_names=["a"]))


@pytest.mark.parametrize(
    ("saved", "key"),
    [({"lr": 0.2, "class_names": ["a", "b"]}, "lr"), ({"lr": 0.1, "class_names": ["b", "a"]}, "class_names")],
)
def test_each_difference_is_named(tmp_path: Path, saved: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=key) as refusal:
        refuse_conflicting_checkpoint(Model(0.1, ["a", "b"]), checkpoint(tmp_path / "x.ckpt", **saved))
    assert "\n" not in str(refusal.value)


def test_counts_of_the_training_split_may_differ(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x.ckpt", lr=0.1, class_names=["a"], class_counts={"class": [3]})
    refuse_conflicting_checkpoint(Model(0.1, ["a"], {"class": [4]}), path)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"x\.ckpt"):
        refuse_conflicting_checkpoint(Model(0.1, []), path)


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.zeros(2)},
        {"state_dict": {}, "hyper_parameters": {}},
        {"pytorch-lightning_version": "2.6.6", "state_dict": [1], "hyper_parameters": {}},
        [1, 2],
    ],
)
def test_plain_weights_are_no_checkpoint(tmp_path: Path, content: object) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"weights\.ckpt: is not a checkpoint of a run; plain weights belong to"):
        refuse_conflicting_checkpoint(Model(0.1, []), path)


def test_training_does_not_go_on_from_weights_alone(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "start.ckpt", lr=0.1, class_names=["a"])
    refuse_conflicting_checkpoint(Model(0.1, ["a"]), path)
    with pytest.raises(UserError, match=r"start\.ckpt: holds weights but no state of a training"):
        refuse_conflicting_checkpoint(Model(0.1, ["a"]), path, trains=True)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches: must be at least 1; got 0"),
        ({"check_val_every_n_epoch": 0}, "trainer.check_val_every_n_epoch: must be at least 1"),
        ({"val_check_interval": 0.0}, "trainer.val_check_interval: must be more than 0"),
        ({"gradient_clip_val": -1.0}, "trainer.gradient_clip_val: must be at least 0"),
        ({"max_epochs": 0}, "trainer.max_epochs: 0 trains nothing"),
        ({"max_steps": 0}, "trainer.max_steps: 0 trains nothing"),
        ({"limit_train_batches": 0}, "trainer.limit_train_batches: 0 trains nothing"),
    ],
)
def test_settings_that_train_nothing_or_fail_are_refused(options: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=key):
        refuse_trainer_options(options)
    refuse_trainer_options({"accumulate_grad_batches": 1, "check_val_every_n_epoch": None, "max_epochs": -1})


@pytest.mark.parametrize("section", [None, [1], 7])
def test_a_section_that_is_no_mapping_is_refused(section: object) -> None:
    with pytest.raises(UserError, match="checkpoint: must hold options"):
        refuse_sections({"trainer": {}, "checkpoint": section}, ["trainer", "checkpoint", "last"])


def test_code_inside_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"hyper_parameters": {"lr": Model}}, path)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        refuse_conflicting_checkpoint(Model(0.1, []), path)


@pytest.mark.parametrize(
    "callback", [ModelCheckpoint(monitor="test/loss"), EarlyStopping(monitor="test/class/accuracy")]
)
def test_selection_on_test_is_refused(callback: ModelCheckpoint | EarlyStopping) -> None:
    with pytest.raises(UserError, match="test"):
        refuse_test_metrics([callback])


def test_selection_on_validation_passes() -> None:
    refuse_test_metrics([ModelCheckpoint(monitor="val/loss"), ModelCheckpoint()])


def test_untrained_model_is_not_evaluated() -> None:
    with pytest.raises(UserError, match="--ckpt_path"):
        refuse_untrained(Model(0.1, []), "test")
    refuse_untrained(Ready(0.1, []), "test")


@pytest.mark.parametrize(
    ("monitor", "mode", "right"),
    [
        ("val/class/accuracy", "min", "max"),
        ("val/mean_per_class", "min", "max"),
        ("val/colour/f1_macro", "min", "max"),
        ("val/class/top5", "min", "max"),
        ("val/text_to_image/R@10", "min", "max"),
        ("val/retrieval/mean_recall", "min", "max"),
        ("val/loss", "max", "min"),
        ("val/class/loss", "max", "min"),
        ("val/image_to_text/median_rank", "max", "min"),
    ],
)
def test_the_worst_epoch_is_not_taken_for_the_best(monitor: str, mode: Any, right: Any) -> None:
    with pytest.raises(UserError, match=rf"^checkpoint\.mode: {mode} takes .* set checkpoint\.mode: {right}$"):
        refuse_reversed_selection([BestCheckpoint(monitor=monitor, mode=mode)])
    with pytest.raises(UserError, match=rf"^EarlyStopping\.mode: .* set EarlyStopping\.mode: {right}$"):
        refuse_reversed_selection([EarlyStopping(monitor=monitor, mode=mode)])
    others = [BestCheckpoint(monitor="val/of_their_own", mode=mode), ModelCheckpoint(), LastCheckpoint()]
    refuse_reversed_selection([BestCheckpoint(monitor=monitor, mode=right), *others])


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ({"filename": "best"}, "best.ckpt"),
        ({"filename": "last"}, "last.ckpt"),
        ({"filename": "start"}, "start.ckpt"),
        ({"save_last": True}, "last.ckpt"),
        ({"save_last": "link", "filename": "{epoch}"}, "last.ckpt"),
        ({"dirpath": "run/checkpoints", "filename": "best"}, "best.ckpt"),
        ({"dirpath": "run", "filename": "checkpoints/best"}, "best.ckpt"),
    ],
)
def test_other_callbacks_do_not_write_under_the_names_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    best, last = BestCheckpoint(tmp_path / "run" / "checkpoints", monitor="val/loss"), LastCheckpoint()
    with pytest.raises(UserError, match=f"ModelCheckpoint would overwrite the run's own {file}"):
        refuse_other_checkpoints([last, ModelCheckpoint(**options), best], best, last)


def test_other_callbacks_may_keep_checkpoints_of_their_own(tmp_path: Path) -> None:
    best, last = BestCheckpoint(tmp_path, monitor="val/loss"), LastCheckpoint()
    others = [
        ModelCheckpoint(),
        ModelCheckpoint(filename="best-{epoch}"),
        ModelCheckpoint(tmp_path / "other", "best", save_last=True),
        OnExceptionCheckpoint(tmp_path),
    ]
    refuse_other_checkpoints([last, *others, best], best, last)
    for double in (BestCheckpoint(tmp_path / "other", monitor="val/loss"), LastCheckpoint()):
        with pytest.raises(UserError, match="is there already; set it in the section"):
            refuse_other_checkpoints([last, double, best], best, last)
    with pytest.raises(UserError, match=r"OnExceptionCheckpoint would overwrite the run's own last\.ckpt"):
        refuse_other_checkpoints([last, OnExceptionCheckpoint(tmp_path, "last"), best], best, last)
