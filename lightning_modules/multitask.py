"""Several named attributes per picture: one backbone, one small head each."""

from __future__ import annotations

import torch
from torch import nn

from lightning_modules.classification import ClassificationTask
from lightning_modules.encoders import ImageEncoder
from lightning_modules.losses import ClassWeighting
from lightning_modules.optim import OptimOptions
from lightning_modules.precision import Float32Sequential
from lightning_modules.schedules import ScheduleName
from vitrail.errors import UserError

FEATURE_DROP_RATE = 0.1
HEAD_DROP_RATE = 0.2


class MultiTaskClassifier(ClassificationTask):
    """Classifies pictures by several attributes at once.

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
