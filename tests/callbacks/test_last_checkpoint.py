from __future__ import annotations

import errno
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks import LastCheckpoint
from datamodules.schema import UserError
from tests.callbacks.tiny import MadePhotos, tiny_task, tiny_trainer

STEPS = 6


class Noting(Callback):
    """Notes after how many steps of the whole training the checkpoint was written anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written: list[int] = []
        self._seen = 0

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        assert progress["ready"] == progress["completed"], "between two batches"
        self.written.append(trainer.global_step)


def fit(folder: Path, *callbacks: Callback, **changes: Any) -> list[int]:
    noting = Noting(folder)
    trainer = tiny_trainer(folder, callbacks=[*callbacks, noting], **{"max_epochs": 3, **changes})
    trainer.fit(tiny_task(), datamodule=MadePhotos())
    return noting.written


def test_once_an_epoch_and_at_the_end(tmp_path: Path) -> None:
    assert fit(tmp_path, LastCheckpoint()) == [STEPS, 2 * STEPS, 3 * STEPS]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3 * STEPS


def test_every_few_steps_as_well(tmp_path: Path) -> None:
    assert fit(tmp_path, LastCheckpoint(every_n_train_steps=4), max_epochs=2) == [4, 6, 8, 12]


def test_by_the_clock(tmp_path: Path) -> None:
    assert fit(tmp_path, LastCheckpoint(every_minutes=1e-9), max_epochs=1) == [1, 2, 3, 4, 5, 6]


def test_somewhere_else(tmp_path: Path) -> None:
    fit(tmp_path, LastCheckpoint(dirpath=str(tmp_path / "elsewhere")), max_epochs=1)
    assert (tmp_path / "elsewhere" / "last.ckpt").is_file()


def test_a_smoke_test_leaves_nothing(tmp_path: Path) -> None:
    assert fit(tmp_path, LastCheckpoint(every_n_train_steps=1), fast_dev_run=True) == []


def test_it_must_come_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="put LastCheckpoint first"):
        fit(tmp_path, Callback(), LastCheckpoint())


@pytest.mark.parametrize("wrong", [{"every_n_train_steps": -1}, {"every_minutes": -0.5}])
def test_negative_numbers(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"last\.every_n_train_steps, last\.every_minutes"):
        LastCheckpoint(**wrong)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_and_other_errors_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(number, "full")

    monkeypatch.setattr(Trainer, "save_checkpoint", full)
    with pytest.raises(
        UserError, match=r"last\.ckpt: the checkpoint cannot be written, the disk is full; there is none"
    ):
        fit(tmp_path, LastCheckpoint())
    monkeypatch.setattr(Trainer, "save_checkpoint", Mock(side_effect=OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        fit(tmp_path, LastCheckpoint())
