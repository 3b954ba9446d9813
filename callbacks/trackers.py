"""Progress on the terminal, and figures, tables, embeddings and the configuration in W&B, TensorBoard and MLflow.

Lightning's loggers share a way to log numbers only; here is one for the rest. Other loggers get numbers alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from callbacks.best_checkpoint import BestCheckpoint
from datamodules.loading.decode import read_image
from lightning_modules.base import VisionTask
from vitrail.types import LOSS_OF_STEP

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_ROWS = 10_000
"""Of a table in a tracker: W&B shows no more."""


@rank_zero_only
def log_images(trainer: Trainer, images: Mapping[str, Path]) -> None:
    """Log image files.

    Args:
        trainer: whose loggers get them, at its global step.
        images: files by key, such as ``confusion/test/class``.
    """
    step = trainer.global_step
    for logger in trainer.loggers:
        match logger:
            case WandbLogger():
                import wandb

                logger.log_metrics({key: wandb.Image(str(path)) for key, path in images.items()}, step=step)
            case TensorBoardLogger():
                for key, path in images.items():
                    logger.experiment.add_image(key, read_image(path), step)
            case MLFlowLogger():
                for key, path in images.items():
                    logger.experiment.log_artifact(str(logger.run_id), str(path), str(Path(key).parent))


@rank_zero_only
def log_table(trainer: Trainer, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Log a table, of which the first 10,000 rows are kept.

    Args:
        trainer: whose loggers get it, at its global step.
        key: such as ``report/test/class``.
        columns: headings.
        rows: one value for each column.
    """
    _log_table(trainer.loggers, trainer.global_step, key, columns, rows)


def _log_table(
    loggers: Sequence[Logger], step: int, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    kept = [list(row) for row in rows[:MOST_ROWS]]
    for logger in loggers:
        match logger:
            case WandbLogger():
                import wandb

                logger.log_metrics({key: wandb.Table(columns=list(columns), data=kept)}, step=step)
            case TensorBoardLogger():
                from vitrail.console import Table

                cells = [[str(value) for value in row] for row in kept]
                logger.experiment.add_text(key, Table(list(columns), cells).markdown(), step)
            case MLFlowLogger():
                import json

                # The layout of MLflow's own `log_table`, which needs the whole package.
                content = json.dumps({"columns": list(columns), "data": kept}, default=str)
                logger.experiment.log_text(str(logger.run_id), content, f"{key}.json")


@rank_zero_only
def log_embeddings(
    trainer: Trainer, key: str, texts: Mapping[str, Sequence[Any]], vectors: NDArray[np.floating]
) -> None:
    """Log embeddings for a tracker's projector, in TensorBoard, or as a table with a column for each dimension.

    Args:
        trainer: whose loggers get them, at its global step.
        key: such as ``embeddings/test``.
        texts: n values of each column that describes them; of more than 10,000 rows the first are kept.
        vectors: float ``(n, D)``.
    """
    described = list(zip(*(values[:MOST_ROWS] for values in texts.values()), strict=True))
    vectors = vectors[:MOST_ROWS]
    projectors = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    for logger in projectors:
        # Cells are separated by tabs, and a column alone has no heading.
        cells = [[" ".join(str(value).split()) for value in row] for row in described]
        header = list(texts) if len(texts) > 1 else None
        metadata = cells if header else [row[0] for row in cells]
        logger.experiment.add_embedding(vectors, metadata, None, trainer.global_step, key, header)
    others = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger | MLFlowLogger)]
    if others:
        names = [*texts, *(f"e{place}" for place in range(vectors.shape[1]))]
        rows = [[*row, *vector] for row, vector in zip(described, vectors.tolist(), strict=True)]
        _log_table(others, trainer.global_step, key, names, rows)


