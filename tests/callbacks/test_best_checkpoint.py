"""``best.ckpt`` is the best validation, whatever else is kept and however training goes on."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import BestCheckpoint, EpochLines, LastCheckpoint
from callbacks.best_checkpoint import reason_for_no_validation
from tests.support.runs import MadePhotos, tiny_classifier, tiny_trainer
from vitrail.errors import UserError

NAN = math.nan


class Scores(Callback):
    """Logs made-up values of one validation after the other, by epoch or one by one."""

    def __init__(self, values: Sequence[float], *, one_by_one: bool = False) -> None:
        self.values, self.one_by_one = [*values], one_by_one

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = self.values.pop(0) if self.one_by_one else self.values[trainer.current_epoch]
        pl_module.log("val/made_up", torch.tensor(value))


def trainer_of(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    limits = {"limit_train_batches": 1, "limit_val_batches": 1, "enable_checkpointing": True}
    return tiny_trainer(folder, callbacks=[*callbacks], **{**limits, **options})


def fit(
    folder: Path, values: Sequence[float], *, ckpt_path: Path | None = None, epochs: int = 0, **options: Any
) -> BestCheckpoint:
    trainer_options = {key: options.pop(key) for key in list(options) if key.startswith(("limit", "check"))}
    options = {"monitor": "val/made_up", "filename": "best", "mode": "min", "enable_version_counter": False, **options}
    saver = BestCheckpoint(folder, **options)
    last = LastCheckpoint(dirpath=str(folder))
    trainer = trainer_of(
        folder, last, Scores(values), EpochLines(), saver, max_epochs=epochs or len(values), **trainer_options
    )
    trainer.fit(tiny_classifier(), datamodule=MadePhotos(), ckpt_path=ckpt_path, weights_only=True)
    return saver


def epochs_of(folder: Path) -> dict[str, int]:
    """The epoch that each checkpoint but ``last.ckpt`` is of."""
    files = [path for path in folder.glob("*.ckpt") if path.name != "last.ckpt"]
    return {path.name: torch.load(path, weights_only=True)["epoch"] for path in files}


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([3, 1, 2, 5, 4], {"save_top_k": 1}, {"best.ckpt": 1}),
        ([3, 1, 2, 5, 4], {"save_top_k": 3}, {"best.ckpt": 1, "epoch=0-step=1.ckpt": 0, "epoch=2-step=3.ckpt": 2}),
        ([4, 3, 2, 1], {"save_top_k": 2}, {"best.ckpt": 3, "epoch=2-step=3.ckpt": 2}),
        ([4, 3, 2, 1], {"save_top_k": 2, "mode": "max"}, {"best.ckpt": 0, "epoch=1-step=2.ckpt": 1}),
        ([1, 3, 2], {"save_top_k": -1}, {"best.ckpt": 0, "epoch=1-step=2.ckpt": 1, "epoch=2-step=3.ckpt": 2}),
        ([2, 1, 1], {"save_top_k": 1}, {"best.ckpt": 1}),
        ([NAN, 2, NAN, 3], {"save_top_k": 1}, {"best.ckpt": 1}),
        ([2, NAN, 1], {"save_top_k": -1}, {"best.ckpt": 2, "epoch=0-step=1.ckpt": 0, "epoch=1-step=2.ckpt": 1}),
        ([NAN, NAN], {"save_top_k": 1}, {}),
        ([2, 1], {"save_top_k": 2, "filename": "kept"}, {"best.ckpt": 1, "kept-epoch=0-step=1.ckpt": 0}),
        ([2, 1], {"save_top_k": 2, "filename": "{val/made_up:g}"}, {"best.ckpt": 1, "val_made_up=2-step=1.ckpt": 0}),
        ([2, 1], {"save_top_k": 0}, {}),
        ([2, 1, 3], {"save_last": True}, {"best.ckpt": 1}),
    ],
)  # fmt: skip
def test_it_is_the_best_epoch_and_the_others_have_names_of_their_own(
    tmp_path: Path, values: list[float], options: dict[str, Any], expected: dict[str, int]
) -> None:
    saver = fit(tmp_path, values, **options)
    assert epochs_of(tmp_path) == expected
    assert Path(saver.best_model_path).name == ("best.ckpt" if "best.ckpt" in expected else "")


def test_a_run_that_goes_on_elsewhere_takes_the_better_checkpoint_along(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    fit(first, [3, 1, 2], save_top_k=2)
    saver = fit(second, [3, 1, 2, 1.5, 4], ckpt_path=first / "last.ckpt", save_top_k=2)
    assert epochs_of(second) == {"best.ckpt": 1, "epoch=3-step=4.ckpt": 3}
    assert saver.best_model_score == 1
    assert saver.best_model_path == str(second / "best.ckpt")
    # A better epoch replaces it there alone.
    fit(third, [3, 1, 2, 0.5], ckpt_path=first / "last.ckpt")
    assert epochs_of(third) == {"best.ckpt": 3}
    assert epochs_of(first) == {"best.ckpt": 1, "epoch=2-step=3.ckpt": 2}


@pytest.mark.parametrize("left", [0, 1])
def test_a_run_that_was_moved_goes_on_with_its_own_files(tmp_path: Path, left: int) -> None:
    """Also where nothing is left to train."""
    fit(tmp_path / "first", [3, 1, 2])
    (tmp_path / "first").rename(tmp_path / "moved")
    for folder in (tmp_path / "moved", tmp_path / "elsewhere"):
        saver = fit(folder, [3, 1, 2, 4], epochs=3 + left, ckpt_path=tmp_path / "moved" / "last.ckpt")
        assert saver.best_model_path == str(folder / "best.ckpt")
        assert saver.best_model_score == saver.best_epoch == 1
        assert epochs_of(folder) == {"best.ckpt": 1}


def test_what_another_run_left_in_the_folder_is_not_taken_for_the_best(tmp_path: Path) -> None:
    fit(tmp_path / "first", [3, 1, 2])
    fit(tmp_path / "shared", [5, 4, 3, 0])
    fit(tmp_path / "shared", [3, 1, 2, 4], ckpt_path=tmp_path / "first" / "last.ckpt")
    assert epochs_of(tmp_path / "shared") == {"best.ckpt": 1}


@pytest.mark.parametrize(("filename", "left"), [("{epoch}", 0), ("best", 1)])
def test_a_run_of_lightnings_own_callback_goes_on(tmp_path: Path, filename: str, left: int) -> None:
    """As runs were made before there was ours: its best is ours, under our name."""
    first = tmp_path / "first"
    former = ModelCheckpoint(first, monitor="val/made_up", filename=filename, enable_version_counter=False)
    users = ModelCheckpoint(tmp_path / "users", monitor="val/loss", save_top_k=2)
    callbacks = [LastCheckpoint(dirpath=str(first)), Scores([3, 1, 2]), users, former]
    trainer_of(first, *callbacks, max_epochs=3).fit(tiny_classifier(), MadePhotos())
    for folder in (first, tmp_path / "elsewhere"):
        saver = fit(folder, [3, 1, 2, 4], epochs=3 + left, ckpt_path=first / "last.ckpt")
        assert saver.best_model_path == str(folder / "best.ckpt")
        assert saver.best_model_score == 1
        assert epochs_of(folder)["best.ckpt"] == 1


def test_a_best_epoch_that_lies_ahead_does_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    fit(first, [3, 4, 2, 1], save_top_k=-1)
    with caplog.at_level(logging.INFO):
        fit(second, [3, 4, 5, 6], ckpt_path=first / "epoch=1-step=2.ckpt")
    assert "Earlier epochs do not count for best.ckpt" in caplog.text
    assert epochs_of(second) == {"best.ckpt": 2}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"mode": "max"}, "compared by"), ({"monitor": "val/loss"}, "compared by"), ({}, "had other data")],
)
def test_scores_that_cannot_be_compared_do_not_count(
    tmp_path: Path, changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    fit(first, [1, 3])
    saver = BestCheckpoint(second, **{"monitor": "val/made_up", "mode": "min", **changes})
    saver.continues = bool(changes)
    trainer = trainer_of(second, Scores([1, 3, 2]), saver, max_epochs=3)
    with caplog.at_level(logging.INFO):
        trainer.fit(tiny_classifier(), MadePhotos(), ckpt_path=first / "last.ckpt", weights_only=True)
    assert reason in caplog.text
    assert epochs_of(second) == {"best.ckpt": 2}


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"monitor": None}, "checkpoint.monitor"),
        ({"monitor": "train/loss"}, "checkpoint.monitor"),
        ({"every_n_train_steps": 3}, "checkpoint.every_n_train_steps"),
        ({"every_n_epochs": 2}, "checkpoint.every_n_epochs"),
        ({"save_on_train_epoch_end": True}, "checkpoint.save_on_train_epoch_end"),
        ({"save_on_exception": True}, "checkpoint.save_on_exception"),
    ],
)
def test_what_would_save_something_else_is_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        BestCheckpoint(**{"monitor": "val/loss", **options})


class Asking(Callback):
    """Asks at the beginning why there will be no validation, and counts those that come."""

    def __init__(self) -> None:
        self.reason = "not asked"
        self.validations = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.reason = reason_for_no_validation(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validations += not trainer.sanity_checking


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 1},
        {"max_epochs": 1, "limit_val_batches": 0},
        {"max_epochs": 2, "check_val_every_n_epoch": 2},
        {"max_epochs": 2, "check_val_every_n_epoch": 3},
        {"max_epochs": 1, "max_steps": 5},
        {"max_epochs": 1, "max_steps": 6},
        {"max_epochs": 2, "max_steps": 7, "check_val_every_n_epoch": 2},
        {"max_epochs": 1, "max_steps": 2, "accumulate_grad_batches": 4},
        {"max_epochs": 1, "max_steps": 1, "accumulate_grad_batches": 4},
        {"max_epochs": 1, "max_steps": 2, "val_check_interval": 3},
        {"max_epochs": 1, "max_steps": 3, "val_check_interval": 0.5},
        {"max_epochs": 2, "check_val_every_n_epoch": None, "val_check_interval": 12},
        {"max_epochs": 2, "check_val_every_n_epoch": None, "val_check_interval": 13},
        {"overfit_batches": 1, "max_epochs": 1},
    ],
)
def test_it_is_known_beforehand_whether_there_will_be_a_validation(tmp_path: Path, options: dict[str, Any]) -> None:
    asking = Asking()
    tiny_trainer(tmp_path, callbacks=[asking], **options).fit(tiny_classifier(), MadePhotos())
    assert bool(asking.reason) == (asking.validations == 0), asking.reason


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]


def test_a_line_an_epoch_shows_loss_metric_and_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, [3, 1, NAN, 2])
    lines = lines_of(capsys)
    assert [line.split(":")[0] for line in lines] == ["epoch 1/4", "epoch 2/4", "epoch 3/4", "epoch 4/4"]
    assert all("train/loss " in line and "val/loss " in line for line in lines)
    ends = ["3 (best so far)", "1 (best so far)", "nan (best 1, epoch 2)", "2 (best 1, epoch 2)"]
    assert [line.split("val/made_up ")[1] for line in lines] == ends


def test_epochs_without_validation_and_several_in_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, [3, 1], check_val_every_n_epoch=2)
    assert [line.rsplit(", ", 1)[1] for line in lines_of(capsys)] == ["no validation", "val/made_up 1 (best so far)"]
    saver = BestCheckpoint(tmp_path, monitor="val/made_up", filename="best", mode="min")
    callbacks = [Scores([1.0, 2.0], one_by_one=True), EpochLines(), saver]
    options: dict[str, Any] = {"val_check_interval": 3, "limit_train_batches": 1.0, "enable_progress_bar": True}
    trainer_of(tmp_path, *callbacks, **options).fit(tiny_classifier(), MadePhotos())
    lines = lines_of(capsys)
    assert [line.split(":")[0] for line in lines] == ["epoch 1/1, step 3", "epoch 1/1"]
    # Only one of them is the best.
    assert [line.split("val/made_up ")[1] for line in lines] == ["1 (best so far)", "2 (best 1, epoch 1)"]
