"""Learning rates as a pure function of the step, and the optimizer that they are for.

Why not torch's schedulers: they carry state, and a state that is saved can be restored wrongly
(``estimated_stepping_batches`` inside ``configure_optimizers`` forgets the part of an epoch that is done, Lightning
#20550). Here a learning rate depends on the step alone, so a resumed run is exact by construction, and a callback
may replace the phases without touching the optimizer.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

import torch

from lightning_modules.schedules import ScheduleName, lr_factor
from vitrail.errors import UserError

Part = Literal["backbone", "head"]
"""The two parts of a model that have learning rates of their own."""


LrScaling = Literal["none", "linear", "sqrt"]
"""How learning rates grow with the batch."""

LR_BASE_BATCH = 256


class OptimOptions(TypedDict, total=False):
    """The rarer settings of the optimizer and its schedule; what is left out has the value in brackets.

    Attributes:
        betas: AdamW's two decay rates [0.9, 0.999].
        eps: AdamW's epsilon [1e-8].
        backbone_lr: learning rate of the backbone [that of the heads].
        layer_decay: each layer further from the head learns this many times as fast, in (0, 1] [1, off].
        warmup_epochs: epochs of linear warm-up in front of the schedule, step by step, may be a fraction [0].
            With ``onecycle`` they are the length of its rise, which is 30 % of the run where this is 0.
        min_lr: where ``cosine`` ends [0].
        step_size: epochs between the drops of ``step`` [10].
        gamma: factor of each drop of ``step`` [0.1].
        lr_scaling: by what all learning rates grow with the samples of a step, those of all processes and accumulated
            batches together: ``none``; ``linear`` (Goyal et al., 2017, for SGD; it wants ``warmup_epochs``); ``sqrt``,
            the rule for Adam and its kind (Krizhevsky, 2014; Malladi et al., 2022, who also move ``betas`` and ``eps``,
            which is not done here) [none].
        lr_base_batch: samples of a step that the learning rates were written for [256].
    """

    betas: list[float]
    eps: float
    backbone_lr: float
    layer_decay: float
    warmup_epochs: float
    min_lr: float
    step_size: int
    gamma: float
    lr_scaling: LrScaling
    lr_base_batch: int


@dataclass(frozen=True)
class TrainingPhase:
    """A stretch of training with learning rates and a schedule of its own.

    A phase ends where the next one begins, or with the training.

    Attributes:
        first_epoch: counted from 0; the first phase of a training has 0.
        lr: highest learning rate of each part, not negative. A part with 0 stands still.
        schedule: how the learning rates change within the phase.
        warmup_epochs: linear warm-up in front of the schedule, in epochs, may be a fraction.
        min_lr: where ``cosine`` ends.
        step_size: epochs between the drops of ``step``.
        gamma: factor of each drop of ``step``.

    Raises:
        UserError: if a value is out of range.
    """

    first_epoch: int
    lr: Mapping[Part, float]
    schedule: ScheduleName = "cosine"
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    step_size: int = 10
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.schedule not in get_args(ScheduleName):
            raise UserError(
                f"schedule: {self.schedule!r} is unknown; choose one of {', '.join(get_args(ScheduleName))}"
            )
        if set(self.lr) != set(get_args(Part)):
            raise UserError(f"lr: needs a value for each of {', '.join(get_args(Part))}, got {sorted(self.lr)}")
        values = {"first_epoch": self.first_epoch, "warmup_epochs": self.warmup_epochs, "min_lr": self.min_lr}
        values |= {f"lr of the {part}": lr for part, lr in self.lr.items()}
        for name, value in values.items():
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name}: must be a number that is not negative, got {value}")
        if self.step_size < 1 or not 0 < self.gamma <= 1:
            raise UserError(f"step_size, gamma: need at least 1 epoch and (0, 1], got {self.step_size}, {self.gamma}")


def checked_options(options: OptimOptions | None) -> OptimOptions:
    """The options without unknown keys and values out of range.

    Raises:
        UserError: if there are any.
    """
    known = options or {}
    unknown = sorted(set(known) - set(OptimOptions.__annotations__))
    if unknown:
        raise UserError(
            f"optim_options: unknown {', '.join(unknown)}; known are {', '.join(OptimOptions.__annotations__)}"
        )
    layer_decay = known.get("layer_decay", 1.0)
    if not 0 < layer_decay <= 1:
        raise UserError(f"optim_options.layer_decay: must be in (0, 1], got {layer_decay}")
    betas = known.get("betas", [0.9, 0.999])
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"optim_options.betas: must be two numbers in [0, 1), got {betas}")
    scaling = known.get("lr_scaling", "none")
    if scaling not in get_args(LrScaling):
        raise UserError(
            f"optim_options.lr_scaling: {scaling!r} is unknown; choose one of {', '.join(get_args(LrScaling))}"
        )
    if known.get("lr_base_batch", LR_BASE_BATCH) < 1:
        raise UserError(f"optim_options.lr_base_batch: must be at least 1, got {known['lr_base_batch']}")
    if "lr_base_batch" in known and scaling == "none":
        raise UserError("optim_options.lr_base_batch: does nothing without lr_scaling; set it to linear or sqrt")
    return known


def single_phase(lr: float, schedule: ScheduleName, options: OptimOptions) -> TrainingPhase:
    """The phase of a training that has only one.

    Args:
        lr: of the heads, and of the backbone unless the options say otherwise.
        schedule: of both.
        options: as ``checked_options`` returns them.

    Raises:
        UserError: if a value is out of range.
    """
    return TrainingPhase(
        first_epoch=0,
        lr={"backbone": options.get("backbone_lr", lr), "head": lr},
        schedule=schedule,
        warmup_epochs=options.get("warmup_epochs", 0.0),
        min_lr=options.get("min_lr", 0.0),
        step_size=options.get("step_size", 10),
        gamma=options.get("gamma", 0.1),
    )


def current_phase(phases: Sequence[TrainingPhase], epoch: int) -> int:
    """Index of the phase that an epoch belongs to.

    Raises:
        UserError: if the phases do not begin at epoch 0 or are out of order.
    """
    firsts = [phase.first_epoch for phase in phases]
    if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)):
        raise UserError(f"training phases must begin at epoch 0 and follow each other, got first epochs {firsts}")
    return max(index for index, first in enumerate(firsts) if first <= epoch)


def learning_rate(
    phases: Sequence[TrainingPhase],
    part: Part,
    step: int,
    steps_per_epoch: int,
    total_steps: float,
    own_lr: float | None = None,
) -> float:
    """Learning rate of a part of the model, before layer-wise scaling.

    Args:
        phases: in order, the first one from epoch 0.
        part: backbone or head.
        step: optimizer steps done since training began.
        steps_per_epoch: optimizer steps in an epoch.
        total_steps: optimizer steps of the whole training, infinite where it has no end.
        own_lr: highest learning rate instead of the part's, for parameters with one of their own.

    Raises:
        UserError: if the schedule needs to know where training ends and it has no end.
    """
    index = current_phase(phases, step // steps_per_epoch)
    phase = phases[index]
    begin = phase.first_epoch * steps_per_epoch
    end = total_steps
    if index + 1 < len(phases):
        end = min(phases[index + 1].first_epoch * steps_per_epoch, total_steps)
    if math.isinf(end) and phase.schedule in {"cosine", "onecycle"}:
        raise UserError(f"schedule: {phase.schedule!r} needs an end; set trainer.max_epochs or trainer.max_steps")
    highest = phase.lr[part] if own_lr is None else own_lr
    if highest == 0:
        return 0.0
    return highest * lr_factor(
        phase.schedule,
        step - begin,
        end - begin,
        warmup_steps=round(phase.warmup_epochs * steps_per_epoch),
        min_factor=min(phase.min_lr / highest, 1.0),
        drop_steps=phase.step_size * steps_per_epoch,
        gamma=phase.gamma,
    )


def step_seed(epoch: int, batch_idx: int, rank: int) -> int:
    """Seed in [0, 2**63) for the dropout of one batch on one process, a hash of where it is in the run.

    The seed of the run is the one that ``seed_everything`` leaves in ``PL_GLOBAL_SEED``, 0 if there is none.
    """
    place = f"{os.environ.get('PL_GLOBAL_SEED', '0')}/{epoch}/{batch_idx}/{rank}"
    return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "big") >> 1


def seed_step(device: torch.device, seed: int) -> None:
    """Seed what a step on a device draws from: its own generator and that of the CPU.

    ``torch.manual_seed`` seeds every kind of accelerator that torch knows, present or not, which takes milliseconds.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def adamw(
    groups: list[dict[str, Any]], phase: TrainingPhase, options: OptimOptions, precision: str = "32-true"
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over the groups of ``parameter_groups.parameter_groups``.

    On CPUs it is fused, because torch else goes through the weights one operation at a time. On GPUs torch's own choice
    is as fast, and in mixed precision Lightning does not clip the gradients of fused optimizers.

    Args:
        groups: as ``parameter_groups.parameter_groups`` makes them.
        phase: gives the learning rates that stand until the first step sets its own.
        options: ``betas`` and ``eps`` are read.
        precision: Lightning's name.
    """
    beta1, beta2 = options.get("betas", [0.9, 0.999])
    for group in groups:
        group["lr"] = group.get("own_lr", phase.lr[group["part"]]) * group["lr_scale"]
    on_cpu = all(parameter.device.type == "cpu" for group in groups for parameter in group["params"])
    fused = on_cpu and "mixed" not in precision
    return torch.optim.AdamW(groups, betas=(beta1, beta2), eps=options.get("eps", 1e-8), fused=fused)
