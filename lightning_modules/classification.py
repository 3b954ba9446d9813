"""What every task that sorts images shares: from logits to losses, scores and outputs.

A task says in ``classify`` how features become logits. Masked and weighted losses, averages per sample and metrics are
here.

One label per image: a timm backbone with a linear head.

Several named attributes per image: one backbone, one small head each.

What every task shares whose outputs are logits over named classes: losses and scores of each split, logged alike.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from lightning_modules.base import LoggedSplit, VisionTask, known_targets, real_outputs, with_embedding
from lightning_modules.encoders.image import ImageEncoder, InputOptions, WeightsOrigin
from lightning_modules.losses import ClassWeighting, MeanLoss, TaskLoss, class_weights_from_counts, masked_cross_entropy
from lightning_modules.metrics import SplitMetrics
from lightning_modules.optim import OptimOptions, ScheduleName
from lightning_modules.precision import Float32Linear, Float32Sequential
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK, Batch, Outputs


class ScoredTask(VisionTask):
    """A task that is judged by its logits. A subclass calls ``keep_scores`` once it knows its tasks.

    Attributes:
        tasks: class names of each task.
        task_weights: weight of each task's loss in the sum.
    """

    def keep_scores(self, tasks: dict[str, list[str]], task_weights: Mapping[str, float] | None = None) -> None:
        """Makes the metrics of all splits.

        Args:
            tasks: class names of each task.
            task_weights: weight of each task's loss in the sum, by default 1.
        """
        self.tasks = tasks
        self.task_weights = {**dict.fromkeys(tasks, 1.0), **(task_weights or {})}
        self.train_metrics = SplitMetrics(tasks, self.task_weights, losses_only=True)
        self.val_metrics = SplitMetrics(tasks, self.task_weights)
        self.test_metrics = SplitMetrics(tasks, self.task_weights)

    @property
    def train_sums(self) -> nn.Module:
        """See ``VisionTask``."""
        return self.train_metrics

    def log_epoch(self, split: LoggedSplit) -> None:
        """Log the averages and scores of the epoch."""
        values = {f"{split}/{name}": value for name, value in self.epoch_values(split).items()}
        # The values are the same on all processes already; sync_dist only keeps Lightning from doubting it.
        self.log_dict(values, sync_dist=True)

    def epoch_values(self, split: LoggedSplit) -> dict[str, Any]:
        """Averages and scores of the epoch, which are counted anew from here."""
        metrics = self._metrics_of(split)
        values = dict(metrics.compute())
        metrics.reset()
        return values

    def plain_losses(
        self, logits: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
    ) -> dict[str, MeanLoss]:
        """Cross-entropy of each task, the loss that all runs are compared by in evaluation.

        Args:
            logits: by task float ``(B, C)``.
            targets: by task int64 ``(B,)``, -1 where unknown.
        """
        return {task: masked_cross_entropy(logits[task], targets[task]) for task in self.tasks}

    def count(
        self,
        split: LoggedSplit,
        means: Mapping[str, MeanLoss],
        logits: Mapping[str, torch.Tensor],
        targets: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Counts the losses of a batch and, in evaluation, its scores.

        Args:
            split: that the batch is of.
            means: loss of each task.
            logits: by task float ``(B, C)``; not read in training, where images may be mixed.
            targets: by task int64 ``(B,)``, -1 where unknown.

        Returns:
            The weighted sum of the losses, a scalar.
        """
        metrics = self._metrics_of(split)
        metrics.update_losses(means)
        if split != "train":
            metrics.update_scores(logits, targets)
        return torch.stack([self.task_weights[task] * mean.value for task, mean in means.items()]).sum()

    def _metrics_of(self, split: LoggedSplit) -> SplitMetrics:
        return {"train": self.train_metrics, "val": self.val_metrics, "test": self.test_metrics}[split]


