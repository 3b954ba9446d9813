"""Encoders: from uint8 pictures to features, the scaling of pixels included.

Scaling and normalisation are the first operation inside the network, with the statistics that the weights were
trained with, so training, application and exported graph cannot disagree.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Protocol, Self, TypedDict, cast, runtime_checkable

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_modules.precision import Conversion, KeepsFloat32
from vitrail.errors import UserError
from vitrail.types import CropRounding, Interpolation, Resize, with_image_defaults

if TYPE_CHECKING:
    from lightning_modules.weights import WeightsOrigin

_RESIZES: dict[str, Resize] = {"center": "crop", "squash": "squash", "border": "pad"}
"""What timm calls them."""


class InputOptions(TypedDict):
    """How pictures are made before they reach the network; see ``datamodules.options.ImageOptions``.

    Attributes:
        size: height and width in pixels.
        resize: whether the aspect ratio is kept, and then what is cropped or padded; crop where it is not given.
        crop_fraction: share of the scaled image that the centre crop keeps, in (0, 1].
        interpolation: of the resizing.
        crop_rounding: how half of an odd margin is rounded; even where it is not given.
    """

    size: int
    resize: NotRequired[Resize]
    crop_fraction: float
    interpolation: Interpolation
    crop_rounding: NotRequired[CropRounding]


@runtime_checkable
class PreparesImages(Protocol):
    """A DataModule that says how it makes its pictures."""

    @property
    def image_options(self) -> InputOptions:
        """Size, interpolation and crop fraction."""


@runtime_checkable
class AdoptsRange(Protocol):
    """A DataModule that can read images with more than 8 bits a channel as a model takes them."""

    def adopt_range(self, recorded: Literal["dtype", "auto"] | Sequence[float]) -> None:
        """Take the value range that a checkpoint records."""


@runtime_checkable
class AdoptsImageOptions(Protocol):
    """A DataModule that makes its images as a model wants them, as far as nothing else was asked for."""

    def adopt_image_options(self, own: Mapping[str, Any]) -> None:
        """Take over what the options leave open."""


class Normalize(KeepsFloat32):
    """uint8 pictures to floats with zero mean and unit variance over the data that the weights were trained on.

    Args:
        mean: of each channel, for pixels in [0, 1].
        std: of each channel, for pixels in [0, 1].
    """

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
        """Normalised pictures.

        Args:
            image: uint8 ``(B, 3, H, W)``.

        Returns:
            ``(B, 3, H, W)``, computed in float32 and given in the floating type of the network, laid out as
            ``torch.channels_last``, in which most convolutional networks are faster by a tenth to a third
            (``python -m benchmarks layout``).

        Raises:
            TypeError: if the pictures are not uint8; that they are scaled twice would go unnoticed.
        """
        if image.dtype != torch.uint8:
            raise TypeError(f"expected uint8 pictures (0 to 255), got {image.dtype}; scaling them is the model's work")
        pixels = image.to(self.mean.dtype, memory_format=torch.channels_last)
        return pixels.div_(255).sub_(self.mean).div_(self.std).to(self.output_dtype)


class ImageEncoder(nn.Module):
    """A timm network without its classifier, behind ``Normalize``.

    The constructor touches neither the network nor a weights file: weights begin random, and ``load_pretrained``
    fetches them when it is known that no checkpoint will replace them.

    Args:
        backbone: name in timm, with or without the tag of its weights, such as ``resnet18`` or
            ``vit_base_patch16_224.augreg_in21k``.
        image_size: height and width in pixels of the pictures, for architectures that are built for one size.
        pretrained: true for the weights on the hub, or the path of a ``.safetensors``, ``.pth`` or ``.ckpt`` file.

    Attributes:
        num_features: length of a feature vector.
        input_options: how the pictures were made that the architecture's weights were trained on.
        part: of the model that it is, as the option that names it is called.
        origin: of the pretrained weights, once they are loaded.

    Raises:
        UserError: if timm does not know the name, the size does not fit, or ``pretrained`` is true and timm has no
            weights.
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
        # Some networks widen their features once more in front of the classifier; that is the size they put out.
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
        """Features of pictures.

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
        from lightning_modules.weights import hub_file, load_backbone, weights_origin

        path = self.pretrained if isinstance(self.pretrained, str) else hub_file(known_architecture(self.name))
        left_out = load_backbone(self.backbone, path, self.name, self.image_size)
        self.origin = weights_origin(self.part, self.name, Path(path), left_out)
        self._loaded = True

    @property
    def own_inputs(self) -> InputOptions | None:
        """How images must be made for the pretrained weights; None where there are none."""
        return None if self.pretrained is False else self.input_options

    def warn_of_other_inputs(self, options: InputOptions) -> None:
        """One warning line where pictures are made otherwise than those that the pretrained weights learned from."""
        if self.pretrained is not False:
            warn_of_other_inputs(self.name, options, self.input_options)


def known_architecture(name: str) -> Any:
    """Where the weights of an architecture are and what they were trained on, as timm's ``PretrainedCfg``.

    Raises:
        UserError: if timm does not know the name, or the tag behind its dot; it lists what is close.
    """
    import timm

    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        tagged = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        close = difflib.get_close_matches(name, tagged or timm.list_models(), n=5, cutoff=0.5) or tagged[:5]
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists what it knows"
        raise UserError(f"backbone: timm does not know {name!r}; {hint}") from None


def create_backbone(name: str, image_size: int, weights: dict[str, torch.Tensor] | None = None) -> nn.Module:
    """A timm network without classifier.

    Args:
        name: in timm, with or without the tag of its weights.
        image_size: height and width in pixels, for architectures that are built for one size.
        weights: in the format of any release that timm can convert, without those of the classifier; random if not
            given.

    Raises:
        UserError: if the size does not fit the architecture.
        RuntimeError: if the weights do not fit.
    """
    import timm

    source = known_architecture(name)
    fixed_size = {"img_size": image_size} if source.fixed_input_size else {}
    # timm is strict about weights only as long as it believes that they have as many classes as the network: none.
    overlay = None if weights is None else {"state_dict": weights, "num_classes": 0, "label_offset": 0}
    backbone: nn.Module = timm.create_model(
        name, pretrained=weights is not None, pretrained_cfg_overlay=overlay, num_classes=0, **fixed_size
    )
    patch_size = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    if fixed_size and patch_size is not None and image_size % patch_size[0] and image_size != source.input_size[-1]:
        raise UserError(
            f"image size: {name} cuts pictures into patches of {patch_size[0]} px, {image_size} px do not fit"
        )
    return backbone


def classifier_weights(name: str) -> set[str]:
    """Names of the weights that an architecture has with a classifier and not without."""
    import timm

    with torch.device("meta"):
        whole, backbone = (timm.create_model(name, pretrained=False, num_classes=classes) for classes in (2, 0))
    return set(whole.state_dict()) - set(backbone.state_dict())


def warn_of_other_inputs(name: str, options: InputOptions, expected: InputOptions) -> None:
    """One warning line where pictures are made otherwise than those that weights learned from."""
    given = with_image_defaults(options)
    others = [
        f"{key} {given.get(key)} instead of {value}" for key, value in expected.items() if given.get(key) != value
    ]
    if others:
        rank_zero_warn(f"data.image differs from what the weights of {name} learned from: {', '.join(others)}")
