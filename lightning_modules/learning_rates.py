"""How the learning rates of ``optim`` reach the optimizer, and how they grow with the batch where that is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info

from lightning_modules.optim import LR_BASE_BATCH, OptimOptions, TrainingPhase, learning_rate
from lightning_modules.schedules import steps_of_training
from vitrail.errors import UserError


def set_learning_rates(trainer: Trainer, phases: Sequence[TrainingPhase], options: OptimOptions) -> None:
    """Give each parameter group the learning rate of the step that comes next.

    Raises:
        UserError: if the phases, the length of the training or the data do not allow it.
    """
    step, steps_per_epoch, total_steps = _place_in_training(trainer)
    factor = _factor_of(trainer, options)
    for group in trainer.optimizers[0].param_groups:
        lr = learning_rate(phases, group["part"], step, steps_per_epoch, total_steps, group.get("own_lr"))
        group["lr"] = lr * group["lr_scale"] * factor


def tell_scaling(trainer: Trainer, phases: Sequence[TrainingPhase], options: OptimOptions) -> None:
    """Print one line with the resulting rates, where they are scaled."""
    rule = options.get("lr_scaling", "none")
    if rule == "none":
        return
    factor, samples = _factor_of(trainer, options), _samples_of_step(trainer)
    highest = ", ".join(f"{part} {lr * factor:.3g}" for phase in phases for part, lr in phase.lr.items() if lr)
    rank_zero_info(
        f"lr_scaling {rule}: {samples} samples a step, written for {options.get('lr_base_batch', LR_BASE_BATCH)}; "
        f"learning rates x {factor:.4g}, at most {highest}"
    )


def scaling_factor(options: OptimOptions, samples: int | None) -> float:
    """What all learning rates are multiplied by because of the samples of a step.

    Args:
        options: ``lr_scaling`` and ``lr_base_batch`` are read.
        samples: of a step, on all processes and in all accumulated batches together; None where the data do not say.

    Raises:
        UserError: if the number is needed and not known.
    """
    rule = options.get("lr_scaling", "none")
    if rule == "none":
        return 1.0
    if samples is None:
        raise UserError("optim_options.lr_scaling: the data have no batch size; use a DataModule whose loader has one")
    ratio = samples / options.get("lr_base_batch", LR_BASE_BATCH)
    return ratio if rule == "linear" else math.sqrt(ratio)


def _place_in_training(trainer: Trainer) -> tuple[int, int, float]:
    """Steps that are done, steps of an epoch, and steps of the training.

    Where the accumulation changes from epoch to epoch, these are as if it had always been that of this epoch, so that a
    schedule depends on how much of the training is done.
    """
    batches, max_epochs, max_steps = trainer.num_training_batches, trainer.max_epochs, trainer.max_steps
    scheduler = _accumulation_scheduler(trainer)
    if scheduler is None:
        accumulated = trainer.accumulate_grad_batches
        return trainer.global_step, *steps_of_training(batches, accumulated, max_epochs, max_steps)

    def steps_of_epoch(epoch: int) -> int:
        return steps_of_training(batches, scheduler.get_accumulate_grad_batches(epoch), None, -1)[0]

    epoch = trainer.current_epoch
    steps_per_epoch = steps_of_epoch(epoch)
    before = sum(steps_of_epoch(earlier) for earlier in range(epoch))
    ends = math.inf if max_epochs is None or max_epochs < 0 else float(max_epochs)
    if max_steps >= 0:
        last, left = 0, max_steps
        while left > (steps := steps_of_epoch(last)):
            last, left = last + 1, left - steps
        ends = min(ends, last + left / steps)
    return epoch * steps_per_epoch + trainer.global_step - before, steps_per_epoch, ends * steps_per_epoch


def _accumulation_scheduler(trainer: Trainer) -> GradientAccumulationScheduler | None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set at run time
    return next((callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)), None)


def _factor_of(trainer: Trainer, options: OptimOptions) -> float:
    return scaling_factor(options, _samples_of_step(trainer))


def _samples_of_step(trainer: Trainer) -> int | None:
    batch_size: int | None = getattr(trainer.train_dataloader, "batch_size", None)
    scheduler = _accumulation_scheduler(trainer)
    accumulated = (
        scheduler.get_accumulate_grad_batches(trainer.current_epoch) if scheduler else trainer.accumulate_grad_batches
    )
    return None if batch_size is None else batch_size * trainer.world_size * accumulated