class ClassificationTask(ScoredTask):
    """A task that gives logits for named classes.

    A subclass calls this constructor, then ``save_hyperparameters()``, then adds its heads outside the encoder.

    Args:
        encoder: makes features of uint8 images.
        tasks: class names of each task that is trained, in the order of the indices.
        task_weights: weight of each task's loss in the sum.
        class_counts: training samples of each class, for each task; read only where classes are weighted.
        label_smoothing: in [0, 1); in training only.
        class_weighting: how rare classes count more; in training only.
        lr: highest learning rate of the heads, and of the backbone unless ``backbone_lr`` is given.
        weight_decay: AdamW's; not applied to biases and norms.
        schedule: course of the learning rate.
        optim_options: rarer settings.

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
        super().__init__(lr=lr, weight_decay=weight_decay, schedule=schedule, optim_options=optim_options)
        for task, names in tasks.items():
            if len(names or ()) < 2:
                raise UserError(
                    f"tasks: {task!r} has fewer than two classes; leave it out, or mend the data's class names"
                )
        self.encoder = encoder
        self.keep_scores(tasks, task_weights)
        self.input_options: InputOptions = {**encoder.input_options}
        self.losses = nn.ModuleList(
            TaskLoss(class_weights_from_counts(task, len(names), class_counts, class_weighting), label_smoothing)
            for task, names in tasks.items()
        )

    @abstractmethod
    def classify(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of each task.

        Args:
            features: float ``(B, D)``, of the encoder.

        Returns:
            For each task float ``(B, C)``.
        """

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of each task.

        Args:
            image: uint8 ``(B, 3, H, W)``, RGB.

        Returns:
            For each task float ``(B, C)``.
        """
        return self.classify(self.encoder(image))

    @property
    def backbone(self) -> nn.Module:
        """The encoder's network."""
        return self.encoder.backbone

    def fetch_weights(self) -> None:
        """Fetch the encoder's pretrained weights, if it is to have any and has not got them yet.

        Raises:
            UserError: if they cannot be had or do not fit.
        """
        self.encoder.load_pretrained()

    def loaded_origins(self) -> list[WeightsOrigin]:
        """See ``VisionTask``."""
        return [self.encoder.origin] if self.encoder.origin else []

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """See ``VisionTask``."""
        return cast("torch.Tensor", self.encoder(image))

    @property
    def pretrained_inputs(self) -> InputOptions | None:
        """See ``VisionTask``."""
        return self.encoder.own_inputs

    def warn_of_other_inputs(self, options: InputOptions) -> None:
        """One warning line where images are made otherwise than those that the pretrained weights learned from."""
        self.encoder.warn_of_other_inputs(options)

    def predict_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs of a batch, whose targets may be unknown."""
        features = self._features(batch)
        outputs = real_outputs(batch, self._logits(features), known_targets(batch, self.tasks))
        return with_embedding(outputs, batch, features)

    @property
    def embedding_dim(self) -> int:
        """Length of ``image_embedding`` in the outputs."""
        return self.encoder.num_features

    def _shared_step(self, batch: Batch, split: LoggedSplit) -> tuple[torch.Tensor, Outputs]:
        """Loss, and what callbacks may want; counts losses and, in evaluation, scores.

        In evaluation the loss is plain cross-entropy, so that runs with other smoothing and class weights compare.
        """
        features, targets = self._features(batch), known_targets(batch, self.tasks)
        logits = self._logits(features)
        if split == "train":
            criteria = zip(self.tasks, self.losses, strict=True)
            means = {task: loss(logits[task], targets[task], batch.get("mix")) for task, loss in criteria}
        else:
            means = self.plain_losses(logits, targets)
        loss = self.count(split, means, logits, targets)
        outputs = real_outputs(batch, logits, targets)
        return loss, with_embedding(outputs, batch, features) if split == "test" else outputs

    def _features(self, batch: Batch) -> torch.Tensor:
        features: torch.Tensor = batch["features"]["image"] if "features" in batch else self.encoder(batch["image"])
        return features

    def _logits(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """float32 also where the network computes in half precision."""
        return {task: logits.float() for task, logits in self.classify(features).items()}


class ImageClassifier(ClassificationTask):
    """Classifies images by the main label of the data.

    Args:
        backbone: name in timm.
        class_names: linked from the data.
        class_counts: training samples of each class, linked from the data; read only where classes are weighted.
        image_size: height and width in pixels, linked from the data.
        pretrained: true for the weights on the hub, false for random ones, or the path of a weights file.
        drop_rate: dropout in front of the head, in [0, 1).
        label_smoothing: share of the target that is spread over all classes in training, in [0, 1).
        class_weighting: how rare classes count more in training: none, inverse, sqrt_inverse or effective_number.
        lr: highest learning rate; ``optim_options.backbone_lr`` sets another one for the backbone.
        weight_decay: AdamW's; not applied to biases and norms.
        schedule: course of the learning rate: constant, cosine, step or onecycle.
        optim_options: betas, eps, backbone_lr, layer_decay, warmup_epochs, min_lr, step_size, gamma, lr_scaling,
            lr_base_batch.

    Raises:
        UserError: if the settings do not fit together.
    """

    def __init__(
        self,
        backbone: str,
        class_names: list[str],
        *,
        class_counts: dict[str, list[int]] | None = None,
        image_size: int = 224,
        pretrained: bool | str = True,
        drop_rate: float = 0.0,
        label_smoothing: float = 0.0,
        class_weighting: ClassWeighting = "none",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        schedule: ScheduleName = "cosine",
        optim_options: OptimOptions | None = None,
    ) -> None:
        super().__init__(
            encoder=ImageEncoder(backbone, image_size, pretrained),
            tasks={LABEL_TASK: class_names},
            task_weights={LABEL_TASK: 1.0},
            class_counts=class_counts,
            label_smoothing=label_smoothing,
            class_weighting=class_weighting,
            lr=lr,
            weight_decay=weight_decay,
            schedule=schedule,
            optim_options=optim_options,
        )
        self.save_hyperparameters()
        self.drop = nn.Dropout(drop_rate)
        self.head = Float32Linear(self.encoder.num_features, len(class_names))

    def classify(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of the label.

        Args:
            features: float ``(B, D)``, of the encoder.

        Returns:
            ``{"class": (B, C)}``, float.
        """
        return {LABEL_TASK: self.head(self.drop(features))}


