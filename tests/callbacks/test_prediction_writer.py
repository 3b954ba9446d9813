from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from callbacks import PredictionWriter
from tests.support.runs import TASKS, MadePhotos, tiny_task, tiny_trainer
from vitrail.errors import UserError
from vitrail.predictions import read_predictions
from vitrail.types import batch_targets


def test_file_holds_what_the_model_answers(tmp_path: Path) -> None:
    task, data = tiny_task(), MadePhotos()
    tiny_trainer(tmp_path, callbacks=[PredictionWriter()]).test(task, datamodule=data, verbose=False)
    written = read_predictions(tmp_path / "predictions" / "test.parquet")
    assert written.sample_id.tolist() == list(range(34, 47))
    assert written.names[0] == "photo 34"
    assert written.groups[0] == "object 11"
    assert dict(written.tasks) == TASKS
    task.eval()
    for batch in data.eval_dataloader("test"):
        rows = np.searchsorted(written.sample_id, batch["sample_id"].numpy())
        with torch.no_grad():
            logits = task(batch["image"])
        for name, targets in batch_targets(batch).items():
            np.testing.assert_allclose(written.logits[name][rows], logits[name].numpy(), atol=1e-5)
            np.testing.assert_array_equal(written.targets[name][rows], targets.numpy())


def test_splits_are_written_by_their_own_command(tmp_path: Path) -> None:
    task, data = tiny_task(), MadePhotos()
    trainer = tiny_trainer(tmp_path, limit_train_batches=1, callbacks=[PredictionWriter(["val", "predict"])])
    folder = tmp_path / "predictions"
    trainer.fit(task, datamodule=data)
    assert not folder.exists()
    trainer.validate(task, datamodule=data, verbose=False)
    trainer.test(task, datamodule=data, verbose=False)
    assert [path.name for path in folder.iterdir()] == ["val.parquet"]
    trainer.predict(task, datamodule=data, return_predictions=False)
    assert len(read_predictions(folder / "predict.parquet")) == 13


def test_unknown_split_is_refused() -> None:
    splits: list[str] = ["test", "exam"]
    with pytest.raises(UserError, match="must be one of val, test, predict; got 'exam'"):
        PredictionWriter(splits)  # type: ignore[arg-type]


def test_diverged_model_is_refused(tmp_path: Path) -> None:
    task = tiny_task()
    with torch.no_grad():
        next(task.heads.parameters()).fill_(float("nan"))
    trainer = tiny_trainer(tmp_path, callbacks=[PredictionWriter()])
    with pytest.raises(UserError, match="not finite for 13 of 13 samples"):
        trainer.test(task, datamodule=MadePhotos(), verbose=False)
    assert not list((tmp_path).rglob("*.parquet"))
