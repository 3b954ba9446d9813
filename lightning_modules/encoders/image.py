"""Image encoders: from uint8 images to features.

Scaling and normalisation are the first operation inside the network, with the statistics that the weights were
trained with, so training, application and exported graph cannot disagree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_modules.encoders.weights import (
    WeightsOrigin,
    create_backbone,
    hub_file,
    known_architecture,
    load_backbone,
    weights_origin,
)
from lightning_modules.precision import Conversion, KeepsFloat32
from vitrail.errors import UserError
from vitrail.types import InputOptions, Resize, with_image_defaults

_RESIZES: dict[str, Resize] = {"center": "crop", "squash": "squash", "border": "pad"}
"""By timm's names."""


class Normalize(KeepsFloat32):
    """uint8 images to floats with zero mean and unit variance over the data that the weights were trained on."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.output_dtype = torch.get_default_dtype()

    def _apply(self, fn: Conversion, recurse: bool = True) -> Self:
        """Stay float32, and note what the network behind it has become."""
        self.output_dtype = fn(self.mean.new_empty(0, dtype=self.output_dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Normalised images.

        Args:
            image: uint8 ``(B, 3, H, W)``.

        Returns:
            ``(B, 3, H, W)``, computed in float32 and given in the floating type of the network, laid out as
            ``torch.channels_last``, in which most convolutional networks are faster by a tenth to a third
            (``python -m benchmarks training.layout``).
        """
        if image.dtype != torch.uint8:
            raise TypeError(f"expected uint8 images (0 to 255); got {image.dtype}; the model scales them")
        pixels = image.to(self.mean.dtype, memory_format=torch.channels_last)
        return pixels.div_(255).sub_(self.mean).div_(self.std).to(self.output_dtype)


class ImageEncoder(nn.Module):
    """A timm network without its classifier, behind ``Normalize``.

    The constructor touches neither the network nor a weights file: weights begin random, and ``load_pretrained``
    fetches them when it is known that no checkpoint will replace them.

    Args:
        backbone: name in timm, with or without the tag of its weights, such as ``resnet18`` or
            ``vit_base_patch16_224.augreg_in21k``.
        image_size: height and width in pixels of the images, for architectures that are built for one size.
        pretrained: true for the weights on the hub, or the path of a ``.safetensors``, ``.pth`` or ``.ckpt`` file.

    Attributes:
        num_features: length of a feature vector.
        input_options: how the images were made that the architecture's weights were trained on.
        part: of the model that it is, as the option that names it is called.
        origin: of the pretrained weights, once they are loaded.
    """

    def __init__(self, backbone: str, image_size: int = 224, pretrained: bool | str = True) -> None:
        super().__init__()
        from timm.data import resolve_data_config

        source = known_architecture(backbone)
        if pretrained is True and not source.has_weights:
            raise UserError(f"pretrained: true, but timm has no weights for {backbone!r}; use false or a file's path")
        self.name = backbone
        self.part = "backbone"
        self.image_size = image_size
        self.pretrained = pretrained
        self._loaded = pretrained is False
        self.origin: WeightsOrigin | None = None
        self.backbone = create_backbone(backbone, image_size)
        # Some networks widen their features once more in front of the classifier; that is the size of their output.
        sizes = cast("Any", self.backbone)
        self.num_features = int(getattr(sizes, "head_hidden_size", sizes.num_features))
        config = resolve_data_config(pretrained_cfg=source.to_dict())
        self.input_options: InputOptions = {
            "size": config["input_size"][-1],
            "resize": _RESIZES[config["crop_mode"]],
            "crop_fraction": config["crop_pct"],
            "interpolation": config["interpolation"],
            "crop_rounding": "even",
        }
        self.normalize = Normalize(config["mean"], config["std"])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Features of images.

        Args:
            image: uint8 ``(B, 3, H, W)``, RGB.

        Returns:
            float ``(B, num_features)``.
        """
        return cast("torch.Tensor", self.backbone(self.normalize(image)))

    def load_pretrained(self) -> None:
        """Replace the random weights by the pretrained ones, once; without ``pretrained`` nothing happens.

        Raises:
            UserError: if they cannot be had or do not fit.
        """
        if self._loaded:
            return

        path = self.pretrained if isinstance(self.pretrained, str) else hub_file(known_architecture(self.name))
        left_out = load_backbone(self.backbone, path, self.name, self.image_size)
        self.origin = weights_origin(self.part, self.name, Path(path), left_out)
        self._loaded = True

    @property
    def own_inputs(self) -> InputOptions | None:
        """How images must be made for the pretrained weights; None where there are none."""
        return None if self.pretrained is False else self.input_options


def warn_of_other_inputs(name: str, options: InputOptions, expected: InputOptions) -> None:
    """Warn in one line where images are made otherwise than those that weights were trained on."""
    given = with_image_defaults(options)
    if others := [
        f"{key} {given.get(key)} instead of {value}" for key, value in expected.items() if given.get(key) != value
    ]:
        rank_zero_warn(f"data.image differs from what the weights of {name} were trained with: {', '.join(others)}")
