"""Confusion matrices of validation and test as pictures and tables, in the run directory and in W&B."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from callbacks.outputs import ConfusionCounter, CountedSplit
from evaluation.classification import normalise_by_target
from evaluation.figures import confusion_figure, save_figure
from vitrail.errors import UserError
from vitrail.files import write_csv
from vitrail.trust import file_name

if TYPE_CHECKING:
    import pandas as pd


CHART_COLUMNS = ["Actual", "Predicted", "nPredictions"]
"""As W&B's own confusion matrix names them."""


class ConfusionMatrixLogger(ConfusionCounter):
    """Writes ``figures/confusion_<split>_<task>.png`` and ``.csv``, raw and ``_normalised`` by target.

    Raw counts how many samples of each target (row) got each answer (column), one more column being those without a
    prediction, where there are any; normalised divides by the number of
    the target's samples, so that the diagonal is the recall. The matrix of a fit is that of its best validation
    epoch. With a ``WandbLogger`` the pictures are logged as ``confusion/<split>/<task>`` and ``…_normalised``, and the
    counts as an interactive chart with its table, ``…_chart``.

    Args:
        every_n_epochs: while fitting, also after every so many epochs with validation; 0 for the best epoch only, at
            the end.

    Raises:
        UserError: for a negative number.
    """

    def __init__(self, every_n_epochs: int = 0) -> None:
        super().__init__()
        if every_n_epochs < 0:
            raise UserError(f"ConfusionMatrixLogger.every_n_epochs: must not be negative, got {every_n_epochs}")
        self.every_n_epochs = every_n_epochs

    def reports_epoch(self, epoch: int) -> bool:
        """Whether it is the turn of this epoch."""
        return self.every_n_epochs > 0 and (epoch + 1) % self.every_n_epochs == 0

    def report(self, trainer: Trainer, counted: CountedSplit, confusions: Mapping[str, pd.DataFrame]) -> None:
        """Write the files and log them to W&B."""
        folder = Path(trainer.default_root_dir) / "figures"
        pictures: dict[str, Path] = {}
        for task, counts in confusions.items():
            epoch = f", epoch {counted.epoch}" if counted.split == "val" else ""
            title = f"{task} ({counted.split}{epoch}, n = {int(counts.to_numpy().sum())})"
            for suffix, matrix in (("", counts), ("_normalised", normalise_by_target(counts))):
                stem = f"confusion_{counted.split}_{file_name(task)}{suffix}"
                pictures[f"{file_name(task)}{suffix}"] = folder / f"{stem}.png"
                save_figure(confusion_figure(matrix, title), folder / f"{stem}.png")
                write_csv(folder / f"{stem}.csv", matrix, index=True)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                media = _wandb_media(f"confusion/{counted.split}", pictures, confusions)
                logger.log_metrics(media, step=trainer.global_step)


def _wandb_media(key: str, pictures: Mapping[str, Path], confusions: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    import wandb

    media: dict[str, Any] = {f"{key}/{name}": wandb.Image(str(path)) for name, path in pictures.items()}
    for task, counts in confusions.items():
        media[f"{key}/{task}_chart"] = wandb.plot_table(
            vega_spec_name="wandb/confusion_matrix/v1",
            data_table=wandb.Table(columns=CHART_COLUMNS, data=_cells(counts)),
            fields={column: column for column in CHART_COLUMNS},
            string_fields={"title": f"{key}/{task}"},
        )
    return media


def _cells(counts: pd.DataFrame) -> list[list[str | int]]:
    """Target, answer and count of each cell that is not empty, and of the diagonal, so that every class occurs.

    W&B's own ``wandb.plot.confusion_matrix`` wants every single sample and writes every cell: a hundred classes would
    fill its largest table.
    """
    values = counts.to_numpy()
    rows, columns = np.nonzero(values + np.eye(*values.shape, dtype=np.int64))
    cells = zip(rows.tolist(), columns.tolist(), strict=True)
    return [[str(counts.index[row]), str(counts.columns[column]), int(values[row, column])] for row, column in cells]
