"""One label per picture: a timm backbone with a linear head."""

from __future__ import annotations

import torch
from torch import nn

from lightning_modules.classification import ClassificationTask
from lightning_modules.encoders import ImageEncoder
from lightning_modules.losses import ClassWeighting
from lightning_modules.optim import OptimOptions
from lightning_modules.precision import Float32Linear
from lightning_modules.schedules import ScheduleName
from vitrail.types import LABEL_TASK


class ImageClassifier(ClassificationTask):
    """Classifies pictures by the main label of the data.

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
