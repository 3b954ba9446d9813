"""Optimizers, their parameter groups, and learning rates as a pure function of the step.

Unlike torch's schedulers, which have the same formulas, they have no state that could be restored wrongly (as by
Lightning #20550), and a callback may replace the phases without touching the optimizer.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast, get_args

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_modules.options import OptimizerOptions, OptimOptions, PlateauOptions, ScheduleName
from vitrail.errors import UserError

Part = Literal["backbone", "head"]
"""Parts of a model with separate learning rates."""

ONECYCLE_RISE = 0.3
ONECYCLE_START_DIVISOR = 25.0
ONECYCLE_END_DIVISOR = 1e4
LR_BASE_BATCH = 256


def lr_factor(
    schedule: ScheduleName,
    step: int,
    total_steps: float,
    *,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    min_factor: float = 0.0,
    drop_steps: int = 1,
    gamma: float = 0.1,
    power: float = 1.0,
    drops: int = 0,
) -> float:
    """Learning rate at a step as a fraction of the peak.

    Args:
        schedule: ``constant``; ``cosine`` (Loshchilov and Hutter, SGDR, 2017, without restarts); ``polynomial``, linear
            with a power of 1; ``exponential``, by ``gamma`` in ``drop_steps``; ``step``, a drop by ``gamma`` every
            ``drop_steps``; ``onecycle`` (Smith and Topin, Super-Convergence, 2018, without momentum); ``plateau``, a
            drop by ``gamma`` wherever a metric stopped improving.
        step: optimizer steps since the phase began.
        total_steps: optimizer steps of the phase, may be infinite.
        warmup_steps: steps of linear warm-up from ``1 / (warmup_steps + 1)``; with ``onecycle`` those of its rise.
        cooldown_steps: last steps of the phase, with ``min_factor``; the schedule ends before them.
        min_factor: final factor of ``cosine`` and ``polynomial``, smallest one of ``exponential`` and ``plateau``.
        drop_steps: steps between two drops of ``step``, and in which ``exponential`` falls by ``gamma``.
        gamma: factor of a drop.
        power: exponent of ``polynomial``.
        drops: drops of ``plateau`` until now, see ``plateau_drops``.

    Returns:
        A factor in [0, 1].
    """
    if cooldown_steps:
        total_steps -= cooldown_steps
        if step >= total_steps:
            return min_factor
    step = min(step, int(total_steps)) if math.isfinite(total_steps) else step
    if schedule == "onecycle":
        return _onecycle_factor(step, total_steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    after = step - warmup_steps
    progress = after / max(total_steps - warmup_steps, 1)
    if schedule == "cosine":
        factor = min_factor + (1 - min_factor) * (1 + math.cos(math.pi * progress)) / 2
    elif schedule == "polynomial":
        factor = min_factor + (1 - min_factor) * max(1 - progress, 0.0) ** power
    elif schedule == "exponential":
        factor = max(gamma ** (after / drop_steps), min_factor)
    elif schedule == "plateau":
        factor = max(gamma**drops, min_factor)
    else:
        factor = gamma ** (after // drop_steps) if schedule == "step" else 1.0
    return factor


def plateau_drops(values: Sequence[float], options: PlateauOptions) -> int:
    """How often a metric has gone without a new best value for more than ``patience`` validations in a row.

    As torch's ``ReduceLROnPlateau`` with a threshold of 0, but a function of all values until now. NaN is never best.
    """
    best, waited, drops = math.inf, 0, 0
    for value in values:
        loss = value if options.mode == "min" else -value
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited > options.patience:
            drops, waited = drops + 1, 0
    return drops


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


@dataclass(frozen=True)
class TrainingPhase:
    """A phase of training with its own learning rates and schedule, until the next phase or the end of training.

    Attributes:
        first_epoch: first epoch, 0 for the first phase.
        lr: peak learning rate of each part; 0 for a frozen part.
        schedule: learning-rate schedule within the phase.
        warmup_epochs: epochs of linear warm-up, may be a fraction.
        min_lr: final learning rate; see ``OptimOptions``, as for those below.
        step_size: epochs between two drops.
        gamma: factor of a drop.
        cooldown_epochs: last epochs of the phase, with the learning rate ``min_lr``.
        power: exponent of ``polynomial``.
        plateau: what ``plateau`` waits for.

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
    cooldown_epochs: float = 0.0
    power: float = 1.0
    plateau: PlateauOptions = field(default_factory=PlateauOptions)

    def __post_init__(self) -> None:
        if self.schedule not in get_args(ScheduleName):
            raise UserError(f"schedule: must be one of {', '.join(get_args(ScheduleName))}; got {self.schedule!r}")
        if set(self.lr) != set(get_args(Part)):
            raise UserError(f"lr: needs a value for each of {', '.join(get_args(Part))}; got {sorted(self.lr)}")
        values = {"first_epoch": self.first_epoch, "warmup_epochs": self.warmup_epochs, "min_lr": self.min_lr}
        values |= {"cooldown_epochs": self.cooldown_epochs}
        values |= {f"lr of the {part}": lr for part, lr in self.lr.items()}
        for name, value in values.items():
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name}: must be a number that is not negative; got {value}")
        if self.step_size < 1 or not 0 < self.gamma <= 1:
            raise UserError(f"step_size, gamma: need at least 1 epoch and (0, 1]; got {self.step_size}, {self.gamma}")
        if self.cooldown_epochs and not self.min_lr:
            raise UserError("cooldown_epochs: nothing would be trained in them, because min_lr is 0; set min_lr")
        if not self.plateau.monitor.startswith("val/"):
            raise UserError(f"plateau.monitor: must be a metric of the validation, val/…; got {self.plateau.monitor!r}")

    @classmethod
    def of(cls, lr: float, schedule: ScheduleName, options: OptimOptions) -> Self:
        """The only phase of a training."""
        return cls(
            first_epoch=0,
            lr={"backbone": lr if options.backbone_lr is None else options.backbone_lr, "head": lr},
            schedule=schedule,
            warmup_epochs=options.warmup_epochs,
            min_lr=options.min_lr,
            step_size=options.step_size,
            gamma=options.gamma,
            cooldown_epochs=options.cooldown_epochs,
            power=options.power,
            plateau=options.plateau,
        )


