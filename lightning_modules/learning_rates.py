"""How the learning rates of ``optim`` reach the optimizer, and how they grow with the batch where that is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from datamodules.schema import UserError
from lightning_modules.optim import LR_BASE_BATCH, OptimOptions, TrainingPhase, learning_rate
from lightning_modules.schedules import steps_of_training


def set_learning_rates(trainer: Trainer, phases: Sequence[TrainingPhase], options: OptimOptions) -> None:
    """Give each parameter group the learning rate of the step that comes next.

    Raises:
        UserError: if the phases, the length of the training or the data do not allow it.
    """
    steps_per_epoch, total_steps = steps_of_training(
        trainer.num_training_batches, trainer.accumulate_grad_batches, trainer.max_epochs, trainer.max_steps
    )
    factor = _factor_of(trainer, options)
    for group in trainer.optimizers[0].param_groups:
        lr = learning_rate(
            phases, group["part"], trainer.global_step, steps_per_epoch, total_steps, group.get("own_lr")
        )
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


def _factor_of(trainer: Trainer, options: OptimOptions) -> float:
    return scaling_factor(options, _samples_of_step(trainer))


def _samples_of_step(trainer: Trainer) -> int | None:
    batch_size: int | None = getattr(trainer.train_dataloader, "batch_size", None)
    return None if batch_size is None else batch_size * trainer.world_size * trainer.accumulate_grad_batches
