"""The shapes of what travels between data, models, callbacks and files, and the error a user sees.

Every package may import this module; it imports none of ours. Nothing here computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:
    # Whoever only searches in a gallery need not wait for torch.
    import numpy as np
    import pyarrow as pa
    import torch
    from numpy.typing import NDArray

DEFAULT_SEED = 42
"""Seed of every command, DataModule and run that names no other, so that all of them see the same splits."""

DATA_ARGUMENTS = ("--data.", "--seed_everything")
"""How arguments begin that describe the data, in every command that takes such."""

UNKNOWN = -1
"""Target of a sample whose value is unknown: left out of loss and metric."""

LABEL_TASK = "class"
"""Name of the main task; its target is ``Batch["label"]``, every other task's is in ``Batch["attributes"]``."""

Split = Literal["train", "val", "test", "predict"]


Interpolation = Literal["bilinear", "bicubic"]
Resize = Literal["crop", "squash", "pad"]
CropRounding = Literal["even", "down"]

MODEL_IMAGE_DEFAULTS: dict[str, Any] = {
    "resize": "crop",
    "crop_fraction": 1.0,
    "interpolation": "bicubic",
    "crop_rounding": "even",
}
"""How images are made, as far as a model may have a say in it, where it has none; see ``options.ImageOptions``."""


class InputOptions(TypedDict):
    """How images are made before they reach the network, as checkpoints and galleries record it.

    Attributes:
        size: height and width in pixels.
        resize: whether the aspect ratio is kept, and then what is cropped or padded; see ``MODEL_IMAGE_DEFAULTS``
            for what holds where this and the three below are missing.
        crop_fraction: share of the scaled image that the center crop keeps, in (0, 1].
        interpolation: of the resizing.
        crop_rounding: how half of an odd margin is rounded.
        value_range: what is black and white in images with more than 8 bits a channel; auto where it is missing.
    """

    size: int
    resize: NotRequired[Resize]
    crop_fraction: NotRequired[float]
    interpolation: NotRequired[Interpolation]
    crop_rounding: NotRequired[CropRounding]
    value_range: NotRequired[Literal["dtype", "auto"] | list[float]]


def with_image_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """How images are made, with what a file of an older version does not say: all were made so then."""
    return {**MODEL_IMAGE_DEFAULTS, **options}


class Mix(TypedDict):
    """How a batch was mixed (mixup or CutMix): row ``i`` is ``lam[i]`` of itself and the rest of ``partner[i]``.

    Attributes:
        partner: int64 ``(B,)``, row index of the other image.
        lam: float32 ``(B,)`` in [0, 1], the share of the row's own image.
    """

    partner: torch.Tensor
    lam: torch.Tensor


class Batch(TypedDict, total=False):
    """What every DataModule delivers.

    Attributes:
        image: uint8 ``(B, 3, H, W)``, RGB, 0 to 255. Scaling and normalisation are the model's.
        label: int64 ``(B,)``, index into ``tasks["class"]``, ``UNKNOWN`` where not known.
        attributes: for each further task int64 ``(B,)``, ``UNKNOWN`` where not known.
        caption: B strings, empty where there is none; in training the one that was chosen, in evaluation the first.
        captions: every caption of each image, one or more; only in evaluation, and only where the data set has
            captions of its own.
        positive_id: int64 ``(B,)``; rows that share one are positives of each other.
        sample_id: int64 ``(B,)``, row of the sample in its data set, the same in every split and run.
        group_id: int64 ``(B,)``, the physical object or product that the image shows.
        is_padding: bool ``(B,)``; true where a row only fills up a rank's share when evaluating on several
            processes and must not be counted.
        mix: present only where mixup or CutMix was applied to a training batch.
        features: what the frozen backbones make of the row, ``(B, D)`` by side (``image``); where it is present there
            is no ``image``.
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


class FeatureLookup(Protocol):
    """Features of images that were computed before."""

    def __call__(self, sample_id: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
        """Features of some samples.

        Args:
            sample_id: int64 ``(B,)``.
            view: int64 ``(B,)``, not negative, which augmentation of the sample is asked for.

        Returns:
            float ``(B, D)``.
        """


class Outputs(TypedDict):
    """What the evaluation and prediction steps of every classifying task return; padding rows are gone.

    Attributes:
        sample_id: int64 ``(N,)``.
        logits: for each task float32 ``(N, C)``.
        targets: for each task int64 ``(N,)``, ``UNKNOWN`` where not known.
        image_embedding: float32 ``(N, D)``, of unit length; only of tasks that yield embeddings.
        text_embedding: float32 ``(M, D)``, of unit length, of every caption; only where the data set has some.
        text_image: int64 ``(M,)``, the ``sample_id`` of the image that each caption belongs to, in the rows' order.
    """

    sample_id: torch.Tensor
    logits: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]
    image_embedding: NotRequired[torch.Tensor]
    text_embedding: NotRequired[torch.Tensor]
    text_image: NotRequired[torch.Tensor]


class DescribesSamples(Protocol):
    """What callbacks may ask of a DataModule."""

    @property
    def tasks(self) -> dict[str, list[str]]:
        """Class names of each task, in the order of the indices; the main task first."""

    def sample_names(self) -> list[str]:
        """Stable names of all samples, indexed by ``sample_id``."""

    def group_names(self) -> list[str]:
        """Names of all samples' groups, indexed by ``sample_id``."""


@runtime_checkable
class DescribesImages(Protocol):
    """What a gallery may ask of a DataModule."""

    @property
    def image_files(self) -> bool:
        """Whether each image is a file of its own."""

    @property
    def own_captions(self) -> bool:
        """Whether batches bring captions of the data's own, so that they may be embedded."""

    def image_facts(self, sample_ids: NDArray[np.int64]) -> pa.Table:
        """What is known of some images.

        Args:
            sample_ids: int64 ``(n,)``.

        Returns:
            n rows of strings: ``id`` (the stable name), ``path`` (absolute, empty where the image is no file),
            ``content`` (hash of the decoded pixels, or of where they stand in their shard; empty where there is no way
            to know), ``caption`` (the first, empty where there is none), ``group``, ``split``, for each task
            ``label_<task>`` (null where unknown), and the list ``captions``, all of the data's own.
        """


def batch_targets(batch: Batch) -> dict[str, torch.Tensor]:
    """Targets of a batch by task name, the main task first.

    Returns:
        For each task that the batch knows int64 ``(B,)``.
    """
    targets = {LABEL_TASK: batch["label"]} if "label" in batch else {}
    return {**targets, **batch.get("attributes", {})}
