"""What callbacks collect of each split while it is evaluated, and the predictions that are written from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from vitrail.errors import UserError
from vitrail.predictions import Predictions, join_predictions, read_predictions, write_predictions
from vitrail.runs import Run
from vitrail.types import Outputs, Split, TaskKind

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule


class OutputCollector(Callback):
    """Passes Lightning's hooks of validation, testing and prediction on, with the split. Sanity checks do not count.

    Attributes:
        splits: which of ``val``, ``test`` and ``predict`` are collected.
        during_fit: whether the validations of a training are collected.
    """

    splits: Collection[str] = ("val", "test")
    during_fit = True

    def start(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Prepare for the first batch of a split."""

    def collect(self, trainer: Trainer, pl_module: LightningModule, split: Split, outputs: object, batch: Any) -> None:
        """Take the outputs of a step."""

    def finish(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Use what was collected; all metrics are logged by now."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call ``start``."""
        self._pass_on("start", trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call ``start``."""
        self._pass_on("start", trainer, pl_module, "test")

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call ``start``."""
        self._pass_on("start", trainer, pl_module, "predict")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Call ``collect``."""
        self._pass_on("collect", trainer, pl_module, "val", outputs, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Call ``collect``."""
        self._pass_on("collect", trainer, pl_module, "test", outputs, batch)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Call ``collect``."""
        self._pass_on("collect", trainer, pl_module, "predict", outputs, batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call ``finish``."""
        self._pass_on("finish", trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call ``finish``."""
        self._pass_on("finish", trainer, pl_module, "test")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call ``finish``."""
        self._pass_on("finish", trainer, pl_module, "predict")

    def _pass_on(self, hook: str, trainer: Trainer, pl_module: LightningModule, split: Split, *values: Any) -> None:
        fits = trainer.state.fn == TrainerFn.FITTING
        if split in self.splits and not trainer.sanity_checking and (self.during_fit or not fits):
            getattr(self, hook)(trainer, pl_module, split, *values)

    def _check_splits(self, known: Collection[str]) -> None:
        if unknown := sorted(set(self.splits) - set(known)):
            raise UserError(f"{type(self).__name__}.splits: must be one of {', '.join(known)}; got {unknown[0]!r}")

    def _outputs(self, outputs: object, pl_module: LightningModule) -> Outputs:
        if not isinstance(outputs, Mapping) or not {"sample_id", "logits", "targets"} <= outputs.keys():
            raise UserError(
                f"{type(self).__name__}: the steps of {type(pl_module).__name__} do not return sample_id, logits and "
                f"targets (vitrail.types.Outputs); leave the callback out or let them"
            )
        return cast("Outputs", outputs)

    def _samples(self, trainer: Trainer) -> ImageDataModule:
        datamodule = getattr(trainer, "datamodule", None)
        if not all(hasattr(datamodule, name) for name in ("tasks", "sample_names", "group_names")):
            raise UserError(
                f"{type(self).__name__}: needs a DataModule that names classes, samples and groups, such as an "
                "ImageDataModule; pass the trainer a `datamodule`"
            )
        return cast("ImageDataModule", datamodule)


WrittenSplit = Literal["val", "test", "predict"]


class PredictionWriter(OutputCollector):
    """Writes ``predictions/<split>.parquet`` in the run directory, each sample once (see ``vitrail.predictions``).

    On several processes each writes its own share atomically, and the first one joins them. The run directory
    must be one that all processes see.

    Args:
        splits: which of ``val``, ``test`` and ``predict`` are written. ``val`` is written by ``validate`` only, not
            while fitting.
    """

    during_fit = False

    def __init__(self, splits: list[WrittenSplit] | None = None) -> None:
        self.splits: list[WrittenSplit] = ["test", "predict"] if splits is None else splits
        self._check_splits(get_args(WrittenSplit))
        self._batches: list[Outputs] = []

    def collect(self, trainer: Trainer, pl_module: LightningModule, split: Split, outputs: object, batch: Any) -> None:
        """Keep a batch."""
        found = self._outputs(outputs, pl_module)
        self._batches.append(
            {
                "sample_id": found["sample_id"].cpu(),
                "logits": {task: values.float().cpu() for task, values in found["logits"].items()},
                "targets": {task: values.cpu() for task, values in found["targets"].items()},
            }
        )

    def finish(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Write the file."""
        batches, self._batches = self._batches, []
        # Without classes there is nothing to predict: captions have their own report.
        if not batches or not batches[0]["logits"] or getattr(trainer, "fast_dev_run", False):
            return
        predictions = self._described(batches, trainer, pl_module)
        folder = Path(trainer.default_root_dir) / Run.PREDICTIONS
        if trainer.world_size == 1:
            joined, _ = join_predictions([predictions])
            write_predictions(folder / f"{split}.parquet", joined)
            return
        shards = [folder / f".{split}.rank{rank}.parquet" for rank in range(trainer.world_size)]
        write_predictions(shards[trainer.global_rank], predictions)
        trainer.strategy.barrier("every process has written its predictions")
        if trainer.is_global_zero:
            joined, dropped = join_predictions([read_predictions(shard) for shard in shards])
            write_predictions(folder / f"{split}.parquet", joined)
            for shard in shards:
                shard.unlink()
            if dropped:
                rank_zero_info(f"PredictionWriter: {dropped} samples came twice and were counted once.")

    def _described(self, batches: list[Outputs], trainer: Trainer, pl_module: LightningModule) -> Predictions:
        samples = self._samples(trainer)
        sample_id = torch.cat([batch["sample_id"] for batch in batches]).numpy()
        names, groups = samples.sample_names(), samples.group_names()
        tasks = list(batches[0]["logits"])
        kinds: dict[str, TaskKind] = getattr(pl_module, "task_kinds", {})
        return Predictions(
            sample_id=sample_id,
            names=np.array([names[index] for index in sample_id], dtype=object),
            groups=np.array([groups[index] for index in sample_id], dtype=object),
            tasks={task: samples.tasks[task] for task in tasks},
            targets={task: torch.cat([batch["targets"][task] for batch in batches]).numpy() for task in tasks},
            logits={task: torch.cat([batch["logits"][task] for batch in batches]).numpy() for task in tasks},
            kinds={task: kind for task, kind in kinds.items() if task in tasks},
            thresholds=dict(getattr(pl_module, "thresholds", {})),
        )
