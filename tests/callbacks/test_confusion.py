from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from sklearn import metrics

from callbacks import ClassReport, ConfusionMatrixLogger, PredictionWriter
from callbacks.confusion import ConfusionCounter, CountedSplit, summary_table
from evaluation.statistics.intervals import known
from evaluation.tables.per_class import class_report, confusion_matrix
from tests.support.runs import TASKS, MadePhotos, tiny_task, tiny_trainer
from tests.support.wandb_store import history
from vitrail.errors import UserError
from vitrail.predictions import read_predictions


class Reports(ConfusionCounter):
    """Keeps what it is to report."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[CountedSplit] = []
        self.confusions: list[Mapping[str, Any]] = []

    def report(self, trainer: Trainer, counted: CountedSplit, confusions: Mapping[str, Any]) -> None:
        self.counted.append(counted)
        self.confusions.append(confusions)


class Scores(Callback):
    """Logs given values as the validation metric and nothing else, so that epochs are ranked."""

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


def test_of_many_classes_the_pairs_that_occur_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, data, few = tiny_task(), MadePhotos(), tmp_path / "few"
    tiny_trainer(few, callbacks=[ConfusionMatrixLogger(), ClassReport()]).test(task, datamodule=data, verbose=False)
    monkeypatch.setattr("callbacks.confusion.MANY_CLASSES", 1)
    reports, many = Reports(), tmp_path / "many"
    own = [reports, ConfusionMatrixLogger(), ClassReport()]
    tiny_trainer(many, callbacks=own).test(task, datamodule=data, verbose=False)
    assert all(counts.is_sparse for counts in reports.counted[0].counts.values())
    for name in TASKS:
        report = Path("reports") / f"test_{name}.csv"
        assert (many / report).read_bytes() == (few / report).read_bytes()
        matrix = pd.read_csv(few / "figures" / f"confusion_test_{name}.csv", index_col="target")
        pairs = pd.read_csv(many / "figures" / f"confusion_test_{name}.csv")
        assert pairs["count"].sum() == matrix.to_numpy().sum()
        assert len(pairs) == (matrix.to_numpy() > 0).sum()
        for pair in pairs.to_dict("records"):
            assert pair["count"] == matrix.loc[pair["target"], pair["predicted"]]
            assert pair["share"] == pytest.approx(pair["count"] / matrix.loc[pair["target"]].sum())
        assert (many / "figures" / f"confusion_test_{name}_normalised.png").is_file()
    saved = many / "counted.pt"
    torch.save(reports.counted[0].counts, saved)
    restored = torch.load(saved, weights_only=True)
    assert all(restored[name].to_dense().equal(counts.to_dense()) for name, counts in reports.counted[0].counts.items())


def test_smoke_test_writes_nothing(tmp_path: Path) -> None:
    reports = Reports()
    trainer = tiny_trainer(tmp_path, fast_dev_run=True, callbacks=[reports, PredictionWriter(["val"])])
    trainer.fit(tiny_task(), datamodule=MadePhotos())
    trainer.validate(tiny_task(), datamodule=MadePhotos(), verbose=False)
    assert reports.counted == []
    assert not (tmp_path / "predictions").exists()


def test_steps_without_outputs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tiny_task()
    monkeypatch.setattr(task, "test_step", lambda batch, batch_idx: torch.zeros(1))
    trainer = tiny_trainer(tmp_path, callbacks=[Reports()])
    with pytest.raises(UserError, match=r"Reports: the steps of MultiTaskClassifier do not return"):
        trainer.test(task, datamodule=MadePhotos(), verbose=False)


@pytest.mark.parametrize("callback", [Reports(), PredictionWriter()])
def test_data_without_names_are_refused(tmp_path: Path, callback: Callback) -> None:
    data: Any = MadePhotos()
    data.setup()
    trainer = tiny_trainer(tmp_path, callbacks=[callback])
    with pytest.raises(UserError, match=r"needs a DataModule that names classes, samples and groups"):
        trainer.test(tiny_task(), dataloaders=data.test_dataloader(), verbose=False)


def test_other_classes_than_the_data_have_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = MadePhotos()
    monkeypatch.setitem(data.tasks, "colour", ["blue", "red", "green"])
    trainer = tiny_trainer(tmp_path, callbacks=[Reports()])
    with pytest.raises(UserError, match="has 2 classes of 'colour', the data 3"):
        trainer.test(tiny_task(), datamodule=data, verbose=False)


def test_files_of_a_test(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[ConfusionMatrixLogger()])
    trainer.test(tiny_task(), datamodule=MadePhotos(), verbose=False)
    figures = tmp_path / "figures"
    expected = [f"confusion_test_{task}{kind}" for task in TASKS for kind in ("", "_normalised")]
    assert {path.name for path in figures.iterdir()} == {f"{name}.{end}" for name in expected for end in ("png", "csv")}
    counts = pd.read_csv(figures / "confusion_test_class.csv", index_col="target")
    shares = pd.read_csv(figures / "confusion_test_class_normalised.csv", index_col="target")
    assert counts.index.tolist() == counts.columns.tolist() == TASKS["class"]
    assert counts.to_numpy().sum() == 13
    pd.testing.assert_frame_equal(shares, counts.div(counts.sum(axis=1), axis=0))
    with Image.open(figures / "confusion_test_class.png") as image:
        image.verify()


def test_chosen_epochs_are_written_while_fitting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    logger = ConfusionMatrixLogger(every_n_epochs=2)
    monkeypatch.setattr(logger, "report", lambda trainer, counted, confusions: seen.append(counted.epoch))
    trainer = tiny_trainer(tmp_path, max_epochs=5, limit_train_batches=1, callbacks=[logger])
    trainer.fit(tiny_task(), datamodule=MadePhotos())
    assert seen == [1, 3, 4]


def test_negative_interval_is_refused() -> None:
    with pytest.raises(UserError, match="must not be negative"):
        ConfusionMatrixLogger(-1)


def test_offline_wandb_run_holds_images_and_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")  # the logger sets it as well, for good
    import wandb

    wandb.teardown()  # the client reads its settings once a process, and another test may have used it
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    trainer = tiny_trainer(tmp_path, logger=logger, callbacks=[ConfusionMatrixLogger()])
    trainer.test(tiny_task(), datamodule=MadePhotos(), verbose=False)
    wandb.finish()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    logged = history(run)
    assert logged["trainer/global_step"] == 0
    for task in TASKS:
        for kind in ("", "_normalised"):
            key = f"confusion/test/{task}{kind}"
            assert logged[f"{key}/_type"] == "image-file"
            with Image.open(run / "files" / logged[f"{key}/path"]) as image:
                assert image.format == "PNG"
    table = run / "files" / logged["confusion/test/class_chart_table/path"]
    rows = json.loads(table.read_text(encoding="utf-8"))
    assert rows["columns"] == ["Actual", "Predicted", "nPredictions"]
    counts = pd.read_csv(tmp_path / "figures" / "confusion_test_class.csv", index_col="target")
    for actual, predicted, number in rows["data"]:
        assert counts.loc[actual, predicted] == number
    assert sum(row[2] for row in rows["data"]) == 13
    assert {row[0] for row in rows["data"]} == set(TASKS["class"])


def test_report_of_a_test_equals_scikit_learn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = tiny_trainer(tmp_path, callbacks=[ClassReport(), PredictionWriter()])
    trainer.test(tiny_task(), datamodule=MadePhotos(), verbose=False)
    written = read_predictions(tmp_path / "predictions" / "test.parquet")
    for task, names in TASKS.items():
        report = pd.read_csv(tmp_path / "reports" / f"test_{task}.csv", index_col="class")
        rows = known(written.targets[task])
        expected = metrics.classification_report(
            written.targets[task][rows],
            written.predicted(task)[rows],
            labels=range(len(names)),
            target_names=names,
            output_dict=True,
            zero_division=0,
        )
        for name in names:
            scores = [expected[name][key] for key in ("precision", "recall", "f1-score", "support")]
            assert list(report.loc[name]) == pytest.approx(scores)
    printed = capsys.readouterr().out
    assert "lowest recall" in printed
    assert all(task in printed for task in TASKS)


def test_a_task_without_a_known_target_has_no_scores() -> None:
    none = np.empty(0, dtype=np.int64)
    table = summary_table({"colour": class_report(confusion_matrix(none, none, ["red", "blue"]))})
    assert table.rows == [["colour", "0", "–", "–", "–", ""]]


def test_fit_writes_the_validation_report_and_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = tiny_trainer(tmp_path, limit_train_batches=1, callbacks=[ClassReport()])
    trainer.fit(tiny_task(), datamodule=MadePhotos())
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == ["val_class.csv", "val_colour.csv"]
    assert pd.read_csv(tmp_path / "reports" / "val_class.csv", index_col=0).loc["accuracy", "support"] == 10
    assert "lowest recall" not in capsys.readouterr().out
