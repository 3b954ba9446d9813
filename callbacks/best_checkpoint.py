"""``best.ckpt``: the weights of the best validation, whatever else is kept, also when a finished training goes on."""

from __future__ import annotations

import math
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from callbacks.averaged_weights import average_in_place
from vitrail.errors import UserError
from vitrail.files import local_folder, rename
from vitrail.runs import Run

BEST_NAME = "best"

_OTHERS = "{epoch}-{step}"


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``best.ckpt``, the weights of the validation with the best monitored value, and more of them if asked to.

    It saves right after a validation, so what is saved is what was validated. Of equal values the first one is the
    best; an epoch whose value is not a number is never the best. With ``save_top_k`` above 1, or -1 for all, the other
    checkpoints have names of their own, by ``filename`` or else ``epoch=3-step=40.ckpt``.

    A training that goes on from a checkpoint keeps the best score, and the better checkpoint, which is taken over where
    the run directory is a new one.

    Args:
        arguments: those of Lightning's ``ModelCheckpoint``; options that would save something other than what was
            validated are refused.
        named: likewise.

    Attributes:
        continues: whether scores from before the checkpoint that training goes on from can be compared with new ones.
        best_epoch: epoch of the best validation, counted from 0; None before there is one.

    Raises:
        UserError: if ``best.ckpt`` would not be the best, or not what was validated.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.continues = True
        self.best_epoch: int | None = None
        self._best_other_name = ""
        self._not_numbers = 0
        self._earlier: dict[str, Any] | None = None
        self._check()
        # `last.ckpt` is always written, by LastCheckpoint.
        self.save_last = None

    def _check(self) -> None:
        if self.monitor is None or not self.monitor.startswith(("val/", "test")):
            raise UserError(
                f"checkpoint.monitor: must be a val/… metric, by which best.ckpt is chosen; got {self.monitor!r}"
            )
        if self._every_n_train_steps > 0 or self._train_time_interval is not None:
            raise UserError(
                "checkpoint.every_n_train_steps, checkpoint.train_time_interval: best.ckpt holds weights that were "
                "validated; validate more often with trainer.val_check_interval, or write last.ckpt more often with "
                "last.every_n_train_steps or last.every_minutes"
            )
        if self._every_n_epochs != 1:
            raise UserError(
                f"checkpoint.every_n_epochs: {self._every_n_epochs} would pass by the best epoch; leave it out, and "
                "validate less often with trainer.check_val_every_n_epoch"
            )
        if self._save_on_train_epoch_end:
            raise UserError(
                "checkpoint.save_on_train_epoch_end: weights are saved right after their validation; leave it out"
            )
        if self.save_on_exception:
            raise UserError(
                "checkpoint.save_on_exception: best.ckpt holds weights that were validated; leave it out, and write "
                "last.ckpt more often with last.every_n_train_steps or last.every_minutes"
            )
        if self.dirpath is not None and local_folder(str(self.dirpath)) is None:
            raise UserError(
                f"checkpoint.dirpath: must be a folder; got {self.dirpath}; last.copy_to copies checkpoints to an "
                "object store"
            )
        if self.save_last:
            rank_zero_info("checkpoint.save_last: last.ckpt is always written, once an epoch; see `last`")

    @property
    def state_key(self) -> str:
        """One key whatever is monitored, so that a change is noticed instead of starting again in silence."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Scores and paths, and how they are compared."""
        return {
            **super().state_dict(),
            "mode": self.mode,
            "best_epoch": self.best_epoch,
            "best_other_name": self._best_other_name,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: ``on_train_start`` knows where the files are."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note what was the best so far, also of a version that used Lightning's own callback."""
        states = checkpoint.get("callbacks", {})
        # A run may have had further ones of its user's, which come before that of the command line.
        former = [key for key in states if key.startswith("ModelCheckpoint{")]
        key = self.state_key if self.state_key in states else next(reversed(former), None)
        self._earlier = None if key is None else states[key]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the best so far, and say where there is not going to be one."""
        super().on_train_start(trainer, pl_module)
        self._go_on(trainer)
        if not self.best_model_path and (reason := self.reason_for_none(trainer)):
            rank_zero_info(
                f"{reason}: there will be no {BEST_NAME}.ckpt, and nothing that could be tested after training."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the best so far where nothing was left to train, so that no training began."""
        self._go_on(trainer)

    def _go_on(self, trainer: Trainer) -> None:
        earlier, self._earlier = self._earlier, None
        if earlier is not None and trainer.ckpt_path is not None and earlier["best_model_score"] is not None:
            if reason := self._reason_to_forget(trainer, earlier):
                rank_zero_info(f"Earlier epochs do not count for {BEST_NAME}.ckpt: {reason}.")
            else:
                rank_zero_info(
                    f"The best epoch so far has {self.monitor} {float(earlier['best_model_score']):.4g}; its "
                    f"weights are in {self.best_model_path}"
                )

    def would_be_best(self, value: float) -> bool:
        """Whether a validation with this value is better than all before it."""
        if math.isnan(value):
            return False
        return self.best_model_score is None or self._is_better(torch.tensor(value), self.best_model_score)

    def reason_for_none(self, trainer: Trainer) -> str:
        """Why a training does not make, or has not made, a best checkpoint; empty where it is going to."""
        if getattr(trainer, "fast_dev_run", False):
            return "trainer.fast_dev_run keeps no checkpoints"
        if self.save_top_k == 0:
            return "checkpoint.save_top_k: 0 keeps no checkpoints"
        if self._not_numbers:
            return f"{self.monitor} was not a number in any validation"
        if reason := reason_for_no_validation(trainer):
            return f"No validation takes place ({reason})"
        return "" if trainer.training else "No validation took place before training ended"

    def _reason_to_forget(self, trainer: Trainer, earlier: dict[str, Any]) -> str:
        """Take over what is known of earlier epochs, unless there is a reason against it, which is returned."""
        if not self.continues:
            return "the run that training goes on from had other data or another validation"
        if earlier["monitor"] != self.monitor or earlier.get("mode", self.mode) != self.mode:
            return f"they were compared by {earlier['monitor']}, now {self.monitor} ({self.mode}) is monitored"
        assert self.dirpath is not None
        folder, source = Path(self.dirpath).resolve(), Path(str(trainer.ckpt_path)).resolve().parent
        if earlier["dirpath"] and not (source / Path(earlier["best_model_path"]).name).is_file():
            source = Path(earlier["dirpath"]).resolve()
        best_name = Path(earlier["best_model_path"]).name
        if source != folder and not _is_of_the_past(source / best_name, trainer.global_step):
            return f"{source / best_name} is not there, or is of an epoch that comes later"
        # Of an older version the best one may have had another name.
        sign = 1 if self.mode == "min" else -1
        scores = sorted(
            earlier["best_k_models"].items(),
            key=lambda item: (sign * float(item[1]), Path(item[0]).name != best_name),
        )
        # Fewer may be kept than before.
        scores = scores[: self.save_top_k] if self.save_top_k > 0 else scores
        names = {path: f"{BEST_NAME}.ckpt" if Path(path).name == best_name else Path(path).name for path, _ in scores}
        if trainer.is_global_zero:
            for path, own in names.items():
                _take_over(source / Path(path).name, folder / own)
        trainer.strategy.barrier()
        self.best_k_models = {str(folder / names[path]): score for path, score in scores}
        self.best_model_path = str(folder / f"{BEST_NAME}.ckpt")
        self.best_model_score = earlier["best_model_score"]
        self.best_epoch = earlier.get("best_epoch")
        self._best_other_name = earlier.get("best_other_name", "")
        self._note_worst()
        return ""

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        # By then averaged weights may have moved on from those that were validated.
        return False

    def _save_monitor_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, torch.Tensor]) -> None:
        value = monitor_candidates.get(str(self.monitor))
        if value is None or not torch.isnan(value):
            super()._save_monitor_checkpoint(trainer, monitor_candidates)
            return
        self._not_numbers += 1
        rank_zero_info(
            f"{self.monitor} is not a number in epoch {trainer.current_epoch + 1}: it cannot be the best one."
        )
        if self.save_top_k == -1:
            self._save_checkpoint(trainer, self._path(self._other_name(monitor_candidates)))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        with average_in_place(trainer) if self.save_weights_only else nullcontext():
            super()._save_checkpoint(trainer, filepath)

    def _update_best_and_save(
        self, current: torch.Tensor, trainer: Trainer, monitor_candidates: dict[str, torch.Tensor]
    ) -> None:
        best_path, other_name = self._path(f"{BEST_NAME}.ckpt"), self._other_name(monitor_candidates)
        is_best = self.best_model_score is None or self._is_better(current, self.best_model_score)
        if is_best and best_path in self.best_k_models:
            score = self.best_k_models.pop(best_path)
            if self.save_top_k != 1:
                former = self._path(self._best_other_name)
                if trainer.is_global_zero:
                    _take_over(Path(best_path), Path(former))
                self.best_k_models[former] = score
        superfluous = ""
        if 0 < self.save_top_k <= len(self.best_k_models):
            superfluous = self._worst()
            self.best_k_models.pop(superfluous)
        path = best_path if is_best else self._path(other_name)
        self.current_score = self.best_k_models[path] = current
        if is_best:
            self.best_model_path, self.best_model_score = path, current
            self.best_epoch, self._best_other_name = trainer.current_epoch, other_name
        self._note_worst()
        if self.verbose:
            rank_zero_info(f"Epoch {trainer.current_epoch}: {self.monitor} {float(current):.5f}, saved as {path}")
        self._save_checkpoint(trainer, path)
        if superfluous and self._should_remove_checkpoint(trainer, superfluous, path):
            self._remove_checkpoint(trainer, superfluous)

    def _is_better(self, value: torch.Tensor, than: torch.Tensor) -> bool:
        return bool(value < than) if self.mode == "min" else bool(value > than)

    def _worst(self) -> str:
        choose = max if self.mode == "min" else min
        return choose(self.best_k_models, key=lambda path: float(self.best_k_models[path]))

    def _note_worst(self) -> None:
        if self.best_k_models and len(self.best_k_models) == self.save_top_k:
            self.kth_best_model_path = self._worst()
            self.kth_value = self.best_k_models[self.kth_best_model_path]

    def _path(self, name: str) -> str:
        assert self.dirpath is not None
        return str(Path(self.dirpath) / name)

    def _other_name(self, monitor_candidates: dict[str, torch.Tensor]) -> str:
        """Name of a checkpoint that is not, or no longer, the best one; unlike all others."""
        pattern = self.filename if self.filename not in {None, BEST_NAME} else _OTHERS
        if "{" not in str(pattern):
            pattern = f"{pattern}-{_OTHERS}"
        elif "{step" not in str(pattern):
            pattern = f"{pattern}-{{step}}"
        name = self._format_checkpoint_name(
            pattern, dict(monitor_candidates), auto_insert_metric_name=self.auto_insert_metric_name
        )
        return name.replace("/", "_") + self.FILE_EXTENSION


