"""Knowledge distillation: a classifier learns from the outputs of a frozen teacher, on the same augmented images.

The teacher is any run or any pretrained network of timm. It is neither part of the student nor of its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from lightning_modules.base import VisionTask, real_rows
from lightning_modules.checkpoint import load_task
from lightning_modules.encoders.image import ImageEncoder
from lightning_modules.encoders.weights import (
    WeightsOrigin,
    hub_file,
    known_architecture,
    read_weights,
    report_origin,
    weights_origin,
)
from lightning_modules.metrics import MeanLoss, joined_losses
from lightning_modules.options import DistillOptions
from vitrail.errors import UserError, first_line
from vitrail.runs import Run
from vitrail.types import LABEL_TASK, Batch, TaskKind, kind_of

PART = "distill.teacher"


class Teacher:
    """A frozen network in evaluation mode; not a module, so that nothing saves, trains or copies it.

    Attributes:
        tasks: class names of each task that it predicts.
        kinds: kinds of the tasks that are not single-label.
        size: height and width of its images in pixels; others are resized.
        origin: origin of its weights.
    """

    def __init__(
        self, network: nn.Module, tasks: Mapping[str, Sequence[str]], size: int, origin: WeightsOrigin
    ) -> None:
        self._network = network.requires_grad_(False).eval()
        self.tasks, self.size, self.origin = tasks, size, origin
        self.kinds: Mapping[str, TaskKind] = getattr(network, "task_kinds", {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @torch.no_grad()
    def logits(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of each task, float32 ``(B, C)``, for uint8 RGB images ``(B, 3, H, W)``."""
        network, image = self._ready(image)
        if isinstance(network, VisionTask):
            batch: Any = {"image": image, "sample_id": torch.arange(len(image), device=image.device)}
            found: dict[str, torch.Tensor] = network.predict_step(batch, 0)["logits"]
        else:
            found = {LABEL_TASK: network(image)}
        return {task: values.float() for task, values in found.items()}

    @torch.no_grad()
    def features(self, image: torch.Tensor) -> torch.Tensor:
        """Features, float32 ``(B, D)``, of uint8 RGB images ``(B, 3, H, W)``."""
        network, image = self._ready(image)
        found: torch.Tensor = network.image_features(image) if isinstance(network, VisionTask) else network(image)
        return found.float()

    def _ready(self, image: torch.Tensor) -> tuple[Any, torch.Tensor]:
        from torchvision.transforms.v2.functional import resize

        if next(self._network.parameters()).device != image.device:
            self._network.to(image.device)
        if image.shape[-1] != self.size:
            image = resize(image, [self.size, self.size], antialias=True)
        return self._network, image


