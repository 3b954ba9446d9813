from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

import callbacks
from callbacks import ConfusionMatrixLogger
from tests.callbacks.tiny import TASKS, MadePhotos, tiny_task, tiny_trainer
from tests.callbacks.wandb_store import history
from vitrail.errors import UserError


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


def test_sanity_check_writes_nothing(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path,
        max_epochs=1,
        limit_train_batches=1,
        num_sanity_val_steps=2,
        check_val_every_n_epoch=2,
        callbacks=[ConfusionMatrixLogger(every_n_epochs=1)],
    )
    trainer.fit(tiny_task(), datamodule=MadePhotos())
    assert not (tmp_path / "figures").exists()


def test_negative_interval_is_refused() -> None:
    with pytest.raises(UserError, match="must not be negative"):
        ConfusionMatrixLogger(-1)


def test_no_name_of_lightning_is_taken() -> None:
    import lightning.pytorch.callbacks as of_lightning

    assert not set(callbacks.__all__) & set(of_lightning.__all__)
    assert all(hasattr(callbacks, name) for name in callbacks.__all__)


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
