from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import MonitoredMetrics
from tests.support.runs import MadePhotos, tiny_task, tiny_trainer
from vitrail.errors import UserError


def fit(folder: Path, saver: ModelCheckpoint, **options: object) -> Trainer:
    trainer = tiny_trainer(
        folder, enable_checkpointing=True, callbacks=[MonitoredMetrics(), saver], max_epochs=2, **options
    )
    trainer.fit(tiny_task(), datamodule=MadePhotos())
    return trainer


def test_a_metric_that_nobody_computes_is_told_with_those_that_resemble_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ModelCheckpoint\.monitor: there is no metric 'val/los'; .* val/loss"):
        fit(tmp_path, ModelCheckpoint(tmp_path, monitor="val/los"))
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("monitor", ["val/loss", "train/loss", None])
def test_a_metric_that_is_there_is_watched(tmp_path: Path, monitor: str | None) -> None:
    saver = ModelCheckpoint(tmp_path, monitor=monitor)
    fit(tmp_path, saver)
    assert Path(saver.best_model_path).exists()
