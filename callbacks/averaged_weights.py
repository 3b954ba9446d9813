"""Averaged weights (EMA), and what they mean: the weights that were validated are saved, and used by every command.

Lightning's callbacks average, and exchange the weights for a validation. This sees to the rest, for them and for any
callback derived from them:

- Before the first average was taken, the average *is* the weights that are trained. Lightning's is the copy made before
  training, so a late start would validate and save an untrained network (Lightning #21724).
- After training, the average is gone: a checkpoint that is tested then is loaded as it is. Lightning would go back to
  the weights that were not averaged.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info

from vitrail.errors import UserError

Decay = restricted_number_type(None, float, [(">=", 0), ("<", 1)])

_RAW = "current_model_state"
"""Where Lightning keeps the weights that are trained; ``state_dict`` holds their average."""


@dataclass
class EmaOptions:
    """An exponential moving average of the weights.

    Args:
        decay: share of the average that stays at each update, in [0, 1).
        start_step: optimizer steps before the first update; until then there is no average.
        every_n_steps: optimizer steps from one update to the next.
    """

    decay: Decay = 0.999  # type: ignore[valid-type]  # made at run time
    start_step: NonNegativeInt = 0
    every_n_steps: PositiveInt = 1

    def callback(self) -> EMAWeightAveraging:
        """Lightning's callback with these settings."""
        callback = EMAWeightAveraging(
            update_every_n_steps=int(self.every_n_steps),
            # Lightning counts steps from 0 and asks after each one.
            update_starting_at_step=int(self.start_step),
        )
        # torch's own average of equal values differs from them in the last digits, so frozen weights would drift.
        callback._kwargs["avg_fn"] = _moving_average(float(self.decay))
        return callback


class AveragedWeights(Callback):
    """Makes every ``WeightAveraging`` mean the same. It must come before it.

    Raises:
        UserError: if two callbacks average, weights are shared out among processes, or a training with averaged weights
            would go on without.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what does not go together; forget the average of a training that is over."""
        averages = _averages(trainer)
        if stage != "fit":
            for average in averages:
                average._average_model = None
            return
        if len(averages) > 1:
            names = ", ".join(type(average).__name__ for average in averages)
            raise UserError(f"ema, trainer.callbacks: {names} all average weights; leave one of them")
        if averages and isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise UserError("ema: sharded weights cannot be averaged; leave it out, or train with strategy: ddp")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Complete what a checkpoint leaves out because it can be found again."""
        if trainer.state.fn != "fit" or _RAW not in checkpoint:
            return
        if not _averages(trainer):
            raise UserError(
                "--ckpt_path: was trained with averaged weights; training can only go on with them: set `ema` as before"
            )
        _complete(trainer, pl_module)
        checkpoint["state_dict"] = {**pl_module.state_dict(), **checkpoint["state_dict"]}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See to it that everything that is trained is averaged, and where it is trained.

        Lightning makes the copy before the network is on its device, so every update would copy all weights to the CPU.
        How many updates there were is read in each: that number stays there.
        """
        _complete(trainer, pl_module)
        for average in _averages(trainer):
            if average._device is None and (model := average._average_model) is not None:
                model.module.to(pl_module.device)
                model.n_averaged = model.n_averaged.cpu()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the weights themselves be validated where there is no average yet."""
        self._follow(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the weights themselves be saved where there is no average yet."""
        self._follow(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where no average was ever taken."""
        if self._follow(trainer, pl_module):
            rank_zero_info(
                f"ema: no average was taken in {trainer.global_step} steps; the checkpoints hold the weights as they "
                "were trained. Lower ema.start_step or train for longer"
            )

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Make the average the weights as they are, unless it has begun; whether it had not."""
        _complete(trainer, pl_module)
        for average in _averages(trainer):
            model = average._average_model
            if model is not None and not int(model.n_averaged):
                _copy(pl_module, model.module)
                return True
        return False


@contextmanager
def average_in_place(trainer: Trainer) -> Iterator[None]:
    """While this lasts, a model in training has its averaged weights, if it has any.

    Lightning's callbacks put the average into whole checkpoints only, not into those of weights alone.
    """
    averages = [average for average in _averages(trainer) if average._average_model is not None]
    for average in averages:
        average._swap_models(trainer.lightning_module)
    try:
        yield
    finally:
        for average in averages:
            average._swap_models(trainer.lightning_module)


def _moving_average(decay: float) -> Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]:
    def average(old: torch.Tensor, new: torch.Tensor, count: Any) -> torch.Tensor:
        # Counters, as of BatchNorm, have no average.
        return torch.lerp(old, new, 1 - decay) if old.is_floating_point() else new

    return average


def _averages(trainer: Trainer) -> list[WeightAveraging]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set at run time
    return [callback for callback in callbacks if isinstance(callback, WeightAveraging)]


def _complete(trainer: Trainer, pl_module: LightningModule) -> None:
    """Copy again where a task has made its network only after Lightning had copied it for the average."""
    for average in _averages(trainer):
        model = average._average_model
        if model is not None and model.module.state_dict().keys() != pl_module.state_dict().keys():
            average.setup(trainer, pl_module, "fit")


@torch.no_grad()
def _copy(source: torch.nn.Module, target: torch.nn.Module) -> None:
    own = itertools.chain(source.parameters(), source.buffers())
    for copy, value in zip(itertools.chain(target.parameters(), target.buffers()), own, strict=True):
        copy.copy_(value)
