"""The course of a learning rate as a pure function of the step.

The formulas are those of torch's schedulers; the tests compare them step by step.
"""

from __future__ import annotations

import math
from typing import Literal

from vitrail.errors import UserError

ScheduleName = Literal["constant", "cosine", "step", "onecycle"]

ONECYCLE_RISE = 0.3
ONECYCLE_START_DIVISOR = 25.0
ONECYCLE_END_DIVISOR = 1e4


def lr_factor(
    schedule: ScheduleName,
    step: int,
    total_steps: float,
    *,
    warmup_steps: int = 0,
    min_factor: float = 0.0,
    drop_steps: int = 1,
    gamma: float = 0.1,
) -> float:
    """Learning rate at a step as a share of the highest one.

    Args:
        schedule: ``constant``; ``cosine`` (Loshchilov and Hutter, SGDR, 2017, without restarts); ``step``, a drop by
            ``gamma`` every ``drop_steps``; ``onecycle`` (Smith and Topin, Super-Convergence, 2018, its learning rate
            only, momentum stays).
        step: optimizer steps done since the phase began; beyond the end it counts as the end.
        total_steps: optimizer steps of the phase, infinite where not known.
        warmup_steps: steps in front in which the factor rises linearly from ``1 / (warmup_steps + 1)``; the rest of
            the phase is the schedule's. They are the rise itself with ``onecycle``.
        min_factor: where ``cosine`` ends.
        drop_steps: steps between two drops of ``step``.
        gamma: factor of a drop of ``step``.

    Returns:
        A factor in [0, 1].
    """
    step = min(step, int(total_steps)) if math.isfinite(total_steps) else step
    if schedule == "onecycle":
        return _onecycle_factor(step, total_steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        return min_factor + (1 - min_factor) * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "step":
        return float(gamma ** ((step - warmup_steps) // drop_steps))
    return 1.0


def _onecycle_factor(step: int, total_steps: float, warmup_steps: int) -> float:
    """Cosine up from 1/25 to 1, then cosine down to 1/250,000, as ``OneCycleLR`` does by default."""
    rise = warmup_steps / total_steps if warmup_steps else ONECYCLE_RISE
    start, end = 1 / ONECYCLE_START_DIVISOR, 1 / (ONECYCLE_START_DIVISOR * ONECYCLE_END_DIVISOR)
    summit, last = rise * total_steps - 1, total_steps - 1
    if step <= summit:
        return _cosine_between(start, 1.0, step / summit if summit > 0 else 1.0)
    return _cosine_between(1.0, end, min((step - summit) / (last - summit), 1.0) if last > summit else 1.0)


def _cosine_between(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def steps_of_training(
    batches_per_epoch: float, accumulate_grad_batches: int, max_epochs: int | None, max_steps: int
) -> tuple[int, float]:
    """Optimizer steps in an epoch and in the whole training.

    Args:
        batches_per_epoch: infinite where the data do not say.
        accumulate_grad_batches: batches per step; what is left at the end of an epoch makes a step too.
        max_epochs: nothing or -1 for no end.
        max_steps: -1 for no end.

    Returns:
        Steps of an epoch, and of the training, which may be infinite.

    Raises:
        UserError: if the data have no length.
    """
    if math.isinf(batches_per_epoch):
        raise UserError("learning rates need the length of an epoch and the data have none; set limit_train_batches")
    steps_per_epoch = max(math.ceil(batches_per_epoch / accumulate_grad_batches), 1)
    total = math.inf if max_epochs is None or max_epochs < 0 else float(max_epochs * steps_per_epoch)
    return steps_per_epoch, min(total, math.inf if max_steps < 0 else max_steps)
