"""Transfer learning in two phases: first the heads on a frozen backbone, then everything.

Everything here is a pure function of the epoch, nothing is remembered, so a resumed run is exact in either phase.
(Lightning's ``BaseFinetuning`` remembers, and freezes again what was unfrozen: Lightning #21901.)
"""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel

from lightning_modules.base import VisionTask
from lightning_modules.optim import TrainingPhase
from vitrail.errors import UserError
from vitrail.runs import Run


class BackboneUnfreezing(Callback):
    """Trains the heads alone first, then the whole network, each phase with a cosine of its own.

    In phase one the backbone is frozen whole, its BatchNorm statistics included. The phases replace the task's own
    ``lr`` and ``schedule``. The optimizer holds all parameters from the beginning and its groups never change.

    Args:
        unfreeze_epoch: first epoch of phase two, counted from 0.
        lr: highest learning rate of the heads in phase one.
        backbone_lr: highest learning rate of the backbone in phase two.
        head_lr: highest learning rate of the heads in phase two.
        min_lr: where both cosines end.
        warmup_epochs: linear warm-up at the beginning of each phase, in epochs, may be a fraction.
        fixed_batchnorm: in phase two too, normalise by the statistics that came with the pretrained weights. For small
            batches, and for weights whose BatchNorm was folded or rebuilt, so that the batch's own statistics are far
            from those that the network was trained with.

    Raises:
        UserError: if a value is out of range.
    """

    def __init__(
        self,
        unfreeze_epoch: int,
        *,
        lr: float,
        backbone_lr: float,
        head_lr: float,
        min_lr: float = 1e-6,
        warmup_epochs: float = 0.0,
        fixed_batchnorm: bool = False,
    ) -> None:
        if unfreeze_epoch < 1:
            raise UserError(f"BackboneUnfreezing.unfreeze_epoch: must be at least 1, got {unfreeze_epoch}")
        self.unfreeze_epoch = unfreeze_epoch
        self.fixed_batchnorm = fixed_batchnorm
        self._phases = [
            TrainingPhase(0, {"backbone": 0.0, "head": lr}, "cosine", warmup_epochs, min_lr),
            TrainingPhase(unfreeze_epoch, {"backbone": backbone_lr, "head": head_lr}, "cosine", warmup_epochs, min_lr),
        ]

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
        max_epochs = trainer.max_epochs
        too_short = max_epochs is not None and 0 <= max_epochs <= self.unfreeze_epoch
        if too_short and not getattr(trainer, "fast_dev_run", False):
            raise UserError(
                f"BackboneUnfreezing.unfreeze_epoch: phase two would begin at epoch {self.unfreeze_epoch}, but "
                f"training ends after {max_epochs} epochs; raise trainer.max_epochs or lower unfreeze_epoch"
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
        """Average the heads' gradients over the processes in phase one, when DDP stands aside."""
        if trainer.world_size == 1 or not _two_part_task(pl_module).backbone_frozen:
            return
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                trainer.strategy.reduce(parameter.grad, reduce_op="mean")

    def _freeze(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze in phase one, unfreeze in phase two.

        DDP watches the parameters that require gradients at the moment when it wraps the model. A backbone that is
        frozen by then is never synchronised later: the processes would silently drift apart in phase two. So the
        model is wrapped unfrozen, and in phase one DDP, which would wait for the backbone's gradients forever, does
        not synchronise at all: ``on_after_backward`` does it for the heads.
        """
        task = _two_part_task(pl_module)
        frozen = trainer.current_epoch < self.unfreeze_epoch
        if frozen and not task.backbone_frozen:
            task.freeze_backbone()
        if not frozen and task.backbone_frozen:
            task.unfreeze_backbone()
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.require_backward_grad_sync = not frozen


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
