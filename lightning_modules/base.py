"""What every task that sorts pictures shares: ``configure_model → losses → metrics``, and one step for all splits.

A task builds its network in its constructor and says in ``forward`` how pictures become logits. Everything else
is here: masked and weighted losses, averages per sample, metrics, learning rates by phase, counted randomness,
freezing, and pretrained weights that are only fetched where no checkpoint replaces them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, Self

import torch
from lightning.pytorch import LightningModule
from torch import nn

from datamodules.schema import UNKNOWN, Batch, Outputs, UserError, batch_targets
from lightning_modules.encoders import ImageEncoder, InputOptions, PreparesImages
from lightning_modules.losses import ClassWeighting, MeanLoss, TaskLoss, class_weights_from_counts, masked_cross_entropy
from lightning_modules.metrics import SplitMetrics
from lightning_modules.optim import (
    OptimOptions,
    adamw,
    checked_options,
    learning_rate,
    parameter_groups,
    single_phase,
    step_seed,
)
from lightning_modules.schedules import ScheduleName, steps_of_training

LoggedSplit = Literal["train", "val", "test"]


class VisionTask(LightningModule, ABC):
    """A task that gives logits for named classes.

    A subclass calls this constructor, then ``save_hyperparameters()``, then adds its heads outside the encoder.

    Args:
        encoder: makes features of uint8 pictures.
        tasks: class names of each task that is trained, in the order of the indices.
        task_weights: weight of each task's loss in the sum.
        class_counts: training samples of each class, for each task; read only where classes are weighted.
        label_smoothing: in [0, 1); in training only.
        class_weighting: how rare classes count more; in training only.
        lr: highest learning rate of the heads, and of the backbone unless ``backbone_lr`` is given.
        weight_decay: AdamW's; not applied to biases and norms.
        schedule: course of the learning rate.
        optim_options: rarer settings.

    Attributes:
        phases: stretches of training with own learning rates; a callback may replace them before the first step.
        input_options: how the pictures were made that it learned from; saved with the checkpoint.

    Raises:
        UserError: if the settings do not fit together.
    """

    def __init__(
        self,
        *,
        encoder: ImageEncoder,
        tasks: dict[str, list[str]],
        task_weights: dict[str, float],
        class_counts: dict[str, list[int]] | None,
        label_smoothing: float,
        class_weighting: ClassWeighting,
        lr: float,
        weight_decay: float,
        schedule: ScheduleName,
        optim_options: OptimOptions | None,
    ) -> None:
        super().__init__()
        for task, names in tasks.items():
            if len(names or ()) < 2:
                raise UserError(
                    f"tasks: {task!r} has fewer than two classes; leave it out, or mend the data's class names"
                )
        self.encoder = encoder
        self.tasks = tasks
        self.input_options: InputOptions = {**encoder.input_options}
        self.task_weights = task_weights
        self.weight_decay = weight_decay
        self.optim_options = checked_options(optim_options)
        self.phases = [single_phase(lr, schedule, self.optim_options)]
        self.losses = nn.ModuleList(
            TaskLoss(class_weights_from_counts(task, len(names), class_counts, class_weighting), label_smoothing)
            for task, names in tasks.items()
        )
        self.train_metrics = SplitMetrics(tasks, task_weights, losses_only=True)
        self.val_metrics = SplitMetrics(tasks, task_weights)
        self.test_metrics = SplitMetrics(tasks, task_weights)
        self._frozen: list[nn.Parameter] = []
        self._batchnorm_fixed = False
        self._restored = False

    @abstractmethod
    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of each task.

        Args:
            image: uint8 ``(B, 3, H, W)``, RGB.

        Returns:
            For each task float ``(B, C)``.
        """

    @property
    def ready_without_training(self) -> bool:
        """Whether testing makes sense without a checkpoint: not with heads that have never learned."""
        return False

    def load_pretrained(self) -> None:
        """Fetch the encoder's pretrained weights, if it is to have any and has not got them yet.

        Training calls this when a checkpoint has had its chance to replace them. A command line that knows there is
        no checkpoint may call it earlier, so that an error comes before the data are read.

        Raises:
            UserError: if they cannot be had or do not fit.
        """
        if not self._restored:
            self.encoder.load_pretrained()

    def freeze_backbone(self) -> None:
        """Keep the backbone as it is: no gradients, and evaluation mode, or BatchNorm's statistics would drift.

        Under DDP call this after the model is wrapped, from ``on_fit_start`` on: what is frozen while DDP wraps it is
        never synchronised again.
        """
        if not self._frozen:
            self._frozen = [parameter for parameter in self.encoder.backbone.parameters() if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self.encoder.backbone.eval()

    def unfreeze_backbone(self) -> None:
        """Undo ``freeze_backbone``; parameters that were fixed before stay fixed."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
        self.train(self.training)

    def fix_batchnorm(self) -> None:
        """Let the backbone's BatchNorm keep the statistics that it has, also while everything else learns."""
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
            self.encoder.backbone.eval()
        elif self._batchnorm_fixed:
            for module in self.encoder.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over all parameters, also those that are frozen at first."""
        groups = parameter_groups(
            self,
            self.encoder.backbone,
            weight_decay=self.weight_decay,
            layer_decay=self.optim_options.get("layer_decay", 1.0),
            frozen=self._frozen,
        )
        return adamw(groups, self.phases[0], self.optim_options)

    def set_learning_rates(self) -> None:
        """Give each parameter group the learning rate of the step that comes next.

        Raises:
            UserError: if the phases or the length of the training do not allow it.
        """
        trainer = self.trainer
        steps_per_epoch, total_steps = steps_of_training(
            trainer.num_training_batches, trainer.accumulate_grad_batches, trainer.max_epochs, trainer.max_steps
        )
        for group in trainer.optimizers[0].param_groups:
            lr = learning_rate(self.phases, group["part"], trainer.global_step, steps_per_epoch, total_steps)
            group["lr"] = lr * group["lr_scale"]

    def on_fit_start(self) -> None:
        """Fetch pretrained weights and compare the pictures with those that the weights were trained on."""
        self.load_pretrained()
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, PreparesImages):
            self.input_options = {**datamodule.image_options}
            self.encoder.warn_of_other_inputs(self.input_options)

    def on_train_start(self) -> None:
        """Set the learning rates of the first step, before callbacks log them."""
        self.set_learning_rates()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the learning rates and make this step's dropout a function of seed, epoch, batch and rank.

        So a resumed run draws what an uninterrupted one would have drawn.
        """
        self.set_learning_rates()
        torch.manual_seed(step_seed(self.current_epoch, batch_idx, self.global_rank))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Set the learning rates of the next step, which ``LearningRateMonitor`` logs before it begins."""
        self.set_learning_rates()

    def on_train_epoch_end(self) -> None:
        """Log the averages of the epoch."""
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        """Log the averages and scores of the epoch."""
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        """Log the averages and scores of the epoch."""
        self._log_epoch("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the name of the class, so that a checkpoint that was not made by the command line can be loaded too."""
        hyper_parameters = checkpoint.setdefault("hyper_parameters", dict(self.hparams))
        hyper_parameters.setdefault("_class_path", f"{type(self).__module__}.{type(self).__qualname__}")
        checkpoint["input_options"] = dict(self.input_options)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember that pretrained weights are not needed any more."""
        self._restored = True
        self.input_options = {**self.input_options, **checkpoint.get("input_options", {})}

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Loss of a batch.

        Returns:
            float32 scalar.
        """
        loss, _ = self._shared_step(batch, "train")
        self.log("train/loss_step", loss, on_step=True, on_epoch=False, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Count a batch and hand its outputs to callbacks."""
        return self._shared_step(batch, "val")[1]

    def test_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Count a batch and hand its outputs to callbacks."""
        return self._shared_step(batch, "test")[1]

    def predict_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs of a batch, whose targets may be unknown."""
        return self._outputs(batch, self._logits(batch), self._targets(batch))

    def _shared_step(self, batch: Batch, split: LoggedSplit) -> tuple[torch.Tensor, Outputs]:
        """Loss, and what callbacks may want; counts losses and, in evaluation, scores.

        In evaluation the loss is plain cross-entropy, so that runs with other smoothing and class weights compare.
        """
        logits, targets = self._logits(batch), self._targets(batch)
        means: dict[str, MeanLoss] = {}
        for task, criterion in zip(self.tasks, self.losses, strict=True):
            if split == "train":
                means[task] = criterion(logits[task], targets[task], batch.get("mix"))
            else:
                means[task] = masked_cross_entropy(logits[task], targets[task])
        metrics = self._metrics_of(split)
        metrics.update_losses(means)
        if split != "train":
            metrics.update_scores(logits, targets)
        loss = torch.stack([self.task_weights[task] * mean.value for task, mean in means.items()]).sum()
        return loss, self._outputs(batch, logits, targets)

    def _logits(self, batch: Batch) -> dict[str, torch.Tensor]:
        """float32 also where the network computes in half precision."""
        return {task: logits.float() for task, logits in self(batch["image"]).items()}

    def _targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Targets of our tasks, unknown where the batch has none and where a row is only padding."""
        given = batch_targets(batch)
        unknown = torch.full_like(batch["sample_id"], UNKNOWN)
        targets = {task: given.get(task, unknown) for task in self.tasks}
        if "is_padding" in batch:
            targets = {task: target.masked_fill(batch["is_padding"], UNKNOWN) for task, target in targets.items()}
        return targets

    def _outputs(self, batch: Batch, logits: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> Outputs:
        real = ~batch["is_padding"] if "is_padding" in batch else slice(None)
        return {
            "sample_id": batch["sample_id"][real],
            "logits": {task: values.detach()[real] for task, values in logits.items()},
            "targets": {task: values[real] for task, values in targets.items()},
        }

    def _metrics_of(self, split: LoggedSplit) -> SplitMetrics:
        return {"train": self.train_metrics, "val": self.val_metrics, "test": self.test_metrics}[split]

    def _log_epoch(self, split: LoggedSplit) -> None:
        metrics = self._metrics_of(split)
        values = {f"{split}/{name}": value for name, value in metrics.compute().items()}
        # The values are the same on all processes already; sync_dist only keeps Lightning from doubting it.
        self.log_dict(values, sync_dist=True)
        metrics.reset()