def reason_for_no_validation(trainer: Trainer) -> str:
    """Why a training that begins now, or goes on, ends before its next validation; empty where it does not."""
    if not trainer.enable_validation:
        return "trainer.limit_val_batches is 0"
    counts: Any = trainer.num_val_batches
    # There are none yet where the first epochs are not validated.
    if counts and not sum(counts):
        return "the validation split is empty"
    batches = trainer.num_training_batches
    interval: Any = trainer.val_check_batch
    if interval is None or math.isinf(batches) or math.isinf(interval):
        return ""  # by the clock, or without an end
    batches, every = int(batches), trainer.check_val_every_n_epoch
    done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    if every is None:
        first = (done // int(interval) + 1) * int(interval)
        key = f"trainer.val_check_interval is {trainer.val_check_interval} batches"
    else:
        first = ((trainer.current_epoch // every + 1) * every - 1) * batches + int(interval)
        key = f"trainer.check_val_every_n_epoch is {every}"
    ends = math.inf if trainer.max_epochs is None or trainer.max_epochs < 0 else trainer.max_epochs * batches
    if first > ends:
        return f"{key}, and training ends after {trainer.max_epochs} epochs"
    if trainer.max_steps >= 0:
        epochs, steps = divmod(trainer.max_steps, math.ceil(batches / trainer.accumulate_grad_batches))
        if first > epochs * batches + min(steps * trainer.accumulate_grad_batches, batches):
            return f"training ends after trainer.max_steps: {trainer.max_steps}, the first validation is later"
    return ""


def _is_of_the_past(path: Path, step: int) -> bool:
    """Whether a checkpoint was written at or before a step of the training."""
    if not path.is_file():
        return False
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return bool(saved["global_step"] <= step)


def _take_over(source: Path, target: Path) -> None:
    """Give a file a second name. Checkpoints are only ever replaced, so both names keep what they have."""
    if not source.is_file() or (target.exists() and target.samefile(source)):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    rename(partial, target)


def keep_weights(trainer: Trainer) -> None:
    """Write the checkpoint ``best`` of weights that came from none, as those of a zero-shot model, which it names."""
    best = Path(trainer.default_root_dir) / Run.BEST
    if not trainer.strategy.broadcast(bool(trainer.ckpt_path) or best.exists()):
        trainer.save_checkpoint(best, weights_only=True)
