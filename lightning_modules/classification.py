"""What every task that sorts pictures shares: from logits to losses, scores and outputs.

A task says in ``classify`` how features become logits. Masked and weighted losses, averages per sample and metrics are
here.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import cast

import torch
from torch import nn

from lightning_modules.base import LoggedSplit
from lightning_modules.encoders import ImageEncoder, InputOptions
from lightning_modules.losses import ClassWeighting, TaskLoss, class_weights_from_counts
from lightning_modules.optim import OptimOptions
from lightning_modules.schedules import ScheduleName
from lightning_modules.scored import ScoredTask
from lightning_modules.step_outputs import known_targets, real_outputs, with_embedding
from lightning_modules.weights import WeightsOrigin
from vitrail.errors import UserError
from vitrail.types import Batch, Outputs


class ClassificationTask(ScoredTask):
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
        """One warning line where pictures are made otherwise than those that the pretrained weights learned from."""
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
