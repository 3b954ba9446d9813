"""Transfer learning in phases, such as first the heads on a frozen backbone, then everything.

Everything here is a pure function of the epoch, nothing is remembered, so a resumed run is exact in either phase.
(Lightning's ``BaseFinetuning`` remembers, and freezes again what was unfrozen: Lightning #21901.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel

from lightning_modules.base import VisionTask
from lightning_modules.optim import Part, TrainingPhase, current_phase
from lightning_modules.options import FinetuningPhase, checked
from vitrail.errors import UserError
from vitrail.runs import Run


class BackboneUnfreezing(Callback):
    """Trains in phases: by default the heads alone first, then the whole network, each with a cosine of its own.

    Where the backbone is frozen its BatchNorm statistics are, too. The phases replace the task's own ``lr`` and
    ``schedule``. The optimizer holds all parameters from the beginning and its groups never change.

    Args:
        unfreeze_epoch: first epoch of phase two, counted from 0.
        lr: peak learning rate of the heads in phase one.
        backbone_lr: peak learning rate of the backbone in phase two.
        head_lr: peak learning rate of the heads in phase two.
        min_lr: where the cosines end.
        warmup_epochs: linear warm-up at the beginning of each phase, in epochs, may be a fraction.
        fixed_batchnorm: where the backbone is trained, too, normalise by the statistics that came with the pretrained
            weights. For small batches, and for weights whose BatchNorm was folded or rebuilt, so that the batch's own
            statistics are far from those that the network was trained with.
        phases: any number of phases, instead of ``unfreeze_epoch`` and the three learning rates.

    Example:
        >>> two = BackboneUnfreezing(5, lr=3e-3, backbone_lr=1e-4, head_lr=5e-4)
        >>> same = BackboneUnfreezing(
        ...     phases=[FinetuningPhase(3e-3, epochs=5), FinetuningPhase(head_lr=5e-4, backbone_lr=1e-4)]
        ... )

    Raises:
        UserError: if a value is out of range.
    """

    def __init__(
        self,
        unfreeze_epoch: int | None = None,
        *,
        lr: float | None = None,
        backbone_lr: float | None = None,
        head_lr: float | None = None,
        min_lr: float = 1e-6,
        warmup_epochs: float = 0.0,
        fixed_batchnorm: bool = False,
        phases: list[FinetuningPhase] | None = None,
    ) -> None:
        two = {"unfreeze_epoch": unfreeze_epoch, "lr": lr, "backbone_lr": backbone_lr, "head_lr": head_lr}
        if phases is None:
            phases = _two_phases(two)
        elif given := [name for name, value in two.items() if value is not None]:
            raise UserError(f"BackboneUnfreezing.{given[0]}: does not go with phases; leave one of them out")
        self.fixed_batchnorm = fixed_batchnorm
        self._phases = _training_phases(phases, min_lr, warmup_epochs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the task's phases, before the optimizer is made.

        Raises:
            UserError: if the task or the trainer does not fit.
        """
        if stage != "fit":
            return
        task = _two_part_task(pl_module)
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise UserError(
                f"trainer.strategy: BackboneUnfreezing knows one device and ddp, not "
                f"{type(trainer.strategy).__name__}; set strategy: ddp"
            )
        max_epochs, last = trainer.max_epochs, self._phases[-1].first_epoch
        too_short = max_epochs is not None and 0 <= max_epochs <= last
        if too_short and not getattr(trainer, "fast_dev_run", False):
            raise UserError(
                f"BackboneUnfreezing: phase {len(self._phases)} would begin at epoch {last}, but training ends after "
                f"{max_epochs} epochs; raise trainer.max_epochs or shorten the phases before it (unfreeze_epoch)"
            )
        task.phases = list(self._phases)
        # DDP takes care only of what has gradients while it wraps the model, which comes next: see _freeze.
        if task.backbone_frozen:
            task.unfreeze_backbone()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze or unfreeze by the epoch that training begins or resumes in.

        Raises:
            UserError: if the optimizer knows no backbone or no heads.
        """
        parts = {group.get("part") for optimizer in trainer.optimizers for group in optimizer.param_groups}
        if not {"backbone", "head"} <= parts:
            raise UserError(
                f"BackboneUnfreezing: the optimizer of {type(pl_module).__name__} has no parameter groups of the parts "
                f"backbone and head; make them with lightning_modules.optim, or leave the callback out"
            )
        if self.fixed_batchnorm:
            _two_part_task(pl_module).fix_batchnorm()
        self._freeze(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze or unfreeze by the epoch."""
        self._freeze(trainer, pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the heads' gradients over the processes where the backbone is frozen, when DDP stands aside."""
        if trainer.world_size == 1 or not _two_part_task(pl_module).backbone_frozen:
            return
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                trainer.strategy.reduce(parameter.grad, reduce_op="mean")

    def _freeze(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze or unfreeze as the phase of the epoch says.

        DDP watches the parameters that require gradients at the moment when it wraps the model. A backbone that is
        frozen by then is never synchronised later: the processes would silently drift apart when it is trained. So the
        model is wrapped unfrozen, and while it is frozen DDP, which would wait for the backbone's gradients forever,
        does not synchronise at all: ``on_after_backward`` does it for the heads.
        """
        task = _two_part_task(pl_module)
        frozen = self._phases[current_phase(self._phases, trainer.current_epoch)].lr["backbone"] == 0
        if frozen and not task.backbone_frozen:
            task.freeze_backbone()
        if not frozen and task.backbone_frozen:
            task.unfreeze_backbone()
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.require_backward_grad_sync = not frozen


def _two_phases(given: Mapping[str, float | None]) -> list[FinetuningPhase]:
    if missing := [name for name, value in given.items() if value is None]:
        raise UserError(f"BackboneUnfreezing.{missing[0]}: is missing; give it, or phases")
    values = {name: value for name, value in given.items() if value is not None}
    if values["unfreeze_epoch"] < 1:
        raise UserError(f"BackboneUnfreezing.unfreeze_epoch: must be at least 1, got {values['unfreeze_epoch']}")
    return [
        FinetuningPhase(values["lr"], epochs=int(values["unfreeze_epoch"])),
        FinetuningPhase(values["head_lr"], values["backbone_lr"]),
    ]


def _training_phases(phases: Sequence[FinetuningPhase], min_lr: float, warmup_epochs: float) -> list[TrainingPhase]:
    found: list[TrainingPhase] = []
    first_epoch = 0
    for number, entry in enumerate(phases):
        key = f"BackboneUnfreezing.phases[{number}]"
        phase = checked(FinetuningPhase, entry, key)
        last = number == len(phases) - 1
        if last != (phase.epochs is None):
            fix = "the last phase lasts until training ends; leave it out" if last else "all but the last phase need it"
            raise UserError(f"{key}.epochs: {fix}")
        lr: dict[Part, float] = {"backbone": phase.backbone_lr, "head": phase.head_lr}
        warmup = warmup_epochs if phase.warmup_epochs is None else phase.warmup_epochs
        end = min_lr if phase.min_lr is None else phase.min_lr
        found.append(TrainingPhase(first_epoch, lr, phase.schedule, warmup, end))
        first_epoch += phase.epochs or 0
    if not found:
        raise UserError("BackboneUnfreezing.phases: there is none; give at least one")
    return found


def _two_part_task(pl_module: LightningModule) -> VisionTask:
    if not isinstance(pl_module, VisionTask):
        raise UserError(
            f"BackboneUnfreezing: {type(pl_module).__name__} has no backbone that can be frozen; use a task that has, "
            f"such as ImageClassifier, or leave the callback out"
        )
    return pl_module


class StartWeights(Callback):
    """Writes ``checkpoints/start.ckpt`` before the first step.

    ``python -m evaluation wise-ft`` interpolates between it and the best checkpoint, and shows what fine-tuning cost. A
    run that is resumed keeps the one it has.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, unless training goes on from a checkpoint."""
        if trainer.global_step == 0 and not getattr(trainer, "fast_dev_run", False):
            trainer.save_checkpoint(Path(trainer.default_root_dir) / Run.START, weights_only=True)
