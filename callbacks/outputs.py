"""What the callbacks of this package share: step outputs, the samples' description, and counts of answers by target."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from callbacks.best_checkpoint import BestCheckpoint
from evaluation.classification import confusion_frame
from lightning_modules.metrics import predicted_classes
from vitrail.errors import UserError
from vitrail.types import UNKNOWN, DescribesSamples, Outputs

if TYPE_CHECKING:
    import pandas as pd


def step_outputs(outputs: object, callback: Callback, pl_module: LightningModule) -> Outputs:
    """The outputs of an evaluation or prediction step.

    Raises:
        UserError: if the task returns something else.
    """
    if not isinstance(outputs, Mapping) or not {"sample_id", "logits", "targets"} <= outputs.keys():
        raise UserError(
            f"{type(callback).__name__}: the steps of {type(pl_module).__name__} do not return sample_id, logits and "
            f"targets (vitrail.types.Outputs); leave the callback out or let them"
        )
    return cast("Outputs", outputs)


def describes_samples(trainer: Trainer, callback: Callback) -> DescribesSamples:
    """The DataModule, which knows the names of classes, samples and groups.

    Raises:
        UserError: if there is none or it does not know.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if not all(hasattr(datamodule, name) for name in ("tasks", "sample_names", "group_names")):
        raise UserError(
            f"{type(callback).__name__}: needs a DataModule that names classes, samples and groups "
            f"(vitrail.types.DescribesSamples); pass the trainer a `datamodule`"
        )
    return cast("DescribesSamples", datamodule)


@dataclass(frozen=True)
class CountedSplit:
    """Answers of all samples of a split, over all processes.

    Attributes:
        split: val or test.
        counts: for each task int64 ``(C, C + 1)``, rows are targets, columns predictions, the last one for samples
            without a prediction; unknown targets are not counted.
        epoch: epoch after which they were counted, counted from 0.
        score: the metric by which the best checkpoint is chosen, at that epoch; None where there is none.
    """

    split: str
    counts: Mapping[str, torch.Tensor]
    epoch: int
    score: float | None


class ConfusionCounter(Callback, ABC):
    """Base of callbacks that report answers by target after validation and test.

    While fitting, the counts of the best epoch are kept, best by the metric and mode of the trainer's first
    ``ModelCheckpoint`` that has one, so that what is reported belongs to the checkpoint that is kept; without such a
    metric, those of the last epoch. They are reported at the end, and are part of the checkpoint, so that a resumed run
    reports the same. Sanity checking does not count.
    """

    def __init__(self) -> None:
        self._counts: dict[str, torch.Tensor] = {}
        self._kept: CountedSplit | None = None

    @abstractmethod
    def report(self, trainer: Trainer, counted: CountedSplit, confusions: Mapping[str, pd.DataFrame]) -> None:
        """Write what was counted; called on the first process only.

        Args:
            trainer: gives the run directory and the loggers.
            counted: what was counted, and when.
            confusions: for each task the counts with class names.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; a checkpoint is restored after this."""
        if stage == "fit":
            self._kept = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self._counts = {}

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self._counts = {}

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        if not trainer.sanity_checking:
            self._count(step_outputs(outputs, self, pl_module))

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        self._count(step_outputs(outputs, self, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the counts of the best epoch while fitting, report them otherwise."""
        if trainer.sanity_checking:
            return
        counted = self._total(trainer, "val")
        if trainer.state.fn != TrainerFn.FITTING:
            self._report(trainer, counted)
            return
        if self._kept is None or _is_better(trainer, counted.score, self._kept.score):
            self._kept = counted
        if self.reports_epoch(counted.epoch):
            self._report(trainer, counted)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the counts of the best epoch."""
        if self._kept is not None:
            self._report(trainer, self._kept)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the counts."""
        self._report(trainer, self._total(trainer, "test"))

    def reports_epoch(self, epoch: int) -> bool:
        """Whether a validation during fitting is reported at once as well."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """The counts of the best epoch so far, as tensors and plain values."""
        kept = self._kept
        if kept is None:
            return {}
        return {"split": kept.split, "counts": dict(kept.counts), "epoch": kept.epoch, "score": kept.score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts of the best epoch so far."""
        self._kept = CountedSplit(**state_dict) if state_dict else None

    def _count(self, outputs: Outputs) -> None:
        for task, logits in outputs["logits"].items():
            num_classes, targets = logits.shape[1], outputs["targets"][task]
            if task not in self._counts:
                shape = num_classes, num_classes + 1
                self._counts[task] = torch.zeros(shape, dtype=torch.int64, device=logits.device)
            # Unknown targets weigh nothing; selecting the known ones would make a GPU wait for the processor.
            predicted = predicted_classes(logits)
            columns = torch.where(predicted == UNKNOWN, num_classes, predicted)
            cells = targets.clamp(min=0) * (num_classes + 1) + columns
            self._counts[task].view(-1).scatter_add_(0, cells, (targets != UNKNOWN).long())

    def _total(self, trainer: Trainer, split: str) -> CountedSplit:
        totals = {task: trainer.strategy.reduce(counts, reduce_op="sum") for task, counts in self._counts.items()}
        self._counts = {}
        counts = {task: total.cpu() for task, total in totals.items()}
        return CountedSplit(split, counts, trainer.current_epoch, _score(trainer))

    def _report(self, trainer: Trainer, counted: CountedSplit) -> None:
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        tasks = describes_samples(trainer, self).tasks
        confusions = {}
        for task, counts in counted.counts.items():
            names = tasks.get(task, [])
            if len(names) != len(counts):
                raise UserError(
                    f"{type(self).__name__}: the model tells {len(counts)} classes of '{task}' apart, the data name "
                    f"{len(names)}; use the data that the model was trained on"
                )
            confusions[task] = confusion_frame(counts.numpy(), names)
        self.report(trainer, counted, confusions)


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
