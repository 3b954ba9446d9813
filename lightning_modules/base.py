"""Base class of all tasks: the hooks of a training step, freezing, pretrained weights and checkpoints."""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn

from lightning_modules.distributed import mean_over_processes, refuse_unfit_strategy, synchronise_batchnorm
from lightning_modules.encoders.image import warn_of_other_inputs
from lightning_modules.encoders.weights import WeightsOrigin, misfits, origin_place, report_origin
from lightning_modules.metrics import epoch_sums, restore_epoch_sums
from lightning_modules.optim import (
    TrainingPhase,
    check_optimizer,
    is_frozen,
    make_optimizer,
    monitored_value,
    parameter_groups,
    report_scaling,
    seed_step,
    set_learning_rates,
    step_seed,
)
from lightning_modules.options import OptimizerOptions, OptimOptions, ScheduleName, checked
from lightning_modules.precision import Conversion, check_half_precision, keep_small_steps
from vitrail.errors import UserError
from vitrail.types import (
    CLASS_KINDS,
    LOSS_OF_STEP,
    UNKNOWN,
    Batch,
    InputOptions,
    Outputs,
    TaskKind,
    batch_targets,
    kind_of,
)

LoggedSplit = Literal["train", "val", "test"]


class VisionTask(LightningModule, ABC):
    """Base class of all tasks.

    A subclass builds its network in the constructor and calls ``save_hyperparameters()``; ``_shared_step`` computes the
    loss of a batch and the outputs for callbacks. Pretrained weights are fetched when a stage begins, and only if no
    checkpoint replaces them.

    Args:
        lr: peak learning rate of the heads, and of the backbone unless ``optim_options.backbone_lr`` is given.
        weight_decay: weight decay; not applied to biases and norms.
        schedule: learning-rate schedule.
        optim_options: the optimizer and further settings of it.

    Attributes:
        phases: training phases with their learning rates; a callback may replace them before the first step.
        input_options: preprocessing of the training images; saved with the checkpoint.
        logit_scale_parameters: parameters of a logit scale, if there is one; never decayed, never frozen.
        logit_scale_lr: their peak learning rate; by default that of the heads.
        step_weight: total weight of the known targets of the training batch, by which accumulated batches are weighted,
            float32 scalar; None for the number of samples.
    """

    input_options: InputOptions
    logit_scale_parameters: Sequence[nn.Parameter] = ()
    logit_scale_lr: float | None = None
    step_weight: torch.Tensor | None = None

    def __init__(
        self, *, lr: float, weight_decay: float, schedule: ScheduleName, optim_options: OptimOptions | None = None
    ) -> None:
        super().__init__()
        if not (math.isfinite(weight_decay) and weight_decay >= 0):
            raise UserError(f"weight_decay: must be a number that is not negative; got {weight_decay}")
        self.weight_decay = weight_decay
        self.optim_options = options = checked(OptimOptions, optim_options, "optim_options")
        if options.lr_base_batch is not None and options.lr_scaling == "none":
            raise UserError("optim_options.lr_base_batch: does nothing without lr_scaling; set it to linear or sqrt")
        self.phases = [TrainingPhase.of(lr, schedule, options)]
        if options.optimizer != OptimizerOptions():
            check_optimizer(options)
        self._monitored: list[tuple[int, float]] = []
        self._frozen: list[nn.Parameter] = []
        self._batchnorm_fixed = False
        self._restored = False
        self._fetched = False
        self._as_fetched = False
        self._epoch_sums: dict[str, torch.Tensor] = {}
        self._origins: list[WeightsOrigin] = []
        self._step_samples: list[int | torch.Tensor] = []

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The part that may be pretrained, frozen, and trained with a learning rate of its own."""

    @abstractmethod
    def _shared_step(self, batch: Batch, split: LoggedSplit) -> tuple[torch.Tensor, Outputs]:
        """Return loss and outputs for callbacks; update the metrics of the split."""

    @abstractmethod
    def log_epoch(self, split: LoggedSplit) -> None:
        """Log the averages and scores of the epoch, and reset the metrics."""

    @property
    @abstractmethod
    def train_sums(self) -> nn.Module:
        """The metrics that accumulate the losses of a training epoch."""

    @abstractmethod
    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """Image backbone's output, float ``(B, D)``, for uint8 RGB images ``(B, 3, H, W)``.

        A batch with these as ``features["image"]`` needs no images.
        """

    @abstractmethod
    def fetch_weights(self) -> list[WeightsOrigin]:
        """Load the pretrained weights, if any, and return where they came from (UserError if that fails)."""

    @property
    def backbones(self) -> dict[str, nn.Module]:
        """The backbone's networks by the prefix of their parameter groups."""
        return {"backbone": self.backbone}

    @property
    def compilable_networks(self) -> list[nn.Module]:
        """The modules that ``torch.compile`` may compile."""
        return list(self.backbones.values())

    @property
    def pretrained_inputs(self) -> InputOptions | None:
        """Preprocessing that the pretrained weights expect; None without such weights."""
        return None

    @property
    def weights_name(self) -> str:
        """Name of the pretrained weights in messages."""
        return type(self).__name__

    @property
    def ready_without_training(self) -> bool:
        """Whether testing without a checkpoint makes sense: not with untrained heads."""
        return False

    @property
    def referenced(self) -> str:
        """Prefix of the weights of one pretrained model, which checkpoints may name; empty if there are none."""
        return ""

    def load_referenced(self, place: str) -> None:
        """Load the weights of ``referenced`` from the folder or file where they are now."""
        raise NotImplementedError

    @property
    def needs_images(self) -> str:
        """Why training needs images even where features of a frozen backbone would do; empty if it does not."""
        return ""

    @property
    def frozen_sides(self) -> list[str]:
        """The modalities, image and text, whose backbones are frozen."""
        return ["image"] if is_frozen(self.backbone) else []

    def remember_texts(self, texts: Sequence[str]) -> None:
        """Cache the features that a frozen text backbone computes for these texts, in place of earlier ones."""

    def on_train_start(self) -> None:
        """Set the learning rates of the first step, before callbacks log them, and restore the epoch's metrics."""
        self.set_learning_rates()
        report_scaling(self.trainer, self.phases, self.optim_options)
        restore_epoch_sums(self.train_sums, self._epoch_sums, is_first=self.global_rank == 0)
        self._epoch_sums = {}
        self._step_samples = []

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the learning rates, and seed dropout by run, epoch, batch and rank for exact resumption."""
        self.set_learning_rates()
        seed_step(self.device, step_seed(self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Loss of a batch, a float32 scalar."""
        loss, _ = self._shared_step(batch, "train")
        if self.is_logged(batch_idx):
            # Not with prog_bar: Lightning would read its last value in every step, and wait for the GPU.
            self.log(LOSS_OF_STEP, loss, on_step=True, on_epoch=False)
        return loss * self._share_of_step(len(batch["sample_id"]))

    def is_logged(self, batch_idx: int) -> bool:
        """Whether this training step is logged; a call of Lightning's ``log`` takes a millisecond."""
        return batch_idx == 0 or self.trainer._logger_connector.should_update_logs

    def _share_of_step(self, samples: int) -> float | torch.Tensor:
        """Weight of a batch in a step that accumulates several: its samples, or targets, in units of full batches."""
        if self.trainer.accumulate_grad_batches == 1:
            return 1.0
        weight = samples if self.step_weight is None else self.step_weight
        self._step_samples.append(weight)
        return weight / self._full_batch

    @property
    def _full_batch(self) -> int:
        return getattr(self.trainer.train_dataloader, "batch_size", None) or 1

    def on_after_backward(self) -> None:
        """Average the accumulated gradient over samples, or over the known targets of a single task.

        Lightning divides by ``accumulate_grad_batches`` even where the last step of an epoch has fewer batches
        (Lightning #19987), and weights a smaller batch like a full one.
        """
        planned = self.trainer.accumulate_grad_batches
        if planned == 1 or self.trainer.fit_loop.epoch_loop._should_accumulate():
            return
        own = sum(self._step_samples) / self._full_batch
        self._step_samples = []
        if self.trainer.world_size == 1 and isinstance(own, float) and own == planned:
            return
        # All processes must scale alike; the gradients are averaged already.
        done = mean_over_processes(torch.as_tensor(own, device=self.device))
        done = torch.where(done > 0, done, torch.ones_like(done))
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_((planned / done).to(parameter.grad.dtype))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Set the learning rates of the next step, which ``LearningRateMonitor`` logs before it begins."""
        self.set_learning_rates()

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Update the metrics and return outputs for callbacks."""
        return self._shared_step(batch, "val")[1]

    def test_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Update the metrics and return outputs for callbacks."""
        return self._shared_step(batch, "test")[1]

    def on_train_epoch_end(self) -> None:
        """Log the averages of the epoch."""
        self.log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        """Log the averages and scores of the epoch, and note what the schedule ``plateau`` waits for."""
        self.log_epoch("val")
        self._monitored += monitored_value(self.trainer, self.phases)

    def on_test_epoch_end(self) -> None:
        """Log the averages and scores of the epoch."""
        self.log_epoch("test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer over all parameters, also those that are frozen at first."""
        groups = parameter_groups(
            self,
            self.backbones,
            weight_decay=self.weight_decay,
            layer_decay=self.optim_options.layer_decay,
            frozen=self._frozen,
            logit_scale=self.logit_scale_parameters,
            logit_scale_lr=self.logit_scale_lr,
        )
        precision = "32-true" if self._trainer is None else str(self.trainer.precision)
        return make_optimizer(groups, self.phases[0], self.optim_options, precision)

    def set_learning_rates(self) -> None:
        """Set the learning rate of each parameter group for the next step."""
        set_learning_rates(self.trainer, self.phases, self.optim_options, self._monitored)

    def setup(self, stage: str) -> None:
        """Refuse unsupported strategies and targets of other kinds; convert BatchNorm for ``sync_batchnorm``."""
        refuse_unfit_strategy(self.trainer)
        self._refuse_other_kinds()
        if stage == "fit":
            check_half_precision(self.trainer)
        synchronise_batchnorm(self, self.trainer)
        self.adopt_inputs()

    def _refuse_other_kinds(self) -> None:
        data = self._datamodule()
        theirs, kinds = getattr(data, "task_kinds", None) or {}, getattr(self, "task_kinds", {})
        for task in getattr(self, "tasks", {}):
            own, given = kind_of(kinds, task), kind_of(theirs, task)
            if own != given and not {own, given} <= set(CLASS_KINDS) and task in getattr(data, "tasks", {}):
                raise UserError(
                    f"task {task!r}: {type(self).__name__} takes it as {own}, the data have it as {given}; use a model "
                    "that takes every kind, such as lightning_modules.MultiTaskClassifier, or the run's own data"
                )

    def on_fit_start(self) -> None:
        """Fetch pretrained weights and compare their preprocessing with that of the data."""
        self.load_pretrained()
        self._as_fetched = False
        self.adopt_inputs()
        self.compare_inputs()
        self._try_sizes()

    def on_validation_start(self) -> None:
        """Fetch pretrained weights unless training or a checkpoint has replaced them."""
        self.load_pretrained()
        if self.trainer.state.fn != "fit":
            self.compare_inputs()

    on_test_start = on_predict_start = on_validation_start

    def load_pretrained(self) -> None:
        """Fetch the pretrained weights once, unless a checkpoint has replaced them.

        Every stage calls this; a program may call it earlier so that it fails before the data are read.

        Raises:
            UserError: if they cannot be fetched or do not fit.
        """
        if not (self._restored or self._fetched):
            self._origins = self.fetch_weights()
            self._fetched = self._as_fetched = True
            for origin in self._origins:
                report_origin(origin)

    @property
    def origins(self) -> list[WeightsOrigin]:
        """The pretrained weights that training started from; saved in checkpoints."""
        return self._origins

    @property
    def own_inputs(self) -> InputOptions | None:
        """Preprocessing that the model expects: that of the checkpoint, otherwise of the pretrained weights."""
        return self.input_options if self._restored else self.pretrained_inputs

    def _datamodule(self) -> Any:
        return None if self._trainer is None else getattr(self.trainer, "datamodule", None)

    def adopt_inputs(self) -> None:
        """Let the data use the preprocessing that the model expects where their options leave it open."""
        adopt = getattr(self._datamodule(), "adopt_image_options", None)
        if adopt is not None and (own := self.own_inputs) is not None:
            adopt(own)

    def warn_of_other_inputs(self, options: InputOptions) -> None:
        """Warn if the preprocessing differs from that of the pretrained weights."""
        if (expected := self.pretrained_inputs) is not None:
            warn_of_other_inputs(self.weights_name, options, expected)

    def compare_inputs(self) -> None:
        """Warn if the preprocessing of the data differs from that of the weights."""
        options: InputOptions | None = getattr(self._datamodule(), "image_options", None)
        if options is None:
            return
        if self._restored and self.trainer.state.fn != "fit":
            warn_of_other_inputs("the checkpoint", options, self.input_options)
        else:
            self.input_options = {**options}
            self.warn_of_other_inputs(self.input_options)

    @torch.no_grad()
    def _try_sizes(self) -> None:
        """Refuse training images of a size that the network cannot take."""
        training = self.training
        for side in getattr(self._datamodule(), "training_sizes", ()):
            self.eval()
            try:
                self.image_features(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.device))
            except (AssertionError, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())[:120]
                raise UserError(
                    f"data augment.sizes: {self.weights_name} cannot take images of {side} px ({reason}); choose other "
                    "sizes, or a network of any size, as convolutional ones are"
                ) from error
        self.train(training)

    def freeze_backbone(self) -> None:
        """Freeze the backbone: no gradients, and evaluation mode, so that BatchNorm's statistics stay.

        Under DDP call this from ``on_fit_start`` on: DDP never synchronises what was frozen when it wrapped the model.
        """
        if not self._frozen:
            self._frozen = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self.backbone.eval()

    def unfreeze_backbone(self) -> None:
        """Undo ``freeze_backbone``; parameters frozen before it stay frozen."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
        self.train(self.training)

    def fix_batchnorm(self) -> None:
        """Freeze the running statistics of the backbone's BatchNorm."""
        self._batchnorm_fixed = True
        self.train(self.training)

    @property
    def backbone_frozen(self) -> bool:
        """Whether the backbone is frozen."""
        return bool(self._frozen)

    def train(self, mode: bool = True) -> Self:
        """As torch's, but a frozen backbone and fixed BatchNorm stay in evaluation mode."""
        super().train(mode)
        if self.backbone_frozen:
            self.backbone.eval()
        elif self._batchnorm_fixed:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _apply(self, fn: Conversion, recurse: bool = True) -> Self:
        """As torch's, but some parameters stay float32 (``lightning_modules.precision``)."""
        keep_small_steps(self, lambda: super(VisionTask, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def save_hyperparameters(self, *args: Any, frame: Any = None, **settings: Any) -> None:
        """As Lightning's, with dataclasses as dictionaries, for ``torch.load(weights_only=True)``."""
        caller = inspect.currentframe()
        super().save_hyperparameters(*args, frame=frame or (caller and caller.f_back), **settings)
        for name, value in self.hparams.items():
            if is_dataclass(value) and not isinstance(value, type):
                self.hparams[name] = asdict(value)
        self._hparams_initial = copy.deepcopy(self._hparams)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the class path, preprocessing, origin of the pretrained weights and unfinished metrics."""
        hyper_parameters = checkpoint.setdefault("hyper_parameters", dict(self.hparams))
        hyper_parameters.setdefault("_class_path", f"{type(self).__module__}.{type(self).__qualname__}")
        checkpoint["input_options"] = dict(self.input_options)
        checkpoint["pretrained"] = [dict(origin) for origin in self.origins]
        if self._as_fetched and self.referenced and "state_dict" in checkpoint:
            # Weights that nothing has changed, as of a zero-shot model, are named by their origin, not copied.
            checkpoint["by_reference"] = True
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {n: value for n, value in state.items() if not n.startswith(self.referenced)}
        checkpoint["monitored"] = list(self._monitored)
        # Tools that average weights have no trainer.
        reduce = self.trainer.strategy.reduce if self._trainer is not None else None
        checkpoint["epoch_sums"] = epoch_sums(
            self.train_sums, lambda s: s if reduce is None else reduce(s, reduce_op="sum")
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the preprocessing and metrics; of pretrained weights only those are needed that it names.

        Raises:
            UserError: the checkpoint names weights that have changed or are gone.
        """
        self._restored, self._as_fetched = True, False
        self.input_options = checkpoint.get("input_options", self.input_options)
        self.adopt_inputs()
        if (adopt_range := getattr(self._datamodule(), "adopt_range", None)) is not None:
            adopt_range(checkpoint.get("input_options", {}).get("value_range", "auto"))
        self._epoch_sums = checkpoint.get("epoch_sums", {})
        self._origins = list(checkpoint.get("pretrained", []))
        if checkpoint.pop("by_reference", False):
            self.load_referenced(str(origin_place(self._origins[0])))
            state = {n: value for n, value in self.state_dict().items() if n.startswith(self.referenced)}
            checkpoint["state_dict"] = {**state, **checkpoint["state_dict"]}
        self._monitored = [(int(step), float(value)) for step, value in checkpoint.get("monitored", [])]

    def fitting_state(self, checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Weights of a checkpoint that training may go on from, and one line for each part that starts again."""
        return dict(checkpoint["state_dict"]), []

    def misfits(self, state_dict: Mapping[str, Any]) -> str:
        """Describe weights that are missing, unexpected or of another shape; empty if all fit."""
        return misfits(state_dict, self.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, but misfits raise a UserError of one line, and BatchNorm's counters must not be missing."""
        if strict and (wrong := self.misfits(state_dict)):
            raise UserError(f"the weights do not fit {type(self).__name__}: {wrong}")
        self._as_fetched = False
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def weights_digest(self) -> str:
        """See ``weights_digest``; a gallery identifies its model by it."""
        return weights_digest(self)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of names, dtypes, shapes and values of a module's weights; a collective call if they are sharded."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            continue  # extra state, which no embedding depends on
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def real_rows(batch: Batch) -> torch.Tensor:
    """Mask of the rows that are not padding, bool ``(B,)``."""
    if "is_padding" in batch:
        return ~batch["is_padding"]
    return torch.ones_like(batch["sample_id"], dtype=torch.bool)


def known_targets(
    batch: Batch, tasks: Mapping[str, Sequence[str]], kinds: Mapping[str, TaskKind] | None = None
) -> dict[str, torch.Tensor]:
    """Targets of these tasks (see ``Batch``); unknown where the batch has none and for padding."""
    given, padding = batch_targets(batch), ~real_rows(batch)
    targets = {}
    for task, names in tasks.items():
        target = given.get(task)
        if target is None:
            target = unknown_targets(kind_of(kinds, task), len(names), batch["sample_id"])
        rows = padding.view(-1, *[1] * (target.ndim - 1))
        targets[task] = target.masked_fill(rows, math.nan if target.is_floating_point() else UNKNOWN)
    return targets


def unknown_targets(kind: TaskKind, num_classes: int, like: torch.Tensor) -> torch.Tensor:
    """Unknown targets of a task for the rows of an int64 tensor ``(B,)``."""
    if kind == "regression":
        return torch.full(like.shape, math.nan, device=like.device)
    if kind == "multi_label":
        return torch.full((len(like), num_classes), UNKNOWN, dtype=torch.int8, device=like.device)
    return torch.full_like(like, UNKNOWN)


def training_outputs(batch: Batch) -> Outputs:
    """Outputs of a training step, which no callback reads: selecting rows would make the CPU wait for a GPU."""
    return {"sample_id": batch["sample_id"], "logits": {}, "targets": {}}


def real_outputs(
    batch: Batch,
    logits: Mapping[str, torch.Tensor],
    targets: Mapping[str, torch.Tensor],
    features: torch.Tensor | None = None,
) -> Outputs:
    """Outputs of a batch for callbacks, without padding; features, float ``(B, D)``, become unit-length embeddings."""
    real = real_rows(batch)
    outputs: Outputs = {
        "sample_id": batch["sample_id"][real],
        "logits": {task: values.detach()[real] for task, values in logits.items()},
        "targets": {task: values[real] for task, values in targets.items()},
    }
    if features is not None:
        outputs["image_embedding"] = F.normalize(features.detach()[real].float(), dim=-1)
    return outputs
