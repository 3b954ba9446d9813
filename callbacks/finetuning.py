"""Transfer learning in phases, such as first the heads on a frozen backbone, then everything.

Everything here is a pure function of the epoch, nothing is remembered, so a resumed run is exact in either phase.
(Lightning's ``BaseFinetuning`` remembers, and freezes again what was unfrozen: Lightning #21901.)

Features of a frozen backbone, computed once and given to the heads instead of images.

A backbone that is frozen and in evaluation mode outputs the same for an image in every epoch. So each image is read and
encoded once (and once more for each further augmented view). The network from the features on is trained as before, by
the same optimizer, with the same dropout and the same order of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch.nn.parallel import DistributedDataParallel

from datamodules.base import ImageDataModule
from datamodules.loading.dataset import CountedLoader
from lightning_modules.base import VisionTask
from lightning_modules.optim import Part, TrainingPhase, current_phase
from lightning_modules.options import FinetuningPhase, checked
from vitrail.errors import UserError
from vitrail.runs import Run
from vitrail.runtime import memory_bytes
from vitrail.types import FeatureLookup


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


LARGEST_SHARE = 0.5
"""Of the machine's memory that features may fill on each process."""


class TooManyFeaturesError(Exception):
    """The features of a split do not fit into memory; the message says so and names the fix."""