class _WholeNetwork(nn.Module):
    """A timm network with its classifier, behind the normalisation of its weights."""

    def __init__(self, encoder: ImageEncoder, network: nn.Module) -> None:
        super().__init__()
        self.normalize, self.network = encoder.normalize, network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, C)`` of uint8 images ``(B, 3, H, W)``."""
        logits: torch.Tensor = self.network(self.normalize(image))
        return logits


def load_teacher(options: DistillOptions) -> Teacher:
    """Load the teacher.

    Raises:
        UserError: there is no such run or network, or its weights cannot be had.
    """
    path = Path(options.teacher)
    if path.exists() or len(path.parts) > 1:
        if not path.exists():
            raise UserError(f"{PART}: there is no run {path}; give a run directory, a checkpoint, or a name in timm")
        file = Run(path).checkpoint("best") if path.is_dir() else path
        task = load_task(file)
        origin = weights_origin(PART, type(task).__name__, file, {})
        return Teacher(task, getattr(task, "tasks", {}), int(task.input_options["size"]), origin)
    if options.pretrained is False:
        raise UserError(
            "loss_options.distill.pretrained: a teacher with random weights teaches nothing; give true or a weights "
            "file"
        )
    source = known_architecture(options.teacher)
    size = int(source.input_size[-1])
    encoder = ImageEncoder(options.teacher, size, options.pretrained, part=PART)
    if options.kind == "features":
        encoder.load_pretrained()
        assert encoder.origin is not None
        return Teacher(encoder, {}, size, encoder.origin)
    file = Path(options.pretrained if isinstance(options.pretrained, str) else hub_file(source))
    network = _WholeNetwork(encoder, _with_classifier(options.teacher, file))
    return Teacher(
        network, {LABEL_TASK: _imagenet_names(source)}, size, weights_origin(PART, options.teacher, file, {})
    )


def _with_classifier(name: str, file: Path) -> nn.Module:
    import timm

    try:
        network: nn.Module = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"state_dict": read_weights(str(file))}
        )
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"loss_options.distill.pretrained: {file} does not fit {name} with its classifier: {first_line(error)}"
        ) from error
    return network


def _imagenet_names(source: Any) -> list[str]:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(source.to_dict())
    return [] if subset is None else list(ImageNetInfo(subset).label_names())


class Distillation(nn.Module):
    """The loss of a student with respect to its teacher.

    - ``logits``: Kullback-Leibler divergence of the probabilities at a temperature T, times T² (Hinton et al., 2015).
    - ``hard``: cross-entropy with the classes that the teacher predicts (Touvron et al., ICML 2021).
    - ``features``: distance of the teacher's features from a linear projection of the student's (Romero et al., ICLR
      2015): their mean squared error, or 1 - cosine.

    Args:
        teacher: the teacher.
        options: kind of loss and its settings.
        tasks: class names of each task of the student.
        kinds: kinds of the tasks that are not single-label. Each label of a multi-label task is a class or not; the
            outputs of regression cannot be learned from, only features.
        num_features: length of the student's features.

    Raises:
        UserError: the teacher does not predict the classes of a task.
    """

    def __init__(
        self,
        teacher: Teacher,
        options: DistillOptions,
        tasks: Mapping[str, Sequence[str]],
        kinds: Mapping[str, TaskKind],
        num_features: int,
    ) -> None:
        super().__init__()
        self.teacher, self.options = teacher, options
        self.projection: nn.Linear | None = None
        self._kinds = kinds
        self._columns: dict[str, torch.Tensor] = {}
        if options.kind == "features":
            image = torch.zeros(1, 3, teacher.size, teacher.size, dtype=torch.uint8)
            # With a generator of its own, so that the student's dropout and heads are those without a teacher.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.projection = nn.Linear(num_features, teacher.features(image).shape[1])
        else:
            for task, names in tasks.items():
                columns = torch.tensor(_columns(task, names, kind_of(kinds, task), teacher), dtype=torch.int64)
                self.register_buffer(f"columns_{len(self._columns)}", columns, persistent=False)
                self._columns[task] = columns

    def forward(
        self,
        batch: Batch,
        features: torch.Tensor,
        logits: Mapping[str, torch.Tensor],
        task_weights: Mapping[str, float],
    ) -> torch.Tensor:
        """Loss of a batch, a float32 scalar, 0 without real rows.

        Args:
            batch: with the images, ``mix`` applied to them already.
            features: the student's, float ``(B, D)``.
            logits: the student's of each task, float ``(B, C)``.
            task_weights: weight of each task.
        """
        if self.projection is not None:
            losses = self._feature_losses(self.projection(features).float(), self.teacher.features(batch["image"]))
        else:
            taught = self.teacher.logits(batch["image"])
            columns = {task: getattr(self, f"columns_{number}") for number, task in enumerate(self._columns)}
            by_task = [
                task_weights[task] * self._logit_losses(task, logits[task], taught[task][:, columns[task]])
                for task in columns
            ]
            losses = torch.stack(by_task).sum(dim=0)
        real = real_rows(batch).to(losses.dtype)
        mean = MeanLoss((losses * real).sum() / real.sum().clamp(min=1), real.sum())
        return joined_losses({PART: mean})[PART].value

    def _feature_losses(self, own: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        if self.options.distance == "cosine":
            return 1 - F.cosine_similarity(own, taught, dim=-1)
        return F.mse_loss(own, taught, reduction="none").mean(dim=-1)

    def _logit_losses(self, task: str, own: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        multi_label, temperature = kind_of(self._kinds, task) == "multi_label", self.options.temperature
        if self.options.kind == "hard":
            if multi_label:
                return F.binary_cross_entropy_with_logits(own, (taught > 0).to(own.dtype), reduction="none").mean(dim=1)
            return F.cross_entropy(own, taught.argmax(dim=1), reduction="none")
        own, taught = own / temperature, taught / temperature
        if multi_label:
            # Each label is a choice between its logit and 0.
            own, taught = (torch.stack([values, torch.zeros_like(values)], dim=-1) for values in (own, taught))
        own, taught = own.log_softmax(dim=-1), taught.log_softmax(dim=-1)
        divergence = F.kl_div(own, taught, reduction="none", log_target=True).sum(dim=-1)
        return temperature**2 * (divergence.mean(dim=1) if multi_label else divergence)

    def recorded(self, origins: Sequence[WeightsOrigin]) -> list[WeightsOrigin]:
        """The origins with the teacher's.

        Raises:
            UserError: a training that is resumed had another teacher.
        """
        own = self.teacher.origin
        before = [origin for origin in origins if origin["part"] == PART]
        if before and before[0]["sha256"] != own["sha256"]:
            raise UserError(
                f"{PART}: {own['source']} has other weights than the teacher that training began with "
                f"({before[0]['source']}); restore it, or start again without --ckpt_path"
            )
        if before:
            return list(origins)
        report_origin(own)
        return [*origins, own]


def _columns(task: str, names: Sequence[str], kind: TaskKind, teacher: Teacher) -> list[int]:
    """Index of each of the student's classes among the teacher's."""
    if kind == "regression":
        raise UserError(
            f"loss_options.distill.kind: task {task!r} is regression, which has no classes; choose features"
        )
    if task not in teacher.tasks:
        raise UserError(
            f"{PART}: {teacher.origin['name']} has no task {task!r}, it has {', '.join(teacher.tasks) or 'none'}; "
            "choose another teacher, or loss_options.distill.kind: features"
        )
    if (other_kind := kind_of(teacher.kinds, task)) != kind:
        raise UserError(
            f"{PART}: {teacher.origin['name']} takes {task!r} as {other_kind}, the data have it as {kind}; choose "
            "another teacher, or loss_options.distill.kind: features"
        )
    theirs = list(teacher.tasks[task])
    if sorted(theirs) != sorted(names):
        other = sorted(set(theirs) ^ set(names))
        raise UserError(
            f"{PART}: {teacher.origin['name']} predicts {len(theirs)} classes of {task!r}, the data have {len(names)}, "
            f"and they differ in {', '.join(other[:3])}{', …' if len(other) > 3 else ''}; choose another teacher, or "
            "loss_options.distill.kind: features"
        )
    return [theirs.index(name) for name in names]