@rank_zero_only
def log_configuration(loggers: Sequence[Logger], text: str, content: Mapping[str, Any]) -> None:
    """Log the run's configuration.

    Args:
        loggers: that get it.
        text: YAML.
        content: the same as values.
    """
    for logger in loggers:
        match logger:
            case WandbLogger():
                # Flat keys of this name belong to a sweep, and W&B refuses to change those (Lightning #7679).
                logger.experiment.config.update({"experiment": dict(content)}, allow_val_change=True)
            case TensorBoardLogger():
                logger.experiment.add_text("config", f"```yaml\n{text}\n```")
            case MLFlowLogger():
                logger.experiment.log_text(str(logger.run_id), text, "config.yaml")


class ProgressBar(RichProgressBar):
    """Lightning's bar with the loss of the last logged step; reading those of all steps would make a GPU wait."""

    _loss = ""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return what is shown next to the bar."""
        values = super().get_metrics(trainer, pl_module)
        is_logged = isinstance(pl_module, VisionTask) and pl_module.is_logged(trainer.fit_loop.batch_idx)
        if trainer.training and is_logged and LOSS_OF_STEP in trainer.logged_metrics:
            self._loss = f"{float(trainer.logged_metrics[LOSS_OF_STEP]):.3g}"
        return {**values, **({LOSS_OF_STEP: self._loss} if self._loss else {})}


class EpochLines(Callback):
    """Prints ``epoch 3/14: train/loss 0.512, val/loss 0.608, val/class/f1_macro 0.71 (best 0.74, epoch 2)``.

    Only the first process prints, with and without a progress bar, to a terminal or into a file. Where there are
    several validations in an epoch, each has a line.
    """

    def __init__(self) -> None:
        self._ended = False
        self._validated = False
        self._epoch = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._ended = self._validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the values are new."""
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._validated = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Print the line of a validation within an epoch."""
        if self._validated and not self._ended:
            self._print(trainer, trainer.current_epoch, f", step {trainer.global_step}", with_loss=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the epoch is over; the task logs its loss only after this, so the line comes in the next hook."""
        self._ended, self._epoch = True, trainer.current_epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the epoch before."""
        if self._ended:
            self._print(trainer, self._epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the last epoch."""
        if self._ended:
            self._print(trainer, self._epoch)

    def _print(self, trainer: Trainer, epoch: int, where: str = "", *, with_loss: bool = True) -> None:
        validated, self._validated, self._ended = self._validated, False, False
        if not trainer.is_global_zero:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set at run time
        saver = next((callback for callback in callbacks if isinstance(callback, BestCheckpoint)), None)
        monitor = saver.monitor if saver else None
        names = [*(["train/loss"] if with_loss else []), *(["val/loss"] if validated else [])]
        parts = [
            f"{name} {trainer.callback_metrics[name]:.4g}"
            for name in names
            if name in trainer.callback_metrics and name != monitor
        ]
        if monitor is not None and validated and monitor in trainer.callback_metrics:
            value = float(trainer.callback_metrics[monitor])
            parts.append(f"{monitor} {value:.4g}{_best(saver, epoch, value)}")
        elif not validated:
            parts.append(f"no validation{_best(saver, epoch)}")
        of = f"/{trainer.max_epochs}" if trainer.max_epochs is not None and trainer.max_epochs > 0 else ""
        _write(f"epoch {epoch + 1}{of}{where}: {', '.join(parts)}")


def _best(saver: BestCheckpoint | None, epoch: int, value: float | None = None) -> str:
    """What is known of the best validation; of several in an epoch only the one with its value is the best."""
    if saver is None or saver.best_model_score is None:
        return ""
    if saver.best_epoch == epoch and value == float(saver.best_model_score):
        return " (best so far)"
    when = "" if saver.best_epoch is None else f", epoch {saver.best_epoch + 1}"
    return f" (best {float(saver.best_model_score):.4g}{when})"


def _write(line: str) -> None:
    """Print a line without tearing a progress bar apart."""
    from tqdm import tqdm  # type: ignore[import-untyped]  # it has no types

    tqdm.write(line)
    sys.stdout.flush()
