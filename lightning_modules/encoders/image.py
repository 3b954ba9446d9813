"""Image encoders from uint8 images to features; normalisation is part of the network."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_modules.encoders.weights import (
    TimmOptions,
    WeightsOrigin,
    check_encodes,
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
"""timm's names of crop modes."""


class Normalize(KeepsFloat32):
    """Normalise uint8 images by the statistics of the pretrained weights."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.output_dtype = torch.get_default_dtype()

    def _apply(self, fn: Conversion, recurse: bool = True) -> Self:
        """Stay float32, and output the dtype of the network."""
        self.output_dtype = fn(self.mean.new_empty(0, dtype=self.output_dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Normalise uint8 images ``(B, 3, H, W)``, in ``torch.channels_last`` and the dtype of the network.

        Most convolutional networks are 10 to 30 % faster in this layout (``python -m benchmarks training.layout``).
        """
        if image.dtype != torch.uint8:
            raise TypeError(f"expected uint8 images (0 to 255); got {image.dtype}; the model scales them")
        pixels = image.to(self.mean.dtype, memory_format=torch.channels_last)
        return pixels.div_(255).sub_(self.mean).div_(self.std).to(self.output_dtype)


class ImageEncoder(nn.Module):
    """A timm network without its classifier, behind ``Normalize``.

    Weights are random until ``load_pretrained``, which a checkpoint makes unnecessary.

    Args:
        backbone: name in timm, with or without the tag of its weights, such as ``resnet18`` or
            ``vit_base_patch16_224.augreg_in21k``.
        image_size: height and width of the images in pixels, for architectures with a fixed size.
        pretrained: true for the weights on the hub, or the path of a ``.safetensors``, ``.pth`` or ``.ckpt`` file.
        options: further arguments of the network in timm, such as ``drop_path_rate`` or ``global_pool``.
        part: option that names the encoder, for messages; that of its options ends in ``_options``.

    Attributes:
        num_features: length of a feature vector.
        has_two_tokens: whether the features are those of two tokens, see ``output_two_tokens``.
        input_options: preprocessing of the architecture's weights.
        origin: origin of the pretrained weights, once loaded.
    """

    def __init__(
        self,
        backbone: str,
        image_size: int = 224,
        pretrained: bool | str = True,
        options: TimmOptions | None = None,
        part: str = "backbone",
    ) -> None:
        super().__init__()
        from timm.data import resolve_data_config

        source = known_architecture(backbone)
        if pretrained is True and not source.has_weights:
            raise UserError(f"pretrained: true, but timm has no weights for {backbone!r}; use false or a file's path")
        self.name = backbone
        self.part = part
        self.options = dict(options or {})
        self.image_size = image_size
        self.pretrained = pretrained
        self._loaded = pretrained is False
        self._recomputes = False
        self.has_two_tokens = False
        self.origin: WeightsOrigin | None = None
        key = f"{part}_options"
        self.backbone = create_backbone(backbone, image_size, options=options, key=key)
        self.num_features = check_encodes(self.backbone, backbone, image_size, self.options, key)
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
        """Features, float ``(B, num_features)``, of uint8 RGB images ``(B, 3, H, W)``."""
        if self.has_two_tokens:
            tokens = cast("Any", self.backbone).forward_features(self.normalize(image))
            return cast("torch.Tensor", tokens[:, :2].flatten(1))
        return cast("torch.Tensor", self.backbone(self.normalize(image)))

    def with_tokens(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features as of ``forward``, and the tokens or places of the last feature map, float ``(B, N, W)``.

        ``W`` is the network's own ``num_features``.
        """
        network = cast("Any", self.backbone)
        maps = network.forward_features(self.normalize(image))
        if maps.ndim == 3:
            return network.forward_head(maps), maps
        places_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        return network.forward_head(maps), maps.flatten(1, 2) if places_last else maps.flatten(2).transpose(1, 2)

    @property
    def has_distillation_token(self) -> bool:
        """Whether the network has a token for a teacher's predictions (DeiT: Touvron et al., ICML 2021)."""
        return isinstance(getattr(self.backbone, "dist_token", None), nn.Parameter)

    def output_two_tokens(self) -> None:
        """Output class and distillation token one after the other instead of their mean."""
        self.has_two_tokens = True
        self.num_features *= 2

    def load_pretrained(self) -> None:
        """Load the pretrained weights once, if any (UserError if they cannot be fetched or do not fit)."""
        if self._loaded:
            return
        path = self.pretrained if isinstance(self.pretrained, str) else hub_file(known_architecture(self.name))
        left_out = load_backbone(self.backbone, path, self.name, self.image_size, self.options)
        self.origin = weights_origin(self.part, self.name, Path(path), left_out)
        self._loaded = True

    def checkpoint_activations(self) -> None:
        """Recompute the activations of the network's blocks in the backward pass (Chen et al., 2016).

        BatchNorm's running statistics are updated once, as without.

        Raises:
            UserError: timm does not support it for this network.
        """
        try:
            cast("Any", self.backbone).set_grad_checkpointing(True)
        except (AssertionError, AttributeError, NotImplementedError) as error:
            raise UserError(
                f"backbone_options.gradient_checkpointing: timm does not support it for {self.name}; leave it out, and "
                "lower data.loader.batch_size instead"
            ) from error
        if not self._recomputes:
            self._recomputes = True
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.register_forward_pre_hook(partial(_keep_statistics, module.momentum))

    def keep_activations(self) -> None:
        """Undo ``checkpoint_activations``."""
        cast("Any", self.backbone).set_grad_checkpointing(False)

    @property
    def own_inputs(self) -> InputOptions | None:
        """Preprocessing of the pretrained weights; None without such weights."""
        return None if self.pretrained is False else self.input_options


def _keep_statistics(momentum: float | None, norm: _BatchNorm, inputs: tuple[torch.Tensor, ...]) -> None:
    """Let a forward pass within the backward pass leave the running statistics as they are."""
    recomputes = norm.training and torch._C._current_graph_task_id() != -1
    # Not undone after the pass, which ends by an exception once all activations are there.
    norm.momentum = 0.0 if recomputes else momentum
    if recomputes and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.sub_(1)


def warn_of_other_inputs(name: str, options: InputOptions, expected: InputOptions) -> None:
    """Warn if the preprocessing differs from that of pretrained weights."""
    given = with_image_defaults(options)
    if others := [
        f"{key} {given.get(key)} instead of {value}" for key, value in expected.items() if given.get(key) != value
    ]:
        rank_zero_warn(f"data.image differs from what the weights of {name} were trained with: {', '.join(others)}")