FEATURE_DROP_RATE = 0.1
HEAD_DROP_RATE = 0.2


class MultiTaskClassifier(ClassificationTask):
    """Classifies images by several attributes at once.

    The heads are those of the reference: dropout 0.1 on the features, then for each task
    ``Linear(d, d // 2), ReLU, Dropout(0.2), Linear(d // 2, n)``.

    Args:
        backbone: name in timm.
        tasks: class names of each task, linked from the data.
        class_counts: training samples of each class, linked from the data; read only where classes are weighted.
        image_size: height and width in pixels, linked from the data.
        pretrained: true for the weights on the hub, false for random ones, or the path of a weights file.
        task_weights: the tasks that are learned, with the weight of their losses; all with weight 1 if not given.
        label_smoothing: share of the target that is spread over all classes in training, in [0, 1).
        class_weighting: how rare classes count more in training: none, inverse, sqrt_inverse or effective_number.
        lr: highest learning rate; ``optim_options.backbone_lr`` sets another one for the backbone.
        weight_decay: AdamW's; not applied to biases and norms.
        schedule: course of the learning rate: constant, cosine, step or onecycle.
        optim_options: betas, eps, backbone_lr, layer_decay, warmup_epochs, min_lr, step_size, gamma, lr_scaling,
            lr_base_batch.

    Raises:
        UserError: if the settings do not fit together.
    """

    def __init__(
        self,
        backbone: str,
        tasks: dict[str, list[str]],
        *,
        class_counts: dict[str, list[int]] | None = None,
        image_size: int = 224,
        pretrained: bool | str = True,
        task_weights: dict[str, float] | None = None,
        label_smoothing: float = 0.0,
        class_weighting: ClassWeighting = "none",
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        schedule: ScheduleName = "cosine",
        optim_options: OptimOptions | None = None,
    ) -> None:
        weights = _checked_weights(tasks, task_weights)
        super().__init__(
            encoder=ImageEncoder(backbone, image_size, pretrained),
            tasks={task: names for task, names in tasks.items() if task in weights},
            task_weights=weights,
            class_counts=class_counts,
            label_smoothing=label_smoothing,
            class_weighting=class_weighting,
            lr=lr,
            weight_decay=weight_decay,
            schedule=schedule,
            optim_options=optim_options,
        )
        self.save_hyperparameters()
        self.drop = nn.Dropout(FEATURE_DROP_RATE)
        # A list, because the name of a task need not be a legal name of a module.
        self.heads = nn.ModuleList(_head(self.encoder.num_features, len(names)) for names in self.tasks.values())

    def classify(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of each task.

        Args:
            features: float ``(B, D)``, of the encoder.

        Returns:
            For each task float ``(B, C)``.
        """
        kept = self.drop(features)
        return {task: head(kept) for task, head in zip(self.tasks, self.heads, strict=True)}


def _head(num_features: int, num_classes: int) -> nn.Module:
    hidden = num_features // 2
    return Float32Sequential(
        nn.Linear(num_features, hidden), nn.ReLU(), nn.Dropout(HEAD_DROP_RATE), nn.Linear(hidden, num_classes)
    )


def _checked_weights(tasks: dict[str, list[str]], task_weights: dict[str, float] | None) -> dict[str, float]:
    if not tasks:
        raise UserError("tasks: there are none; use a DataModule that has tasks")
    if task_weights is None:
        return dict.fromkeys(tasks, 1.0)
    unknown = sorted(set(task_weights) - set(tasks))
    if unknown or not task_weights:
        raise UserError(f"task_weights: the data have no {', '.join(unknown) or 'task'}; they have {', '.join(tasks)}")
    if not all(weight > 0 for weight in task_weights.values()):
        raise UserError(f"task_weights: must be above 0, got {task_weights}; a task that is not named is not learned")
    return task_weights
