from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics

from callbacks import ClassReport, PredictionWriter
from callbacks.confusion import _short_table
from evaluation.statistics.intervals import known
from evaluation.tables.per_class import class_report, confusion_matrix
from tests.support.runs import TASKS, MadePhotos, tiny_task, tiny_trainer
from vitrail.predictions import read_predictions


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
    table = _short_table({"colour": class_report(confusion_matrix(none, none, ["red", "blue"]))})
    cells = [str(next(iter(column.cells))) for column in table.columns]
    assert cells == ["colour", "0", "–", "–", "–", ""]


def test_fit_writes_the_validation_report_and_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = tiny_trainer(tmp_path, limit_train_batches=1, callbacks=[ClassReport()])
    trainer.fit(tiny_task(), datamodule=MadePhotos())
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == ["val_class.csv", "val_colour.csv"]
    assert pd.read_csv(tmp_path / "reports" / "val_class.csv", index_col=0).loc["accuracy", "support"] == 10
    assert "lowest recall" not in capsys.readouterr().out
