"""Image classifiers: one label an image (``ImageClassifier``), or several attributes (``MultiTaskClassifier``).

A classifier is an encoder and heads: ``classify`` turns features into logits. Its loss is cross-entropy that leaves out
unknown targets, weights rare classes, smooths targets and splits mixed images. ``ScoredTask`` holds what every task has
whose outputs are logits over named classes: losses and scores of each split, logged alike.
"""

# No postponed annotations: jsonargparse would lose the ranges of the arguments.

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.base import LoggedSplit, VisionTask, known_targets, real_outputs, with_embedding
from lightning_modules.encoders.image import ImageEncoder
from lightning_modules.encoders.weights import WeightsOrigin
from lightning_modules.metrics import MeanLoss, SplitMetrics
from lightning_modules.options import ClassWeighting, NonNegative, OptimOptions, Rate, ScheduleName
from lightning_modules.precision import Float32Linear, Float32Sequential, KeepsFloat32
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK, UNKNOWN, Batch, InputOptions, Mix, Outputs

EFFECTIVE_NUMBER_BETA = 0.999
FEATURE_DROP_RATE = 0.1
HEAD_DROP_RATE = 0.2


class ScoredTask(VisionTask):
    """A task that is evaluated by its logits. A subclass calls ``keep_scores`` once it knows its tasks.

    Attributes:
        tasks: class names of each task.
        task_weights: weight of each task's loss in the sum.
    """

    def keep_scores(self, tasks: dict[str, list[str]], task_weights: Mapping[str, float] | None = None) -> None:
        """Make the metrics of all splits; a task without a weight has weight 1."""
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
        # The values are the same on all processes already; without sync_dist Lightning would warn.
        self.log_dict(values, sync_dist=True)

    def epoch_values(self, split: LoggedSplit) -> dict[str, Any]:
        """Averages and scores of the epoch; resets the metrics."""
        metrics = self._metrics_of(split)
        values = dict(metrics.compute())
        metrics.reset()
        return values

    def plain_losses(
        self, logits: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
    ) -> dict[str, MeanLoss]:
        """Cross-entropy of each task, by which all runs are compared in evaluation."""
        return {task: masked_cross_entropy(logits[task], targets[task]) for task in self.tasks}

    def count(
        self,
        split: LoggedSplit,
        means: Mapping[str, MeanLoss],
        logits: Mapping[str, torch.Tensor],
        targets: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Update the split's metrics with the loss of each task and, in evaluation, its scores.

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
    """A task with an image encoder and one head a task.

    A subclass calls this constructor, then ``save_hyperparameters()``, then adds its heads outside the encoder. The
    arguments are those of ``MultiTaskClassifier``.
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
        optim_options: OptimOptions,
    ) -> None:
        super().__init__(lr=lr, weight_decay=weight_decay, schedule=schedule, optim_options=optim_options)
        for task, names in tasks.items():
            if len(names or ()) < 2:
                raise UserError(
                    f"tasks: {task!r} has fewer than two classes; leave it out, or fix the data's class names"
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
        """Logits of each task, float ``(B, C)``, from the encoder's features, float ``(B, D)``."""

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of each task.

        Args:
            image: uint8 ``(B, 3, H, W)``, RGB.

        Returns:
            For each task float ``(B, C)``.
        """
        return self.classify(self.encoder(image))

    def _shared_step(self, batch: Batch, split: LoggedSplit) -> tuple[torch.Tensor, Outputs]:
        """Loss and outputs for callbacks.

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

    def predict_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs of a batch, whose targets may be unknown."""
        features = self._features(batch)
        outputs = real_outputs(batch, self._logits(features), known_targets(batch, self.tasks))
        return with_embedding(outputs, batch, features)

    def _features(self, batch: Batch) -> torch.Tensor:
        features: torch.Tensor = batch["features"]["image"] if "features" in batch else self.encoder(batch["image"])
        return features

    def _logits(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """float32 also where the network computes in half precision."""
        return {task: logits.float() for task, logits in self.classify(features).items()}

    @property
    def backbone(self) -> nn.Module:
        """The encoder's network."""
        return self.encoder.backbone

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """See ``VisionTask``."""
        return cast("torch.Tensor", self.encoder(image))

    @property
    def embedding_dim(self) -> int:
        """Length of ``image_embedding`` in the outputs."""
        return self.encoder.num_features

    def fetch_weights(self) -> None:
        """See ``VisionTask``."""
        self.encoder.load_pretrained()

    def loaded_origins(self) -> list[WeightsOrigin]:
        """See ``VisionTask``."""
        return [self.encoder.origin] if self.encoder.origin else []

    @property
    def pretrained_inputs(self) -> InputOptions | None:
        """See ``VisionTask``."""
        return self.encoder.own_inputs

    @property
    def weights_name(self) -> str:
        """See ``VisionTask``."""
        return self.encoder.name


class ImageClassifier(ClassificationTask):
    """Classifies images by the main label of the data.

    Args:
        backbone: name in timm.
        class_names: linked from the data.
        class_counts: training samples of each class, linked from the data; read only where classes are weighted.
        image_size: height and width in pixels, linked from the data.
        pretrained: true for the weights on the hub, false for random ones, or the path of a weights file.
        drop_rate: dropout in front of the head.
        label_smoothing: share of the target that is spread over all classes in training.
        class_weighting: how rare classes count more in training.
        lr: highest learning rate; ``optim_options.backbone_lr`` sets another one for the backbone.
        weight_decay: AdamW's; not applied to biases and norms.
        schedule: course of the learning rate.
        optim_options: rarer settings of the optimizer.

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
        drop_rate: Rate = 0.0,
        label_smoothing: Rate = 0.0,
        class_weighting: ClassWeighting = "none",
        lr: NonNegative = 1e-3,
        weight_decay: NonNegative = 0.05,
        schedule: ScheduleName = "cosine",
        optim_options: OptimOptions = OptimOptions(),
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
        """See ``ClassificationTask``."""
        return {LABEL_TASK: self.head(self.drop(features))}


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
        task_weights: the tasks that are trained, with the weight of their losses; all with weight 1 if not given.
        label_smoothing: share of the target that is spread over all classes in training.
        class_weighting: how rare classes count more in training.
        lr: highest learning rate; ``optim_options.backbone_lr`` sets another one for the backbone.
        weight_decay: AdamW's; not applied to biases and norms.
        schedule: course of the learning rate.
        optim_options: rarer settings of the optimizer.

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
        label_smoothing: Rate = 0.0,
        class_weighting: ClassWeighting = "none",
        lr: NonNegative = 1e-3,
        weight_decay: NonNegative = 0.05,
        schedule: ScheduleName = "cosine",
        optim_options: OptimOptions = OptimOptions(),
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
        """See ``ClassificationTask``."""
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
        raise UserError(f"task_weights: must be above 0; got {task_weights}; a task that is not named is not trained")
    return task_weights


class TaskLoss(KeepsFloat32):
    """The training loss of one task, ``masked_cross_entropy``; its class weights move with the model and are not saved.

    Args:
        class_weights: float32 ``(C,)`` or nothing.
        label_smoothing: in [0, 1).
    """

    class_weights: torch.Tensor | None

    def __init__(self, class_weights: torch.Tensor | None, label_smoothing: float) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing: must be in [0, 1); got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor, mix: Mix | None) -> MeanLoss:
        """See ``masked_cross_entropy``."""
        return masked_cross_entropy(
            logits, target, class_weights=self.class_weights, label_smoothing=self.label_smoothing, mix=mix
        )


def masked_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    mix: Mix | None = None,
) -> MeanLoss:
    """Cross-entropy averaged over the samples whose target is known.

    As in torch, a mean with class weights divides by the sum of the targets' weights. In a mixed batch each
    image counts as ``lam`` of its own target and ``1 - lam`` of its partner's; a side that is unknown is left
    out, and the other keeps its share.

    Args:
        logits: float ``(B, C)``.
        target: int64 ``(B,)``, ``UNKNOWN`` where not known.
        class_weights: float ``(C,)``.
        label_smoothing: share of the target that is spread over all classes, in [0, 1).
        mix: how the batch was mixed, if it was.
    """
    if class_weights is not None:
        class_weights = class_weights.to(logits.dtype)
    if mix is None:
        total, weight = _sums(logits, target, torch.ones_like(logits[:, 0]), class_weights, label_smoothing)
    else:
        own, partner = mix["lam"].to(logits.dtype), target[mix["partner"]]
        total, weight = _sums(logits, target, own, class_weights, label_smoothing)
        other_total, other_weight = _sums(logits, partner, 1 - own, class_weights, label_smoothing)
        total, weight = total + other_total, weight + other_weight
    # Where nothing is known the sum is 0 with a gradient; dividing by 1 keeps both.
    return MeanLoss(total / torch.where(weight > 0, weight, torch.ones_like(weight)), weight.detach())


def _sums(
    logits: torch.Tensor,
    target: torch.Tensor,
    share: torch.Tensor,
    class_weights: torch.Tensor | None,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses and sum of the weights over the known targets, each sample by its share."""
    losses = F.cross_entropy(
        logits, target, class_weights, ignore_index=UNKNOWN, reduction="none", label_smoothing=label_smoothing
    )
    weights = (target != UNKNOWN).to(logits.dtype)
    if class_weights is not None:
        weights = weights * class_weights[target.clamp(min=0)]
    return (losses * share).sum(), (weights * share).sum()


def class_weights_from_counts(
    task: str, num_classes: int, class_counts: Mapping[str, Sequence[int]] | None, scheme: ClassWeighting
) -> torch.Tensor | None:
    """Weights that make rare classes count more.

    ``inverse`` is n / (classes · count), scikit-learn's "balanced"; ``sqrt_inverse`` its square root, milder;
    ``effective_number`` is (1 - β) / (1 - β^count) with β = 0.999 (Cui et al., Class-Balanced Loss, CVPR 2019).

    Returns:
        float32 ``(num_classes,)`` with a mean of 1 over the training samples, 1 also for classes without any;
        None for ``none``.
    """
    if scheme not in get_args(ClassWeighting):
        raise UserError(f"class_weighting: must be one of {', '.join(get_args(ClassWeighting))}; got {scheme!r}")
    if scheme == "none":
        return None
    if class_counts is None or len(class_counts.get(task, ())) != num_classes:
        found = "missing" if class_counts is None or task not in class_counts else f"for {len(class_counts[task])}"
        raise UserError(
            f"class_weighting: {scheme!r} needs the training counts of the {num_classes} classes of {task!r}, they are "
            f"{found}; use a DataModule that has class_counts, or class_weighting: none"
        )
    counts = torch.tensor(class_counts[task], dtype=torch.float64)
    present = counts > 0
    weights = torch.ones_like(counts)
    if scheme == "effective_number":
        weights[present] = (1 - EFFECTIVE_NUMBER_BETA) / (1 - EFFECTIVE_NUMBER_BETA ** counts[present])
    else:
        weights[present] = counts[present] ** (-1.0 if scheme == "inverse" else -0.5)
    if present.any():
        weights[present] *= counts.sum() / (weights * counts).sum()
    return weights.float()