def current_phase(phases: Sequence[TrainingPhase], epoch: int) -> int:
    """Index of the phase of an epoch."""
    firsts = [phase.first_epoch for phase in phases]
    if not firsts or firsts[0] != 0 or firsts != sorted(set(firsts)):
        raise UserError(f"training phases must begin at epoch 0 and follow each other; got first epochs {firsts}")
    return max(index for index, first in enumerate(firsts) if first <= epoch)


def learning_rate(
    phases: Sequence[TrainingPhase],
    part: Part,
    step: int,
    steps_per_epoch: int,
    total_steps: float,
    own_lr: float | None = None,
    monitored: Sequence[tuple[int, float]] = (),
) -> float:
    """Learning rate of a part of the model, before layer-wise scaling.

    Args:
        phases: training phases in order.
        part: backbone or head.
        step: optimizer steps since training began.
        steps_per_epoch: optimizer steps per epoch.
        total_steps: optimizer steps of the whole training, may be infinite.
        own_lr: peak learning rate instead of the part's.
        monitored: steps that were done at each validation, and the value of the metric that ``plateau`` waits for.
    """
    index = current_phase(phases, step // steps_per_epoch)
    phase = phases[index]
    begin = phase.first_epoch * steps_per_epoch
    end = total_steps
    if index + 1 < len(phases):
        end = min(phases[index + 1].first_epoch * steps_per_epoch, total_steps)
    if math.isinf(end) and (phase.schedule in {"cosine", "polynomial", "onecycle"} or phase.cooldown_epochs):
        what = "cooldown_epochs" if phase.cooldown_epochs else repr(phase.schedule)
        raise UserError(f"schedule: {what} needs an end; set trainer.max_epochs or trainer.max_steps")
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
        cooldown_steps=round(phase.cooldown_epochs * steps_per_epoch),
        power=phase.power,
        # The last validation of the phase before this one is at its first step.
        drops=plateau_drops([value for done, value in monitored if done > begin], phase.plateau)
        if phase.schedule == "plateau"
        else 0,
    )


