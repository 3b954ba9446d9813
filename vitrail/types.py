"""Types shared by data, models, callbacks and files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:
    # Commands that need no torch start quickly.
    import numpy as np
    import pyarrow as pa
    import torch
    from numpy.typing import NDArray

DEFAULT_SEED = 42
"""Default seed of every command, DataModule and run, so that all of them have the same splits."""

DATA_ARGUMENTS = ("--data.", "--seed_everything")
"""Prefixes of command-line arguments that describe the data."""

LOSS_OF_STEP = "train/loss_step"
"""Name of a training step's loss in logs."""

UNKNOWN = -1
"""Unknown target, left out of losses and metrics."""

LABEL_TASK = "class"
"""Name of the main task; its target is ``Batch["label"]``, every other task's is in ``Batch["attributes"]``."""

Split = Literal["train", "val", "test", "predict"]

TaskKind = Literal["single_label", "multi_label", "ordinal", "regression"]
"""What a task's target is: one of its classes, any of its labels, a class of an ordered scale, or a number.

``tasks`` maps each task to its class names (none for regression), ``task_kinds`` maps tasks to their kinds,
and a task that it does not name is single-label.
"""

CLASS_KINDS: tuple[TaskKind, ...] = ("single_label", "ordinal")
"""Kinds whose target is one class and whose logits have a softmax: what predicts one of them predicts the other."""


def kind_of(kinds: Mapping[str, TaskKind] | None, task: str) -> TaskKind:
    """Return the kind of a task, single-label where it is not named."""
    return (kinds or {}).get(task, "single_label")


@dataclass(frozen=True)
class TaskFacts:
    """What a model needs to know of its tasks' targets; a DataModule's ``task_facts``, linked by the command line.

    Attributes:
        task_kinds: kinds of the tasks that are not single-label.
        class_counts: training samples of each class; read only if a loss needs them.
        target_stats: mean and standard deviation of each regression task's training targets.
    """

    task_kinds: dict[str, TaskKind] = field(default_factory=dict)
    class_counts: dict[str, list[int]] = field(default_factory=dict)
    target_stats: dict[str, list[float]] = field(default_factory=dict)


Interpolation = Literal["bilinear", "bicubic"]
Resize = Literal["crop", "squash", "pad"]
CropRounding = Literal["even", "down"]
Resampler = Literal["torch", "pillow"]

MODEL_IMAGE_DEFAULTS: dict[str, Any] = {
    "resize": "crop",
    "crop_fraction": 1.0,
    "interpolation": "bicubic",
    "crop_rounding": "even",
    "resampler": "torch",
}
"""Default preprocessing; see ``datamodules.options.ImageOptions``."""


class InputOptions(TypedDict):
    """Preprocessing of images, as saved in checkpoints and galleries; see ``MODEL_IMAGE_DEFAULTS``.

    Attributes:
        size: height and width in pixels.
        resize: whether to keep the aspect ratio by cropping or padding.
        crop_fraction: fraction of the resized image that the center crop keeps, in (0, 1].
        interpolation: of the resizing.
        crop_rounding: rounding of half an odd margin.
        resampler: library that resizes; their results differ by one level of 255 in a few pixels.
        value_range: black and white of images with more than 8 bits per channel, by default auto.
    """

    size: int
    resize: NotRequired[Resize]
    crop_fraction: NotRequired[float]
    interpolation: NotRequired[Interpolation]
    crop_rounding: NotRequired[CropRounding]
    resampler: NotRequired[Resampler]
    value_range: NotRequired[Literal["dtype", "auto"] | list[float]]


