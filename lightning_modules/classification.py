"""Image classifiers: one label per image (``ImageClassifier``) or several attributes (``MultiTaskClassifier``)."""

# No postponed annotations: jsonargparse would lose the ranges of the arguments.

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.base import LoggedSplit, VisionTask, known_targets, real_outputs
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
    """Base class of tasks whose outputs are logits over named classes. A subclass calls ``configure_metrics``.

    Attributes:
        tasks: class names of each task.
        task_weights: weight of each task's loss in the sum.
    """

    def configure_metrics(self, tasks: dict[str, list[str]], task_weights: Mapping[str, float] | None = None) -> None:
        """Build the metrics of all splits; a task without a weight has weight 1."""
        for task, names in tasks.items():
            if len(names or ()) < 2:
                raise UserError(
                    f"tasks: {task!r} has fewer than two classes; leave it out, or fix the data's class names"
                )
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
        """See ``VisionTask``."""
        values = {f"{split}/{name}": value for name, value in self.epoch_values(split).items()}
        # The values are the same on all processes already; without sync_dist Lightning would warn.
        self.log_dict(values, sync_dist=True)

    def epoch_values(self, split: LoggedSplit) -> dict[str, Any]:
        """Averages and scores of the epoch; resets the metrics."""
        metrics = self._metrics_of(split)
        values = dict(metrics.compute())
        metrics.reset()
        return values

    def evaluation_loss(
        self, split: LoggedSplit, logits: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Update the metrics; return plain cross-entropy, by which runs with other smoothing and weights compare."""
        self._metrics_of(split).update_scores(logits, targets)
        return self.sum_losses(split, {task: masked_cross_entropy(logits[task], targets[task]) for task in self.tasks})

    def sum_losses(self, split: LoggedSplit, losses: Mapping[str, MeanLoss]) -> torch.Tensor:
        """Update the metrics with the loss of each task; return the weighted sum."""
        self._metrics_of(split).update_losses(losses)
        return torch.stack([self.task_weights[task] * mean.value for task, mean in losses.items()]).sum()

    def _metrics_of(self, split: LoggedSplit) -> SplitMetrics:
        return {"train": self.train_metrics, "val": self.val_metrics, "test": self.test_metrics}[split]


class ClassificationTask(ScoredTask):
    """Base class of classifiers with an image encoder.

    A subclass calls ``configure_encoder``, ``configure_metrics`` and ``configure_losses``, then adds its heads.
    """

    def configure_encoder(self, backbone: str, image_size: int, pretrained: bool | str) -> None:
        """Build the image encoder."""
        self.encoder = ImageEncoder(backbone, image_size, pretrained)
        self.input_options: InputOptions = {**self.encoder.input_options}

    def configure_losses(
        self,
        class_counts: dict[str, list[int]] | None = None,
        weighting: ClassWeighting = "none",
        label_smoothing: float = 0.0,
    ) -> None:
        """Build the training loss of each task."""
        self.losses = nn.ModuleList(
            TaskLoss(class_weights_from_counts(task, len(names), class_counts, weighting), label_smoothing)
            for task, names in self.tasks.items()
        )

    @abstractmethod
    def classify(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of each task, float ``(B, C)``, from the encoder's features, float ``(B, D)``."""

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of each task, float ``(B, C)``, for uint8 RGB images ``(B, 3, H, W)``."""
        return self.classify(self.encoder(image))

    def _shared_step(self, batch: Batch, split: LoggedSplit) -> tuple[torch.Tensor, Outputs]:
        features, targets = self._features(batch), known_targets(batch, self.tasks)
        logits = self._logits(features)
        if split == "train":
            criteria = zip(self.tasks, self.losses, strict=True)
            losses = {task: loss(logits[task], targets[task], batch.get("mix")) for task, loss in criteria}
            loss = self.sum_losses(split, losses)
        else:
            loss = self.evaluation_loss(split, logits, targets)
        return loss, real_outputs(batch, logits, targets, features if split == "test" else None)

    def predict_step(self, batch: Batch, batch_idx: int) -> Outputs:
        """Outputs of a batch, whose targets may be unknown."""
        features = self._features(batch)
        return real_outputs(batch, self._logits(features), known_targets(batch, self.tasks), features)

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

    def fetch_weights(self) -> list[WeightsOrigin]:
        """See ``VisionTask``."""
        self.encoder.load_pretrained()
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
        class_counts: training samples of each class, linked from the data; read only if classes are weighted.
        image_size: height and width in pixels, linked from the data.
        pretrained: true for the weights on the hub, false for random ones, or the path of a weights file.
        drop_rate: dropout before the head.
        label_smoothing: share of the target that is spread over all classes in training.
        class_weighting: weighting of rare classes in training.
        lr: peak learning rate; ``optim_options.backbone_lr`` sets another one for the backbone.
        weight_decay: weight decay of AdamW; not applied to biases and norms.
        schedule: learning-rate schedule.
        optim_options: further settings of the optimizer.
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
        super().__init__(lr=lr, weight_decay=weight_decay, schedule=schedule, optim_options=optim_options)
        self.save_hyperparameters()
        self.configure_encoder(backbone, image_size, pretrained)
        self.configure_metrics({LABEL_TASK: class_names})
        self.configure_losses(class_counts, class_weighting, label_smoothing)
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
        class_counts: training samples of each class, linked from the data; read only if classes are weighted.
        image_size: height and width in pixels, linked from the data.
        pretrained: true for the weights on the hub, false for random ones, or the path of a weights file.
        task_weights: the tasks to train, with the weights of their losses; by default all with weight 1.
        label_smoothing: share of the target that is spread over all classes in training.
        class_weighting: weighting of rare classes in training.
        lr: peak learning rate; ``optim_options.backbone_lr`` sets another one for the backbone.
        weight_decay: weight decay of AdamW; not applied to biases and norms.
        schedule: learning-rate schedule.
        optim_options: further settings of the optimizer.
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
        super().__init__(lr=lr, weight_decay=weight_decay, schedule=schedule, optim_options=optim_options)
        self.save_hyperparameters()
        weights = _checked_weights(tasks, task_weights)
        self.configure_encoder(backbone, image_size, pretrained)
        self.configure_metrics({task: names for task, names in tasks.items() if task in weights}, weights)
        self.configure_losses(class_counts, class_weighting, label_smoothing)
        self.drop = nn.Dropout(FEATURE_DROP_RATE)
        # A list, because the name of a task need not be a legal name of a module.
        self.heads = nn.ModuleList(_head(self.encoder.num_features, len(names)) for names in self.tasks.values())

    def classify(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """See ``ClassificationTask``."""
        features = self.drop(features)
        return {task: head(features) for task, head in zip(self.tasks, self.heads, strict=True)}


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
    """``masked_cross_entropy`` as a module; its class weights, float32 ``(C,)``, are not saved."""

    class_weights: torch.Tensor | None

    def __init__(self, class_weights: torch.Tensor | None, label_smoothing: float) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing: must be in [0, 1); got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor, mix: Mix | None) -> MeanLoss:
        """See ``masked_cross_entropy``."""
        return masked_cross_entropy(logits, target, self.class_weights, self.label_smoothing, mix)


def masked_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    mix: Mix | None = None,
) -> MeanLoss:
    """Cross-entropy averaged over the samples whose target is known.

    As in torch, a mean with class weights divides by the sum of the targets' weights. In a mixed batch each image
    counts as ``lam`` of its own target and ``1 - lam`` of its partner's; an unknown target is left out.

    Args:
        logits: float ``(B, C)``.
        target: int64 ``(B,)``, ``UNKNOWN`` where not known.
        class_weights: float ``(C,)``.
        label_smoothing: share of the target that is spread over all classes, in [0, 1).
        mix: partners and shares of a mixed batch.
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
    # Without known targets the sum is 0 with a gradient; dividing by 1 keeps both.
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
    """Class weights for the loss.

    ``inverse`` is n / (classes · count), scikit-learn's "balanced"; ``sqrt_inverse`` its square root;
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
