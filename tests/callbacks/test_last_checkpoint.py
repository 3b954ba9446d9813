from __future__ import annotations

import errno
import os
import signal
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import BestCheckpoint, LastCheckpoint
from callbacks.last_checkpoint import DeferredSignals
from tests.support.runs import MadePhotos, recorded_files, tiny_task, tiny_trainer
from vitrail.errors import UserError
from vitrail.files import fetch

STEPS = 6


class Noting(Callback):
    """Notes after how many steps of the whole training a checkpoint was written."""

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


@pytest.mark.parametrize(
    ("settings", "changes", "written"),
    [
        ({"every_n_train_steps": 4}, {"max_epochs": 2}, [4, 6, 8, 12]),
        # Due after 4 and 8 of 6 batches an epoch; steps are done after 6 and 9.
        ({"every_n_train_steps": 4}, {"max_epochs": 2, "accumulate_grad_batches": 3}, [2, 3, 4]),
        ({"every_minutes": 1e-9}, {"max_epochs": 1}, [1, 2, 3, 4, 5, 6]),
        ({"every_n_train_steps": 1}, {"fast_dev_run": True}, []),
    ],
)
def test_more_often_as_set(tmp_path: Path, settings: Any, changes: dict[str, Any], written: list[int]) -> None:
    assert fit(tmp_path, LastCheckpoint(**settings), **changes) == written


def test_a_checkpoint_within_an_epoch_goes_on_with_the_batch_that_comes_next(tmp_path: Path) -> None:
    """Also where a loader's process has fetched batches ahead, and the batch at hand has been delivered."""

    class Copies(Callback):
        def on_train_batch_start(self, trainer: Trainer, *arguments: Any) -> None:
            last = tmp_path / "checkpoints" / "last.ckpt"
            if trainer.global_step == 4:
                last.rename(tmp_path / "fourth.ckpt")

    fit(tmp_path, LastCheckpoint(every_n_train_steps=4), Copies(), max_epochs=1)
    loops = torch.load(tmp_path / "fourth.ckpt", weights_only=True)["loops"]["fit_loop"]
    (loader,) = loops["state_dict"]["combined_loader"]
    assert loader["batches"] == 4
    seen: list[int] = []

    class Sees(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            seen.extend(batch["sample_id"].tolist())

    straight = tiny_trainer(tmp_path, callbacks=[Sees()])
    straight.fit(tiny_task(), datamodule=MadePhotos())
    expected, seen[:] = list(seen), []
    resumed = tiny_trainer(tmp_path, callbacks=[LastCheckpoint(), Sees()])
    resumed.fit(tiny_task(), datamodule=MadePhotos(), ckpt_path=tmp_path / "fourth.ckpt", weights_only=True)
    assert seen == expected[4 * 4 :]


def test_somewhere_else(tmp_path: Path) -> None:
    fit(tmp_path, LastCheckpoint(dirpath=str(tmp_path / "elsewhere")), max_epochs=1)
    assert (tmp_path / "elsewhere" / "last.ckpt").is_file()


def test_all_checkpoints_survive_a_power_cut_and_none_that_is_damaged_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content is flushed to the disk before the rename, the folder after it; all within the run directory."""
    best = ModelCheckpoint(tmp_path / "checkpoints", "best", enable_version_counter=False)
    folder = tmp_path / "checkpoints"
    # Where the system's own temporary files are is no place for checkpoints: moving them from there may be copying.
    monkeypatch.setattr(tempfile, "mkstemp", Mock(side_effect=AssertionError("a file elsewhere")))
    trainer = tiny_trainer(tmp_path, callbacks=[LastCheckpoint(), best], max_epochs=1, enable_checkpointing=True)
    events = recorded_files(monkeypatch)
    trainer.fit(tiny_task(), datamodule=MadePhotos())
    for name in ("last.ckpt", "best.ckpt"):
        renamed = events.index(("rename", folder / name))
        assert events[renamed - 1][0] == "flush"
        assert events[renamed - 1][1].match(f"checkpoints/.{name.removesuffix('.ckpt')}.*.part.ckpt")
        assert events[renamed + 1] == ("flush", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    last = folder / "last.ckpt"
    content = bytearray(last.read_bytes())
    with zipfile.ZipFile(last) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    # Its first byte, which follows the record's header, name and padding.
    lengths = struct.unpack_from("<HH", content, largest.header_offset + 26)
    content[largest.header_offset + 30 + sum(lengths)] ^= 1
    last.write_bytes(content)
    torch.load(last, weights_only=True)  # without a word
    again = tiny_trainer(tmp_path, callbacks=[LastCheckpoint()], max_epochs=2)
    with pytest.raises(UserError, match=r"last\.ckpt: is damaged"):
        again.fit(tiny_task(), datamodule=MadePhotos(), ckpt_path=last, weights_only=True)


def test_who_chose_how_checkpoints_are_written_is_obeyed(tmp_path: Path) -> None:
    class Chosen(TorchCheckpointIO):
        """A user's own."""

    chosen = Chosen()
    trainer = tiny_trainer(tmp_path, callbacks=[LastCheckpoint()], plugins=[chosen])
    trainer.fit(tiny_task(), datamodule=MadePhotos())
    assert trainer.strategy.checkpoint_io is chosen


def test_it_must_come_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="put LastCheckpoint first"):
        fit(tmp_path, Callback(), LastCheckpoint())


