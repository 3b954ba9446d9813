"""Base class of the outputs of all kinds of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torchmetrics import Metric

from lightning_modules.metrics import MeanLoss
from lightning_modules.precision import KeepsFloat32
from vitrail.types import Mix, TaskKind


class TaskOutput(KeepsFloat32, ABC):
    """From the numbers that a head computes to the outputs of its task, and to its losses and scores.

    Attributes:
        kind: of the task.
        width: numbers that the head must compute for an image.
    """

    kind: ClassVar[TaskKind]
    width: int

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """Outputs of the task (``vitrail.types.Outputs``), from the head's numbers, float ``(B, width)``."""
        return raw

    @abstractmethod
    def loss(self, logits: torch.Tensor, target: torch.Tensor, mix: Mix | None = None) -> MeanLoss:
        """Training loss over the known targets."""

    @abstractmethod
    def evaluation_loss(self, logits: torch.Tensor, target: torch.Tensor) -> MeanLoss:
        """Loss by which runs with other training losses compare, over the known targets."""

    @abstractmethod
    def scores(self) -> Metric:
        """Build the scores of one split."""
