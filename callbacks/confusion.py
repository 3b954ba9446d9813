"""Confusion matrices and class reports of validation and test, in the run directory and in W&B."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from callbacks.best_checkpoint import BestCheckpoint
from callbacks.outputs import OutputCollector
from callbacks.trackers import log_images, log_table
from evaluation.report.figures import MAX_DRAWN, confusion_image, save_figure
from evaluation.tables.per_class import SparseConfusion, class_report, confusion_frame, normalise_by_target
from evaluation.tables.summary import share
from lightning_modules.metrics import predicted_classes
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.files import write_csv
from vitrail.predictions import other_kinds
from vitrail.runs import Run
from vitrail.trust import file_name
from vitrail.types import CLASS_KINDS, UNKNOWN, Split, kind_of

if TYPE_CHECKING:
    import pandas as pd

    Confusion = pd.DataFrame | SparseConfusion


MANY_CLASSES = 1000
"""Classes beyond which only pairs of target and prediction that occur are counted: 10,000 have 100 million pairs."""


@dataclass(frozen=True)
class CountedSplit:
    """Predictions of all samples of a split by their targets, over all processes.

    Attributes:
        split: val or test.
        counts: for each task int64 ``(C, C + 1)``, rows are targets, columns predictions, the last one for samples
            without a prediction; unknown targets are not counted. Sparse beyond ``MANY_CLASSES``.
        epoch: epoch after which they were counted, counted from 0.
        score: the metric by which the best checkpoint is chosen, at that epoch; None where there is none.
        labels: for each multi-label task the scores of its labels by name, float64 ``(C,)``.
    """

    split: str
    counts: Mapping[str, torch.Tensor]
    epoch: int
    score: float | None
    labels: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)


class ConfusionCounter(OutputCollector):
    """Base of callbacks that report predictions by target after validation and test.

    While fitting, the counts of the best epoch are kept, best by the metric and mode of the trainer's first
    ``ModelCheckpoint`` that has one, so that what is reported belongs to the checkpoint that is kept; without such a
    metric, those of the last epoch. They are reported at the end, and are part of the checkpoint, so that a resumed run
    reports the same. Only targets of one class are counted; of labels, the task's own scores are kept.
    """

    def __init__(self) -> None:
        self._counts: dict[str, torch.Tensor] = {}
        self._cells: dict[str, list[torch.Tensor]] = {}
        self._kept: CountedSplit | None = None

    @abstractmethod
    def report(self, trainer: Trainer, counted: CountedSplit, confusions: Mapping[str, Confusion]) -> None:
        """Write what was counted; called on the first process only."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; a checkpoint is restored after this."""
        if stage == "fit":
            self._kept = None

    def start(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Reset the counts."""
        self._counts, self._cells = {}, {}

    def collect(self, trainer: Trainer, pl_module: LightningModule, split: Split, outputs: object, batch: Any) -> None:
        """Count a batch."""
        found = self._outputs(outputs, pl_module)
        kinds = getattr(pl_module, "task_kinds", {})
        for task, logits in found["logits"].items():
            if kind_of(kinds, task) not in CLASS_KINDS:
                continue
            num_classes, targets = logits.shape[1], found["targets"][task]
            # Unknown targets weigh nothing; selecting the known ones would make a GPU wait for the processor.
            predicted = predicted_classes(logits)
            columns = torch.where(predicted == UNKNOWN, num_classes, predicted)
            cells = targets.clamp(min=0) * (num_classes + 1) + columns
            if num_classes > MANY_CLASSES:
                self._cells.setdefault(task, []).append(torch.where(targets == UNKNOWN, UNKNOWN, cells))
                self._counts[task] = torch.empty(num_classes, num_classes + 1, device="meta")
                continue
            if task not in self._counts:
                shape = num_classes, num_classes + 1
                self._counts[task] = torch.zeros(shape, dtype=torch.int64, device=logits.device)
            self._counts[task].view(-1).scatter_add_(0, cells, (targets != UNKNOWN).long())

    def finish(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Keep the counts of the best epoch while fitting, report them otherwise."""
        counts = {
            task: _pair_counts(trainer, torch.cat(self._cells[task]), len(counts))
            if task in self._cells
            else trainer.strategy.reduce(counts, reduce_op="sum").cpu()
            for task, counts in self._counts.items()
        }
        self._counts, self._cells = {}, {}
        labels = dict(getattr(pl_module, "label_scores", {}))
        counted = CountedSplit(split, counts, trainer.current_epoch, _score(trainer), labels)
        fits = trainer.state.fn == TrainerFn.FITTING
        if fits and (self._kept is None or _is_better(trainer, counted.score, self._kept.score)):
            self._kept = counted
        if not fits or self.reports_epoch(counted.epoch):
            self._report(trainer, counted)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the counts of the best epoch."""
        if self._kept is not None:
            self._report(trainer, self._kept)

    def reports_epoch(self, epoch: int) -> bool:
        """Whether a validation during fitting is reported at once as well."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """The counts of the best epoch so far, as tensors and plain values."""
        return dict(vars(self._kept)) if self._kept else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts of the best epoch so far."""
        self._kept = CountedSplit(**state_dict) if state_dict else None

    def _report(self, trainer: Trainer, counted: CountedSplit) -> None:
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        tasks = self._samples(trainer).tasks
        confusions: dict[str, Confusion] = {}
        for task, counts in counted.counts.items():
            names = tasks.get(task, [])
            if len(names) != len(counts):
                raise UserError(
                    f"{type(self).__name__}: the model has {len(counts)} classes of '{task}', the data "
                    f"{len(names)}; use the data that the model was trained on"
                )
            if counts.is_sparse:
                targets, predicted = counts.indices().numpy()
                confusions[task] = SparseConfusion(targets, predicted, counts.values().numpy(), names)
            else:
                confusions[task] = confusion_frame(counts.numpy(), names)
        self.report(trainer, counted, confusions)


def _pair_counts(trainer: Trainer, cells: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Counts of all processes, sparse ``(C, C + 1)``, of the cells of this one's samples, ``UNKNOWN`` or row by row."""
    if trainer.world_size > 1:
        longest = int(trainer.strategy.reduce(torch.tensor(len(cells), device=cells.device), reduce_op="max"))
        cells = trainer.strategy.all_gather(F.pad(cells, (0, longest - len(cells)), value=UNKNOWN)).flatten()
    pairs, counts = torch.unique(cells[cells != UNKNOWN].cpu(), return_counts=True)
    indices = torch.stack([pairs // (num_classes + 1), pairs % (num_classes + 1)])
    return torch.sparse_coo_tensor(indices, counts, (num_classes, num_classes + 1), is_coalesced=True)


def _score(trainer: Trainer) -> float | None:
    chooser = _chooser(trainer)
    value = trainer.callback_metrics.get(str(chooser.monitor)) if chooser else None
    return None if value is None else float(value)


def _is_better(trainer: Trainer, score: float | None, kept: float | None) -> bool:
    if score is None or kept is None:
        return True
    chooser = _chooser(trainer)
    if isinstance(chooser, BestCheckpoint) and chooser.save_top_k != 0:
        # It comes after this callback, so it has not looked at this validation yet.
        return chooser.would_be_best(score)
    if math.isnan(score) or math.isnan(kept):
        return math.isnan(kept)
    return score > kept if chooser and chooser.mode == "max" else score < kept


def _chooser(trainer: Trainer) -> ModelCheckpoint | None:
    """The callback that keeps the best checkpoint."""
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint) and saver.monitor]
    own = [saver for saver in savers if isinstance(saver, BestCheckpoint)]
    return next(iter([*own, *savers]), None)


CHART_COLUMNS = ["Actual", "Predicted", "nPredictions"]
"""As W&B's own confusion matrix names them."""


class ConfusionMatrixLogger(ConfusionCounter):
    """Writes ``figures/confusion_<split>_<task>.png`` and ``.csv``, raw and ``_normalised`` by target.

    Raw counts how many samples of each target (row) got each prediction (column), one more column being those without
    a prediction, where there are any; normalised divides by the number of the target's samples, so that the diagonal is
    the recall. The matrix of a fit is that of its best validation epoch. Of more than ``MANY_CLASSES`` classes the
    images show those confused most, and one file, ``.csv``, has the pairs that occur, with count and share. In
    experiment trackers the images are logged as ``confusion/<split>/<task>`` and ``…_normalised``, and the counts in
    W&B as an interactive chart with its table, ``…_chart``. Multi-label and regression tasks, which have no such
    matrix, are named in one line.

    Args:
        every_n_epochs: while fitting, also after every N epochs with validation; 0 for the best epoch only, at the end.
    """

    def __init__(self, every_n_epochs: int = 0) -> None:
        super().__init__()
        if every_n_epochs < 0:
            raise UserError(f"ConfusionMatrixLogger.every_n_epochs: must not be negative, got {every_n_epochs}")
        self.every_n_epochs = every_n_epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See ``ConfusionCounter``; name the tasks without a matrix."""
        super().setup(trainer, pl_module, stage)
        kinds = getattr(pl_module, "task_kinds", {})
        if without := other_kinds(kinds, kinds):
            rank_zero_info(f"confusion_matrix: left out {without}.")

    def reports_epoch(self, epoch: int) -> bool:
        """Whether it is the turn of this epoch."""
        return self.every_n_epochs > 0 and (epoch + 1) % self.every_n_epochs == 0

    def report(self, trainer: Trainer, counted: CountedSplit, confusions: Mapping[str, Confusion]) -> None:
        """Write the files and log them to W&B."""
        folder = Path(trainer.default_root_dir) / Run.FIGURES
        images: dict[str, Path] = {}
        for task, counts in confusions.items():
            epoch = f", epoch {counted.epoch}" if counted.split == "val" else ""
            title = f"{task} ({counted.split}{epoch}, n = {int(counted.counts[task].sum())})"
            stem = f"confusion_{counted.split}_{file_name(task)}"
            if isinstance(counts, SparseConfusion):
                write_csv(folder / f"{stem}.csv", counts.pairs())
                title += f": the {MAX_DRAWN} of {len(counts.class_names):,} classes that are confused most"
                matrices = counts.most_confused(MAX_DRAWN)
            else:
                matrices = counts, normalise_by_target(counts)
            for suffix, matrix in zip(("", "_normalised"), matrices, strict=True):
                images[f"{file_name(task)}{suffix}"] = folder / f"{stem}{suffix}.png"
                save_figure(confusion_image(matrix, title), folder / f"{stem}{suffix}.png")
                if not isinstance(counts, SparseConfusion):
                    write_csv(folder / f"{stem}{suffix}.csv", matrix, index=True)
        key = f"confusion/{counted.split}"
        log_images(trainer, {f"{key}/{name}": path for name, path in images.items()})
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_metrics(_wandb_charts(key, confusions), step=trainer.global_step)


def _wandb_charts(key: str, confusions: Mapping[str, Confusion]) -> dict[str, Any]:
    import wandb

    media: dict[str, Any] = {}
    for task, counts in confusions.items():
        if isinstance(counts, SparseConfusion):
            continue  # too many classes for a chart
        media[f"{key}/{task}_chart"] = wandb.plot_table(
            vega_spec_name="wandb/confusion_matrix/v1",
            data_table=wandb.Table(columns=CHART_COLUMNS, data=_cells(counts)),
            fields={column: column for column in CHART_COLUMNS},
            string_fields={"title": f"{key}/{task}"},
        )
    return media


def _cells(counts: pd.DataFrame) -> list[list[str | int]]:
    """Target, prediction and count of each cell that is not empty, and of the diagonal, so that every class occurs.

    W&B's own ``wandb.plot.confusion_matrix`` wants every single sample and writes every cell: a hundred classes would
    fill its largest table.
    """
    values = counts.to_numpy()
    rows, columns = np.nonzero(values + np.eye(*values.shape, dtype=np.int64))
    cells = zip(rows.tolist(), columns.tolist(), strict=True)
    return [[str(counts.index[row]), str(counts.columns[column]), int(values[row, column])] for row, column in cells]


class ClassReport(ConfusionCounter):
    """Writes ``reports/<split>_<task>.csv`` in the run directory after a test, a validation, and a fit.

    The report of a fit is that of its best validation epoch. Columns: ``class``, ``precision``, ``recall``, ``f1`` (0
    to 1, higher is better) and ``support``; the last rows are ``accuracy``, ``macro avg`` and ``weighted avg``. A test
    also prints one line a task, with the class that is recognised worst. Of multi-label tasks a row is a label, with
    also ``average_precision``, ``auroc`` and its ``threshold``; of regression tasks there is no report.
    """

    def report(self, trainer: Trainer, counted: CountedSplit, confusions: Mapping[str, Confusion]) -> None:
        """Write the files, and print the table after a test."""
        reports = {
            task: confusion.report() if isinstance(confusion, SparseConfusion) else class_report(confusion)
            for task, confusion in confusions.items()
        }
        names = self._samples(trainer).tasks
        of_labels = {task: _label_report(names[task], scores) for task, scores in counted.labels.items()}
        folder = Path(trainer.default_root_dir) / Run.REPORTS
        for task, frame in {**reports, **of_labels}.items():
            write_csv(folder / f"{counted.split}_{file_name(task)}.csv", frame, index=True)
            rows = frame.reset_index()
            log_table(
                trainer,
                f"report/{counted.split}/{file_name(task)}",
                list(map(str, rows.columns)),
                rows.to_numpy().tolist(),
            )
        if counted.split == "test" and reports:
            summary_table(reports).show()


def _label_report(names: Sequence[str], scores: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    """One row per label; the last one has the means."""
    import pandas as pd

    columns = ("average_precision", "auroc", "precision", "recall", "f1", "threshold", "support")
    frame = pd.DataFrame({name: scores[name].numpy() for name in columns}, index=pd.Index(list(names), name="class"))
    frame.loc["macro avg"] = frame.mean()
    frame.loc["macro avg", "support"] = frame["support"].iloc[:-1].sum()
    return frame.astype({"support": int})


def summary_table(reports: Mapping[str, pd.DataFrame]) -> Table:
    """One row per task: support, accuracy, F1, and the class with the lowest recall."""
    rows = []
    for task, frame in reports.items():
        # The last three rows: accuracy, macro average, weighted average.
        scores = [share(score) for score in frame["f1"].to_numpy(dtype=float)[-3:].tolist()]
        rows.append([task, str(frame.loc["accuracy", "support"]), *scores, _lowest_recall(frame)])
    columns = ["task", "n", "accuracy", "macro F1", "weighted F1", "lowest recall"]
    return Table(columns, rows, ("task", "lowest recall"), "test")


def _lowest_recall(frame: pd.DataFrame) -> str:
    classes = frame.iloc[:-3]
    occurring = classes[classes["support"] > 0]
    if occurring.empty:
        return ""
    place = int(occurring["recall"].to_numpy(dtype=float).argmin())
    recall, support = occurring["recall"].tolist()[place], occurring["support"].tolist()[place]
    return f"{occurring.index.tolist()[place]}: {recall:.2f} of {support}"
