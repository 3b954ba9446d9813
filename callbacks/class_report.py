"""Precision, recall, F1 and support of every class, as files, and a short table at the end of a test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from callbacks.outputs import ConfusionCounter, CountedSplit
from evaluation.classification import class_report
from evaluation.summary import share
from vitrail.files import write_csv
from vitrail.trust import file_name

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table


class ClassReport(ConfusionCounter):
    """Writes ``reports/<split>_<task>.csv`` in the run directory after a test, a validation, and a fit.

    The report of a fit is that of its best validation epoch. Columns: ``class``, ``precision``, ``recall``, ``f1`` (0
    to 1, higher is better) and ``support``; the last rows are ``accuracy``, ``macro avg`` and ``weighted avg``. A test
    also prints one line a task, with the class that is recognised worst.
    """

    def report(self, trainer: Trainer, counted: CountedSplit, confusions: Mapping[str, pd.DataFrame]) -> None:
        """Write the files, and print the table after a test."""
        reports = {task: class_report(confusion) for task, confusion in confusions.items()}
        folder = Path(trainer.default_root_dir) / "reports"
        for task, frame in reports.items():
            write_csv(folder / f"{counted.split}_{file_name(task)}.csv", frame, index=True)
        if counted.split == "test" and reports:
            from rich.console import Console

            Console().print(_short_table(reports))


def _short_table(reports: Mapping[str, pd.DataFrame]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="test")
    table.add_column("task")
    for column in ("n", "accuracy", "macro F1", "weighted F1"):
        table.add_column(column, justify="right")
    table.add_column("lowest recall")
    for task, frame in reports.items():
        # The last three rows: accuracy, macro average, weighted average.
        scores = [share(score) for score in frame["f1"].to_numpy(dtype=float)[-3:].tolist()]
        table.add_row(Text(task), str(frame.loc["accuracy", "support"]), *scores, Text(_lowest_recall(frame)))
    return table


def _lowest_recall(frame: pd.DataFrame) -> str:
    classes = frame.iloc[:-3]
    occurring = classes[classes["support"] > 0]
    if occurring.empty:
        return ""
    place = int(occurring["recall"].to_numpy(dtype=float).argmin())
    recall, support = occurring["recall"].tolist()[place], occurring["support"].tolist()[place]
    return f"{occurring.index.tolist()[place]}: {recall:.2f} of {support}"