def set_learning_rates(
    trainer: Trainer,
    phases: Sequence[TrainingPhase],
    options: OptimOptions,
    monitored: Sequence[tuple[int, float]] = (),
) -> None:
    """Set the learning rate of each parameter group for the next step; see ``learning_rate``."""
    step, steps_per_epoch, total_steps = _progress(trainer)
    factor = scaling_factor(options, _samples_of_step(trainer))
    for group in trainer.optimizers[0].param_groups:
        lr = learning_rate(phases, group["part"], step, steps_per_epoch, total_steps, group.get("own_lr"), monitored)
        group["lr"] = lr * group["lr_scale"] * factor


def monitored_value(trainer: Trainer, phases: Sequence[TrainingPhase]) -> list[tuple[int, float]]:
    """Steps done and value of the metric that ``plateau`` waits for, at a validation; empty with other schedules.

    Raises:
        UserError: there is no such metric.
    """
    phase = phases[current_phase(phases, trainer.current_epoch)]
    if phase.schedule != "plateau" or trainer.sanity_checking or trainer.state.fn != "fit":
        return []
    metrics = trainer.callback_metrics
    if (value := metrics.get(phase.plateau.monitor)) is None:
        known = ", ".join(sorted(name for name in metrics if name.startswith("val/")))
        raise UserError(f"plateau.monitor: there is no {phase.plateau.monitor!r}; must be one of {known}")
    return [(_progress(trainer)[0], float(value))]


def steps_of_training(
    batches_per_epoch: float, accumulate_grad_batches: int, max_epochs: int | None, max_steps: int
) -> tuple[int, float]:
    """Optimizer steps per epoch, and of the whole training, which may be infinite."""
    if math.isinf(batches_per_epoch):
        raise UserError("learning rates need the length of an epoch and the data have none; set limit_train_batches")
    # The last batches of an epoch make a step, too.
    steps_per_epoch = max(math.ceil(batches_per_epoch / accumulate_grad_batches), 1)
    total = math.inf if max_epochs is None or max_epochs < 0 else float(max_epochs * steps_per_epoch)
    return steps_per_epoch, min(total, math.inf if max_steps < 0 else max_steps)


