"""Base of the callbacks that read what evaluation and prediction steps return."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from vitrail.errors import UserError
from vitrail.types import Outputs, Split

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
