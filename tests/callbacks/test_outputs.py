from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks.confusion import ConfusionCounter, CountedSplit
from callbacks.prediction_writer import PredictionWriter
from tests.callbacks.tiny import MadePhotos, tiny_task, tiny_trainer
from vitrail.errors import UserError
from vitrail.predictions import read_predictions


class Reports(ConfusionCounter):
    """Keeps what it is to report."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[CountedSplit] = []
        self.confusions: list[Mapping[str, pd.DataFrame]] = []

    def report(self, trainer: Trainer, counted: CountedSplit, confusions: Mapping[str, pd.DataFrame]) -> None:
        self.counted.append(counted)
        self.confusions.append(confusions)


class Scores(Callback):
    """Logs given values as the validation metric and shifts the answers, so that epochs can be told apart."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            pl_module.log("val/made_up", self.values[trainer.current_epoch])


def saver(folder: Path, mode: str) -> ModelCheckpoint:
    return ModelCheckpoint(folder, monitor="val/made_up", mode=mode, save_last=True)


@pytest.mark.parametrize(("mode", "best"), [("max", 1), ("min", 2)])
def test_fit_reports_the_best_epoch_once(tmp_path: Path, mode: str, best: int) -> None:
    reports = Reports()
    trainer = tiny_trainer(
        tmp_path,
        max_epochs=4,
        limit_train_batches=1,
        num_sanity_val_steps=2,
        enable_checkpointing=True,
        callbacks=[reports, Scores([0.5, 0.9, 0.1, 0.9]), saver(tmp_path, mode)],
    )
    trainer.fit(tiny_task(), datamodule=MadePhotos())
    assert [(counted.split, counted.epoch) for counted in reports.counted] == [("val", best)]
    assert reports.confusions[0]["class"].to_numpy().sum() == 10
    assert reports.confusions[0]["colour"].to_numpy().sum() == 8  # two are unknown


def test_resumed_fit_still_knows_the_best_epoch(tmp_path: Path) -> None:
    values = [0.5, 0.9, 0.1, 0.2]

    def run(max_epochs: int, ckpt_path: Path | None) -> Reports:
        reports = Reports()
        trainer = tiny_trainer(
            tmp_path,
            max_epochs=max_epochs,
            limit_train_batches=1,
            enable_checkpointing=True,
            callbacks=[reports, Scores(values), saver(tmp_path, "max")],
        )
        trainer.fit(tiny_task(), datamodule=MadePhotos(), ckpt_path=ckpt_path, weights_only=True)
        return reports

    first = run(2, None)
    resumed = run(4, tmp_path / "last.ckpt")
    assert resumed.counted[-1].epoch == 1
    pd.testing.assert_frame_equal(resumed.confusions[-1]["class"], first.confusions[-1]["class"])


def test_without_a_metric_the_last_epoch_counts(tmp_path: Path) -> None:
    reports = Reports()
    trainer = tiny_trainer(tmp_path, max_epochs=3, limit_train_batches=1, callbacks=[reports])
    trainer.fit(tiny_task(), datamodule=MadePhotos())
    assert [counted.epoch for counted in reports.counted] == [2]


def test_counts_equal_the_predictions(tmp_path: Path) -> None:
    reports = Reports()
    trainer = tiny_trainer(tmp_path, callbacks=[reports, PredictionWriter(["val", "test"])])
    task, data = tiny_task(), MadePhotos()
    trainer.validate(task, datamodule=data, verbose=False)
    trainer.test(task, datamodule=data, verbose=False)
    assert [counted.split for counted in reports.counted] == ["val", "test"]
    for counted, confusions in zip(reports.counted, reports.confusions, strict=True):
        written = read_predictions(tmp_path / "predictions" / f"{counted.split}.parquet")
        for task_name, confusion in confusions.items():
            targets, names = written.targets[task_name], list(written.tasks[task_name])
            pairs = list(zip(targets.tolist(), written.predicted(task_name).tolist(), strict=True))
            expected = [[pairs.count((row, column)) for column in range(len(names))] for row in range(len(names))]
            assert confusion.to_numpy().tolist() == expected
            assert confusion.index.tolist() == confusion.columns.tolist() == names


def test_smoke_test_writes_nothing(tmp_path: Path) -> None:
    reports = Reports()
    trainer = tiny_trainer(tmp_path, fast_dev_run=True, callbacks=[reports, PredictionWriter(["val"])])
    trainer.fit(tiny_task(), datamodule=MadePhotos())
    trainer.validate(tiny_task(), datamodule=MadePhotos(), verbose=False)
    assert reports.counted == []
    assert not (tmp_path / "predictions").exists()


def test_steps_without_outputs_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task()
    monkeypatch.setattr(task, "test_step", lambda batch, batch_idx: torch.zeros(1))
    trainer = tiny_trainer(tmp_path, callbacks=[Reports()])
    with pytest.raises(UserError, match=r"Reports: the steps of MultiTaskClassifier do not return"):
        trainer.test(task, datamodule=MadePhotos(), verbose=False)


@pytest.mark.parametrize("callback", [Reports(), PredictionWriter()])
def test_data_without_names_are_told(tmp_path: Path, callback: Callback) -> None:
    data: Any = MadePhotos()
    data.setup()
    trainer = tiny_trainer(tmp_path, callbacks=[callback])
    with pytest.raises(UserError, match=r"needs a DataModule that names classes, samples and groups"):
        trainer.test(tiny_task(), dataloaders=data.test_dataloader(), verbose=False)


def test_other_classes_than_the_data_have_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = MadePhotos()
    monkeypatch.setitem(data.tasks, "colour", ["blue", "red", "green"])
    trainer = tiny_trainer(tmp_path, callbacks=[Reports()])
    with pytest.raises(UserError, match="tells 2 classes of 'colour' apart, the data name 3"):
        trainer.test(tiny_task(), datamodule=data, verbose=False)