def _progress(trainer: Trainer) -> tuple[int, int, float]:
    """Steps done, steps per epoch, and steps of the training.

    If ``accumulate_grad_batches`` changes between epochs, they are converted to that of the current epoch.
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


def scaling_factor(options: OptimOptions, samples: int | None) -> float:
    """Factor of all learning rates for the samples of a step on all processes and in all accumulated batches."""
    if options.lr_scaling == "none":
        return 1.0
    if samples is None:
        raise UserError("optim_options.lr_scaling: the data have no batch size; use a DataModule whose loader has one")
    ratio = samples / (options.lr_base_batch or LR_BASE_BATCH)
    return ratio if options.lr_scaling == "linear" else math.sqrt(ratio)


def _samples_of_step(trainer: Trainer) -> int | None:
    batch_size: int | None = getattr(trainer.train_dataloader, "batch_size", None)
    scheduler = _accumulation_scheduler(trainer)
    accumulated = (
        scheduler.get_accumulate_grad_batches(trainer.current_epoch) if scheduler else trainer.accumulate_grad_batches
    )
    return None if batch_size is None else batch_size * trainer.world_size * accumulated


def report_scaling(trainer: Trainer, phases: Sequence[TrainingPhase], options: OptimOptions) -> None:
    """Print one line with the scaled learning rates."""
    if options.lr_scaling == "none":
        return
    samples = _samples_of_step(trainer)
    factor = scaling_factor(options, samples)
    highest = ", ".join(f"{part} {lr * factor:.3g}" for phase in phases for part, lr in phase.lr.items() if lr)
    rank_zero_info(
        f"lr_scaling {options.lr_scaling}: {samples} samples a step, rates are for "
        f"{options.lr_base_batch or LR_BASE_BATCH}; learning rates x {factor:.4g}, at most {highest}"
    )


def step_seed(epoch: int, batch_idx: int, rank: int) -> int:
    """Seed in [0, 2**63) for dropout: a hash of the seed of ``seed_everything``, epoch, batch and rank."""
    place = f"{os.environ.get('PL_GLOBAL_SEED', '0')}/{epoch}/{batch_idx}/{rank}"
    return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "big") >> 1


def seed_step(device: torch.device, seed: int) -> None:
    """Seed the generators of a device and of the CPU; ``torch.manual_seed`` takes milliseconds for all accelerators."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def make_optimizer(
    groups: list[dict[str, Any]], phase: TrainingPhase, options: OptimOptions, precision: str = "32-true"
) -> torch.optim.Optimizer:
    """Optimizer over ``parameter_groups`` with the learning rates of a phase.

    AdamW is torch's. It is fused on CPUs; on GPUs torch's default is as fast, and in mixed precision Lightning cannot
    clip the gradients of fused optimizers. All others are made by timm's factory.

    Raises:
        UserError: the optimizer does not exist, or has no such options.
    """
    chosen = options.optimizer
    for group in groups:
        group["lr"] = group.get("own_lr", phase.lr[group["part"]]) * group["lr_scale"]
    if chosen.name != "adamw":
        return _optimizer_of_timm(groups, options)
    on_cpu = all(parameter.device.type == "cpu" for group in groups for parameter in group["params"])
    settings: dict[str, Any] = {"fused": on_cpu and "mixed" not in precision, **_arguments(chosen)}
    try:
        return torch.optim.AdamW(groups, betas=options.betas, eps=options.eps, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refused(chosen, error) from error


def check_optimizer(options: OptimOptions) -> None:
    """Refuse an optimizer that does not exist, or options that it does not have, before there is a network."""
    group = {"params": [nn.Parameter(torch.zeros(4, 4))], "weight_decay": 0.0, "part": "head", "lr_scale": 1.0}
    make_optimizer([group], TrainingPhase(0, {"backbone": 1e-3, "head": 1e-3}), options)


def _optimizer_of_timm(groups: list[dict[str, Any]], options: OptimOptions) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    chosen = options.optimizer
    for name in ("betas", "eps"):
        if getattr(options, name) != getattr(OptimOptions(), name):
            raise UserError(
                f"optim_options.{name}: is for adamw; set optimizer.options: {{{name}: …}} of {chosen.name}"
            )
    base = chosen.name.rpartition("_")[2] if chosen.name.startswith("lookahead_") else chosen.name
    if base not in list_optimizers():
        near = difflib.get_close_matches(base, list_optimizers(), n=3) or ["adamw", "sgd", "lamb", "lion", "muon"]
        raise UserError(f"optim_options.optimizer.name: no {chosen.name!r} in timm; such as {', '.join(near)}")
    if get_optimizer_info(base).second_order:
        raise UserError(f"optim_options.optimizer.name: {base} needs second derivatives, which no step here computes")
    if "muon" in base:
        # Output layers, and whatever is no matrix (timm sees to that), are trained by its AdamW (Jordan et al., 2024).
        groups = [{**group, "use_fallback": group["part"] == "head"} for group in groups]
    try:
        found: torch.optim.Optimizer = create_optimizer_v2(
            groups, opt=chosen.name, lr=groups[0]["lr"], weight_decay=0.0, **_arguments(chosen)
        )
    except (TypeError, ValueError, AssertionError, ImportError, RuntimeError) as error:
        raise _refused(chosen, error) from error
    return found


def _arguments(chosen: OptimizerOptions) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.options.items()}


def _refused(chosen: OptimizerOptions, error: Exception) -> UserError:
    reason = " ".join(str(error).split()).replace(f"{type(error).__name__}: ", "")
    return UserError(f"optim_options.optimizer: {chosen.name} with {chosen.options} is impossible: {reason}")