def with_image_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Preprocessing with the defaults of options that files of older versions lack."""
    return {**MODEL_IMAGE_DEFAULTS, **options}


class Mix(TypedDict):
    """A mixed batch (mixup or CutMix): row ``i`` is ``lam[i]`` of itself and the rest of ``partner[i]``.

    Attributes:
        partner: int64 ``(B,)``, row index of the other image.
        lam: float32 ``(B,)`` in [0, 1], share of the row's own image.
        pending: int16 ``(5,)`` where the images are yet to be mixed on the model's device: 128 times the share of the
            own image inside a box, and its top, bottom, left and right.
    """

    partner: torch.Tensor
    lam: torch.Tensor
    pending: NotRequired[torch.Tensor]


class Batch(TypedDict, total=False):
    """A batch of every DataModule.

    Attributes:
        image: uint8 ``(B, 3, H, W)``, RGB, 0 to 255. Scaling and normalisation are the model's.
        label: target of the main task by its kind: single-label and ordinal int64 ``(B,)``, index into
            ``tasks["class"]``, ``UNKNOWN`` where not known; multi-label int8 ``(B, C)``, 1 where a label applies, 0
            where not, ``UNKNOWN`` for single entries or whole rows that are not known; regression float32 ``(B,)``,
            NaN where not known.
        attributes: for each further task its target, likewise.
        caption: B strings, empty without a caption; sampled in training, the first one in evaluation.
        captions: all captions of each image, one or more; only in evaluation and if the data set has its own captions.
        positive_id: int64 ``(B,)``; rows that share one are positives of each other.
        sample_id: int64 ``(B,)``, row of the sample in its data set, the same in every split and run.
        group_id: int64 ``(B,)``, the physical object or product in the image.
        is_padding: bool ``(B,)``, rows that only fill up a rank's share in evaluation on several processes.
        mix: only if mixup or CutMix was applied to a training batch.
        features: cached output of a frozen backbone instead of ``image``, float ``(B, D)`` by modality (``image``).
    """

    image: torch.Tensor
    label: torch.Tensor
    attributes: dict[str, torch.Tensor]
    caption: list[str]
    captions: list[list[str]]
    positive_id: torch.Tensor
    sample_id: torch.Tensor
    group_id: torch.Tensor
    is_padding: torch.Tensor
    mix: Mix
    features: dict[str, torch.Tensor]


FeatureLookup = Callable[[Any, Any], Any]
"""From sample ids and views (numbers of augmentations), int64 ``(B,)`` each, to cached features, float ``(B, D)``."""


class TextReading(NamedTuple):
    """What a tokenizer reads of a text.

    Attributes:
        known: number of tokens that it has, without special ones.
        unknown: parts of the text that it has no token for, in order.
        unread: the end of the text that is cut off, empty where all is read.
    """

    known: int
    unknown: list[str]
    unread: str


class Outputs(TypedDict):
    """Outputs of evaluation and prediction steps, without padding.

    Attributes:
        sample_id: int64 ``(N,)``.
        logits: by task float32: single-label ``(N, C)``; multi-label ``(N, C)``, one independent logit for each label;
            ordinal ``(N, C)``, log-probabilities of the classes; regression ``(N, 1)``, the value in its own units, or
            ``(N, 2)``, with the logarithm of its variance.
        targets: by task, as in ``Batch``.
        image_embedding: float32 ``(N, D)``, of unit length; only of tasks with embeddings.
        text_embedding: float32 ``(M, D)``, of unit length, of all captions; only if the data set has captions.
        text_image: int64 ``(M,)``, ``sample_id`` of each caption's image, in the order of the rows.
    """

    sample_id: torch.Tensor
    logits: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]
    image_embedding: NotRequired[torch.Tensor]
    text_embedding: NotRequired[torch.Tensor]
    text_image: NotRequired[torch.Tensor]


@runtime_checkable
class DescribesImages(Protocol):
    """A DataModule whose images can be added to a gallery."""

    @property
    def image_files(self) -> bool:
        """Whether each image is a file of its own."""

    @property
    def own_captions(self) -> bool:
        """Whether the data set has its own captions."""

    def image_facts(self, sample_ids: NDArray[np.int64]) -> pa.Table:
        """Describe n images by their ids, int64 ``(n,)``.

        Returns:
            n rows of strings: ``id`` (stable name), ``path`` (absolute, empty if the image is no file), ``content``
            (hash of the pixels, or of their place in a shard; empty if unknown), ``caption`` (the first, or empty),
            ``group``, ``split``, for each task ``label_<task>`` (null if unknown; of multi-label tasks a list of
            strings, of regression float32), and the list ``captions``.
        """


def batch_targets(batch: Batch) -> dict[str, torch.Tensor]:
    """Targets of a batch by task, the main task first."""
    targets = {LABEL_TASK: batch["label"]} if "label" in batch else {}
    return {**targets, **batch.get("attributes", {})}