@pytest.mark.parametrize("wrong", [{"every_n_train_steps": -1}, {"every_minutes": -0.5}])
def test_negative_numbers(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"last\.every_n_train_steps, last\.every_minutes"):
        LastCheckpoint(**wrong)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_reported_and_other_errors_are_not_hidden(
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


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """Signals that an earlier handler has got."""
    got: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: got.append(number))
    yield got
    signal.signal(signal.SIGUSR2, before)


def test_a_signal_waits_until_it_is_taken(handled: list[int]) -> None:
    forwarded: list[int] = []
    signals = DeferredSignals([signal.SIGUSR2], forwarded.append)
    signals.install()
    assert signals.take() is None
    os.kill(os.getpid(), signal.SIGUSR2)
    assert forwarded == [signal.SIGUSR2]
    assert handled == []
    assert signals.take() == signal.SIGUSR2
    assert signals.take() is None
    signals.handle_as_before(signal.SIGUSR2)
    assert handled == [signal.SIGUSR2]
    signals.remove()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert handled == [signal.SIGUSR2, signal.SIGUSR2]


def test_who_asks_twice_does_not_wait(handled: list[int]) -> None:
    signals = DeferredSignals([signal.SIGUSR2], lambda number: None)
    signals.install()
    os.kill(os.getpid(), signal.SIGUSR2)
    with pytest.raises(SystemExit) as caught:
        os.kill(os.getpid(), signal.SIGUSR2)
    assert caught.value.code == 128 + signal.SIGUSR2
    signals.remove()
    assert handled == []


def test_copies_on_s3_follow_every_checkpoint_and_a_failed_one_is_made_up_for(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = LastCheckpoint(copy_to=f"{bucket}/run/")
    written: list[int] = []

    class Watching(Callback):
        """The store is away while the second of three checkpoints is written."""

        def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
            written.append(trainer.global_step)
            monkeypatch.setattr(copies, "copy_to", f"{bucket}-gone" if len(written) == 2 else f"{bucket}/run")

    with pytest.warns(
        UserWarning, match=r"last\.copy_to: s3://.*-gone/last\.ckpt: cannot be written .*; training goes on"
    ):
        fit(tmp_path, copies, Watching())
    assert written == [STEPS, 2 * STEPS, 3 * STEPS]
    fetched = fetch(f"{bucket}/run/last.ckpt", tmp_path / "fetched")
    assert fetched.read_bytes() == (tmp_path / "checkpoints" / "last.ckpt").read_bytes()


def test_addresses_and_folders_are_not_mixed_up() -> None:
    with pytest.raises(UserError, match=r"last\.dirpath: must be a folder; got s3://bucket/x; set last\.copy_to"):
        LastCheckpoint(dirpath="s3://bucket/x")
    with pytest.raises(UserError, match=r"last\.copy_to: must be an address such as s3://bucket/runs/name; got runs"):
        LastCheckpoint(copy_to="runs")
    with pytest.raises(UserError, match=r"checkpoint\.dirpath: must be a folder; got s3://bucket/x; last\.copy_to"):
        BestCheckpoint(monitor="val/loss", dirpath="s3://bucket/x")