def parameter_groups(
    model: nn.Module,
    backbones: Mapping[str, nn.Module],
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    frozen: Collection[nn.Parameter] = (),
    logit_scale: Sequence[nn.Parameter] = (),
    logit_scale_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer.

    Biases, norms, the logit scale and the parameters in ``no_weight_decay()`` of an architecture are not decayed.

    Args:
        model: contains the backbones; its other parameters belong to the part ``head``.
        backbones: networks by the prefix of their groups' names.
        weight_decay: weight decay of all other parameters.
        layer_decay: factor of the learning rate from each layer of a backbone to the one below it
            (Clark et al., ELECTRA, 2020; Bao et al., BEiT, 2021).
        frozen: parameters to be trained later, which are included.
        logit_scale: parameters of the logit scale.
        logit_scale_lr: their peak learning rate, by default that of the heads.

    Returns:
        Dicts with ``params``, ``weight_decay``, a unique ``name``, ``part``, ``lr_scale`` in (0, 1], the factor of the
        learning rate, and ``own_lr`` for a peak learning rate of its own.
    """
    groups: list[dict[str, Any]] = []
    with _trainable(frozen):
        for prefix, backbone in backbones.items():
            for number, group in enumerate(_backbone_groups(backbone, prefix, weight_decay, layer_decay)):
                layer = "" if layer_decay == 1.0 else f"_{number:02d}"
                name = f"{prefix}{layer}_{'decay' if group['weight_decay'] else 'no_decay'}"
                groups.append({"lr_scale": 1.0, **group, "name": name, "part": "backbone"})
        apart = {id(parameter) for backbone in backbones.values() for parameter in backbone.parameters()}
        apart |= {id(parameter) for parameter in logit_scale}
        heads = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
        for name, decay in (("head_decay", weight_decay), ("head_no_decay", 0.0)):
            params = [parameter for parameter in heads if (parameter.ndim > 1) == (name == "head_decay")]
            if params:
                groups.append({"params": params, "weight_decay": decay, "lr_scale": 1.0, "name": name, "part": "head"})
    if logit_scale:
        scale = {"params": list(logit_scale), "weight_decay": 0.0, "lr_scale": 1.0}
        own = {} if logit_scale_lr is None else {"own_lr": logit_scale_lr}
        groups.append({**scale, "name": "logit_scale", "part": "head", **own})
    return groups


def _backbone_groups(backbone: nn.Module, name: str, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    exempt: Collection[str] = cast("Any", backbone).no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
    groups: list[dict[str, Any]]
    if layer_decay == 1.0:
        groups = param_groups_weight_decay(backbone, weight_decay, no_weight_decay_list=exempt)
        return [group for group in groups if group["params"]]
    if hasattr(backbone, "group_matcher"):
        groups = param_groups_layer_decay(backbone, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
        return groups
    scales = layer_scales(backbone, name, layer_decay)
    by_kind: dict[tuple[float, float], dict[str, Any]] = {}
    for key, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            kind = {"params": [], "weight_decay": decay, "lr_scale": scales[key]}
            by_kind.setdefault((scales[key], decay), kind)["params"].append(parameter)
    return list(by_kind.values())


@contextmanager
def _trainable(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Let timm include parameters that do not require a gradient."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)


def is_frozen(network: nn.Module) -> bool:
    """Whether nothing in a network is trainable or in training mode."""
    trainable = any(parameter.requires_grad for parameter in network.parameters())
    return not trainable and not any(module.training for module in network.modules())


def blocks(network: nn.Module, name: str) -> list[nn.Module]:
    """The repeated blocks with most parameters, in the order of computation.

    Such as the layers of a transformer, or the blocks of a ResNet's last stage: two or more children of one class.
    """
    repeated = [
        module
        for module in network.modules()
        if len(children := list(module.children())) > 1 and len({type(child) for child in children}) == 1
    ]
    if not repeated:
        raise UserError(f"{name} has no blocks that repeat; choose another freeze mode")
    largest = max(repeated, key=lambda module: sum(parameter.numel() for parameter in module.parameters()))
    return list(largest.children())


def layer_depths(network: nn.Module, name: str) -> Mapping[str, int]:
    """Depth of each parameter by its name: 0 before the n ``blocks``, 1 to n in them, n + 1 after them."""
    layers = blocks(network, name)
    inside = {id(parameter): index + 1 for index, block in enumerate(layers) for parameter in block.parameters()}
    depths: dict[str, int] = {}
    # Parameters are registered in the order of computation: what comes before the first block is below it. Only
    # open_clip has projections that are parameters of the network itself, and so come first.
    outside = 0
    for key, parameter in network.named_parameters():
        depths[key] = inside.get(id(parameter), len(layers) + 1 if key in ("proj", "text_projection") else outside)
        if id(parameter) in inside:
            outside = len(layers) + 1
    return depths


def layer_scales(network: nn.Module, name: str, decay: float) -> Mapping[str, float]:
    """Factor of each parameter's learning rate: 1 after the blocks, ``decay`` in the last one, and so on."""
    top = len(blocks(network, name)) + 1
    return {key: decay ** (top - depth) for key, depth in layer_depths(network, name).items()}