class FeatureTable:
    """Features of a split.

    Args:
        sample_id: int64 ``(n,)``, ascending.
        features: float ``(V, n, D)``, of each view of each sample.
    """

    def __init__(self, sample_id: torch.Tensor, features: torch.Tensor) -> None:
        self._sample_id = sample_id
        self._features = features

    def __call__(self, sample_id: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        """See ``vitrail.types.FeatureLookup``; after the last view the first comes again."""
        return self._features[view % len(self._features), torch.searchsorted(self._sample_id, sample_id)]


def compute_features(
    trainer: Trainer,
    encode: Callable[[torch.Tensor], torch.Tensor],
    views: Sequence[CountedLoader],
    name: str,
) -> FeatureTable:
    """Encode every view of every sample; with several processes each encodes its share, and all get everything.

    Raises:
        TooManyFeaturesError: if they do not fit into memory.
    """
    sample_id = torch.empty(0, dtype=torch.int64)
    tables: list[torch.Tensor] = []
    total = sum(len(view) for view in views)
    with _progress(trainer, f"features of the {name} split, once", total) as advance, torch.no_grad():
        for view in views:
            features, ids = [], []
            for batch in view:
                with trainer.precision_plugin.forward_context():
                    features.append(encode(trainer.strategy.batch_to_device(batch["image"])))
                ids.append(batch["sample_id"])
                if len(ids) == 1 and not tables:
                    _refuse_too_many(features[0], total * trainer.world_size, name)
                advance()
            own = torch.cat(features)
            sample_id, places = _first_places(_of_all_processes(trainer, torch.cat(ids).to(own.device)).cpu())
            tables.append(_of_all_processes(trainer, own).cpu()[places])
    return FeatureTable(sample_id, torch.stack(tables))


def _refuse_too_many(batch: torch.Tensor, batches: int, name: str) -> None:
    needed = batch.numel() * batch.element_size() * batches
    memory = memory_bytes()
    if memory is not None and needed > memory * LARGEST_SHARE:
        raise TooManyFeaturesError(
            f"the features of the {name} split need {needed / 1e9:.1f} GB of the machine's {memory / 1e9:.1f} GB; "
            "lower features.n_views"
        )


def _of_all_processes(trainer: Trainer, own: torch.Tensor) -> torch.Tensor:
    """The processes' rows one after the other; all have the same number."""
    return own if trainer.world_size == 1 else trainer.strategy.all_gather(own).flatten(0, 1)


def _first_places(sample_id: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct ids in ascending order, and where each stands first: what fills up a process's share comes twice."""
    ordered, order = torch.sort(sample_id, stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return ordered[is_first], order[is_first]


@contextmanager
def _progress(trainer: Trainer, description: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on the first process's terminal; gives a function that moves it on by one."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    shown = trainer.is_global_zero and console.is_terminal
    with Progress(console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


Mode = Literal["auto", "always", "never"]


class FrozenFeatures(Callback):
    """Computes the features of frozen backbones once, for training and its validation.

    Without augmentation the results are those of the whole network, but for rounding. With augmentation
    there are as many views of each image as are asked for, the augmentations of the first ``n_views`` epochs in turn.
    Features are computed again when training is resumed, in the same order, so they are the same to the last bit.

    Args:
        mode: ``auto`` where results do not change (no augmentation, or ``n_views`` is given) and whole epochs are
            trained, ``always`` or ``never``.
        n_views: augmented views of each training image; 0 for one where nothing is augmented.
    """

    def __init__(self, mode: Mode = "auto", n_views: int = 0) -> None:
        if mode not in ("auto", "always", "never"):
            raise UserError(f"features.mode: {mode!r} is unknown; choose one of auto, always, never")
        if n_views < 0:
            raise UserError(f"features.n_views: must be 0 or more, got {n_views}")
        self.mode = mode
        self.n_views = n_views
        self._active = False
        self._reported = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to stand in front of a callback that freezes: it would see the freezing of the epoch before.

        Raises:
            UserError: if it does.
        """
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set at run time
        if any(isinstance(later, BackboneUnfreezing) for later in callbacks[callbacks.index(self) :]):
            raise UserError("trainer.callbacks: put FrozenFeatures behind BackboneUnfreezing")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the features when a phase begins in which a backbone is frozen, forget them when it ends.

        Raises:
            UserError: where ``always`` is impossible.
        """
        if not isinstance(pl_module, VisionTask) or not pl_module.frozen_sides or self.mode == "never":
            self._forget(trainer, pl_module)
        elif not self._active:
            if reason := pl_module.needs_images or self._reason_against(trainer):
                self._refuse(reason)
                return
            try:
                self._compute(trainer, pl_module)
            except TooManyFeaturesError as error:
                self._forget(trainer, pl_module)
                self._refuse(str(error))

    # The epoch may be resumed in its middle.
    on_train_start = on_train_epoch_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the features: another checkpoint may be tested next."""
        self._forget(trainer, pl_module)

    def _reason_against(self, trainer: Trainer) -> str:
        """Why features cannot be computed once, and how to fix it; empty if they can."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule) or not isinstance(trainer.train_dataloader, CountedLoader):
            return f"{type(data).__name__} cannot go through its images one by one"
        if data.mixes:
            return "mixup and CutMix mix images; switch them off"
        if data.augments and not self.n_views:
            return "training images are augmented differently in every epoch; set features.n_views, or no augmentation"
        if self.mode == "auto" and (trainer.limit_train_batches != 1.0 or getattr(trainer, "fast_dev_run", False)):
            return "only part of an epoch is trained"
        return ""

    def _refuse(self, reason: str) -> None:
        if self.mode == "always":
            raise UserError(f"features.mode: always, but {reason}; or set features.mode: never")
        if reason != self._reported:
            rank_zero_info(f"The frozen backbone computes its features in every epoch, because {reason}.")
            self._reported = reason

    def _compute(self, trainer: Trainer, task: VisionTask) -> None:
        data: ImageDataModule = trainer.datamodule  # type: ignore[attr-defined]  # set at run time
        validates, sides = trainer.enable_validation, task.frozen_sides
        self._active = True
        if "text" in sides:
            task.remember_texts([*data.training_texts(), *(data.evaluation_texts("val") if validates else ())])
        if "image" in sides:
            views = [data.view_dataloader("train", view) for view in range(max(self.n_views, 1))]
            if not data.augments:
                views = [data.view_dataloader("train", None)]
            _give(trainer.train_dataloader, compute_features(trainer, task.image_features, views, "training"))
            if validates:
                views = [data.view_dataloader("val", None)]
                _give(trainer.val_dataloaders, compute_features(trainer, task.image_features, views, "validation"))

    def _forget(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._active:
            _give(trainer.train_dataloader, None)
            _give(trainer.val_dataloaders, None)
            assert isinstance(pl_module, VisionTask)
            pl_module.remember_texts([])
        self._active = False


def _give(loaders: Any, lookup: FeatureLookup | None) -> None:
    for loader in loaders if isinstance(loaders, list) else [loaders]:
        if isinstance(loader, CountedLoader):
            loader.features = lookup
