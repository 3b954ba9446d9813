"""One line an epoch: the loss, the monitored metric, and the best so far."""

from __future__ import annotations

import sys

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.best_checkpoint import BestCheckpoint


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
