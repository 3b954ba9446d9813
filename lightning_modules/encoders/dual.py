"""Image and text towers of dual encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_modules.encoders.image import ImageEncoder, Normalize
from lightning_modules.encoders.text import TextEncoder, checked_length, longest_text
from lightning_modules.encoders.tokenizer import (
    SPECIAL_IDS,
    TextTokenizer,
    Tokens,
    pretrained_tokenizer,
    trained_tokenizer,
)
from lightning_modules.encoders.transformers import (
    PROCESSOR_FILES,
    Preprocessing,
    Statistics,
    build_model,
    configuration_from_values,
    configuration_values,
    image_processor,
    load_model,
    model_configuration,
    model_directory,
    preprocessing_of,
    statistics_of,
)
from lightning_modules.encoders.weights import WeightsOrigin, local_directory, weights_origin
from lightning_modules.options import TowerOptions, checked
from lightning_modules.precision import Conversion, not_halved
from vitrail.errors import UserError
from vitrail.types import InputOptions


class ProjectionHead(nn.Module):
    """Linear, then a residual block with GELU and dropout, then LayerNorm.

    The head of the reference project (Mini-CLIP), as in M. M. Shariatnia, "Simple CLIP", 2021.
    """

    def __init__(self, in_features: int, embed_dim: int, drop_rate: float = 0.1) -> None:
        super().__init__()
        self.projection = nn.Linear(in_features, embed_dim)
        self.block = nn.Sequential(nn.GELU(), nn.Linear(embed_dim, embed_dim), nn.Dropout(drop_rate))
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project float ``(B, in_features)`` to ``(B, embed_dim)``, not of unit length."""
        projected = self.projection(features)
        embeddings: torch.Tensor = self.norm(projected + self.block(projected))
        return embeddings


Side = Literal["image", "text"]
SIDES: tuple[Side, ...] = get_args(Side)

Architectures = dict[str, dict[str, Any]]
"""Configurations in checkpoints, from which towers are built without their folders."""


class Towers(nn.Module, ABC):
    """Base class of towers that encode images and texts into a common space.

    Attributes:
        name: name of the image tower's pretrained weights in messages.
        embed_dim: length of the embeddings.
        input_options: preprocessing of the pretrained weights.
        tokenizer: None until the weights are loaded or a tokenizer is trained.
        wholly_pretrained: whether no weight is random.
    """

    name: str
    embed_dim: int
    input_options: InputOptions
    tokenizer: TextTokenizer | None
    wholly_pretrained = False

    @abstractmethod
    def backbone(self, side: Side) -> nn.Module:
        """The pretrained part of a tower."""

    @abstractmethod
    def projections(self, side: Side) -> list[nn.Module]:
        """The layers that map a tower's features into the common space; may be empty."""

    @abstractmethod
    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """Output of the image backbone, float ``(B, D)``, for uint8 RGB images ``(B, 3, H, W)``."""

    @abstractmethod
    def text_features(self, tokens: Tokens) -> torch.Tensor:
        """Output of the text backbone, float ``(B, D)``."""

    @abstractmethod
    def train_tokenizer(self, texts: list[str]) -> TextTokenizer:
        """Train a tokenizer on texts."""

    def project(self, side: Side, features: torch.Tensor) -> torch.Tensor:
        """Project the features of one tower, float ``(B, D)``, to ``(B, embed_dim)``, not of unit length."""
        for projection in self.projections(side):
            features = projection(features)
        return features

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Embeddings of uint8 images ``(B, 3, H, W)``, float ``(B, embed_dim)``, not of unit length."""
        return self.project("image", self.image_features(image))

    def encode_text(self, tokens: Tokens) -> torch.Tensor:
        """Embeddings of texts, float ``(B, embed_dim)``, not of unit length."""
        return self.project("text", self.text_features(tokens))

    def load_pretrained(self) -> None:
        """Load the pretrained weights once, if any."""

    @property
    def own_inputs(self) -> InputOptions | None:
        """Preprocessing of the image tower's pretrained weights; None without such weights."""
        return None

    @property
    def origins(self) -> list[WeightsOrigin]:
        """Origins of the loaded weights."""
        return []

    @property
    def architectures(self) -> Architectures:
        """Configurations for checkpoints."""
        return {}

    def pretrained_logit_scale(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logarithm of the scale, and bias, of the pretrained weights, if any."""
        return None, None


class TwoTowers(Towers):
    """Any ``timm`` network and any ``transformers`` text model, each with a ``ProjectionHead``."""

    def __init__(self, options: TowerOptions, image_size: int, architectures: Architectures | None) -> None:
        super().__init__()
        saved = architectures or {}
        name, pretrained = options.text or "", options.text_pretrained
        if "text" in saved:
            configuration = configuration_from_values(saved["text"])
        else:
            configuration = model_configuration(name, pretrained, "towers.text")
        self.image = ImageEncoder(
            options.image or "", image_size, options.image_pretrained, options.image_options, part="towers.image"
        )
        self.text = TextEncoder(
            name,
            configuration,
            pretrained=pretrained,
            pooling=options.pooling,
            max_length=options.max_length,
            directory="" if "text" in saved else model_directory(name, "towers.text"),
            rule=saved["pooling"]["rule"] if "text" in saved else None,
        )
        self.embed_dim, drop_rate = options.embed_dim, options.projection_dropout
        self.image_projection = ProjectionHead(self.image.num_features, self.embed_dim, drop_rate)
        self.text_projection = ProjectionHead(self.text.num_features, self.embed_dim, drop_rate)
        self.name, self.input_options = self.image.name, self.image.input_options

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """See ``Towers``."""
        return cast("torch.Tensor", self.image(image))

    def text_features(self, tokens: Tokens) -> torch.Tensor:
        """See ``Towers``."""
        return cast("torch.Tensor", self.text(tokens))

    def backbone(self, side: Side) -> nn.Module:
        """See ``Towers``."""
        return self.image.backbone if side == "image" else self.text.backbone

    def projections(self, side: Side) -> list[nn.Module]:
        """See ``Towers``."""
        return [self.image_projection if side == "image" else self.text_projection]

    def load_pretrained(self) -> None:
        """See ``Towers``."""
        self.image.load_pretrained()
        self.text.load_pretrained()

    @property
    def tokenizer(self) -> TextTokenizer | None:
        """See ``Towers``."""
        return self.text.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: TextTokenizer | None) -> None:
        self.text.tokenizer = tokenizer

    def train_tokenizer(self, texts: list[str]) -> TextTokenizer:
        """See ``Towers``."""
        return self.text.train_tokenizer(texts)

    @property
    def own_inputs(self) -> InputOptions | None:
        """See ``Towers``."""
        return self.image.own_inputs

    @property
    def origins(self) -> list[WeightsOrigin]:
        """See ``Towers``."""
        return [origin for origin in (self.image.origin, self.text.origin) if origin]

    @property
    def architectures(self) -> Architectures:
        """See ``Towers``."""
        return {"text": configuration_values(self.text.configuration), "pooling": {"rule": self.text.pooling}}


def random_towers(options: TowerOptions) -> TowerOptions:
    """The same towers without pretrained weights."""
    if options.model:
        return replace(options, pretrained=False)
    return replace(options, image_pretrained=False, text_pretrained=False)


def build_towers(options: TowerOptions, image_size: int, architectures: Architectures | None = None) -> Towers:
    """Build towers with random weights."""
    options = checked(TowerOptions, options, "towers")
    if options.model:
        others = [
            one.name
            for one in fields(options)
            if one.name not in ("model", "pretrained", "max_length") and getattr(options, one.name) != one.default
        ]
        if others:
            raise UserError(f"towers: {', '.join(others)} do not go with model, which has both towers; leave them out")
        if options.model in RESNETS:
            return ClipResNet(options, image_size)
        return WholeModel(options, image_size, architectures)
    if not (options.image and options.text):
        raise UserError("towers: give either model, or image (a timm name) and text (a folder or a name on the hub)")
    if not options.pretrained:
        raise UserError("towers.pretrained: belongs to model; for two towers give image_pretrained and text_pretrained")
    return TwoTowers(options, image_size, architectures)


KEY = "towers.model"

KINDS = ("clip", "siglip")

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)


class WholeModel(Towers):
    """CLIP (Radford et al., 2021) or SigLIP (Zhai et al., 2023), for images of any size."""

    def __init__(self, options: TowerOptions, image_size: int, architectures: Architectures | None) -> None:
        super().__init__()
        self.name, self.wholly_pretrained = options.model or "", options.pretrained
        if architectures and "model" in architectures:
            configuration = configuration_from_values(architectures["model"])
        else:
            configuration = model_configuration(self.name, self.wholly_pretrained, "towers.model")
        if configuration.model_type == "siglip2":
            raise UserError(
                f"towers.model: {self.name} is a siglip2 of images of any shape (NaFlex), which is not supported; "
                "give one of a fixed size, such as google/siglip2-base-patch16-224"
            )
        if configuration.model_type not in KINDS:
            raise UserError(
                f"towers.model: {self.name} is a {configuration.model_type}, not one of {', '.join(KINDS)}; for other "
                "encoders give towers.image and towers.text"
            )
        vision, text = configuration.vision_config, configuration.text_config
        if image_size % vision.patch_size and image_size != vision.image_size:
            raise UserError(
                f"data.image.size: {self.name} cuts images into patches of {vision.patch_size} px, {image_size} px "
                f"do not fit; it was built for {vision.image_size}"
            )
        self.configuration = configuration
        self.max_length = checked_length(options.max_length or longest_text(text), longest_text(text))
        self.model = build_model(configuration)
        # The task has the logit scale; as parameters of this model they would never get a gradient.
        for name in ("logit_scale", "logit_bias"):
            if isinstance(value := getattr(self.model, name, None), nn.Parameter):
                delattr(self.model, name)
                self.model.register_buffer(name, value.detach())
        self.is_clip = configuration.model_type == "clip"
        self.embed_dim = int(configuration.projection_dim if self.is_clip else vision.hidden_size)
        self.normalize = Normalize(_HALF, _HALF)
        known = self.name if not architectures and Path(self.name).is_dir() else ""
        self._set_preprocessing(known, image_processor(known, KEY) if known else None)
        self._interpolate = image_size != vision.image_size
        self._origin: WeightsOrigin | None = None
        self._loaded = not self.wholly_pretrained
        self.tokenizer: TextTokenizer | None = None

    def _apply(self, fn: Conversion, recurse: bool = True) -> Self:
        """Keep the pretrained scale and bias in float32 for the task."""
        exact = {name: value for name, value in self.model.named_buffers(recurse=False) if name.startswith("logit_")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for name, value in exact.items():
            setattr(self.model, name, not_halved(fn)(value))
        return self

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """See ``Towers``."""
        outputs = self.backbone("image")(pixel_values=self.normalize(image), interpolate_pos_encoding=self._interpolate)
        return cast("torch.Tensor", outputs.pooler_output)

    def text_features(self, tokens: Tokens) -> torch.Tensor:
        """See ``Towers``."""
        # SigLIP was trained without a mask: it attends to the padding and pools the last position.
        mask = tokens["attention_mask"] if self.is_clip else None
        outputs = self.backbone("text")(input_ids=tokens["input_ids"], attention_mask=mask)
        return cast("torch.Tensor", outputs.pooler_output)

    def backbone(self, side: Side) -> nn.Module:
        """See ``Towers``."""
        return cast("nn.Module", self.model.vision_model if side == "image" else self.model.text_model)

    def projections(self, side: Side) -> list[nn.Module]:
        """CLIP's two linear maps; SigLIP has none."""
        name = "visual_projection" if side == "image" else "text_projection"
        return [getattr(self.model, name)] if hasattr(self.model, name) else []

    def load_pretrained(self) -> None:
        """See ``Towers``."""
        if self._loaded:
            return
        directory = local_directory(self.name, "towers.model")
        left_out = load_model(self.model, directory, KEY)
        self._origin = weights_origin(KEY, self.name, Path(directory), left_out)
        if (processor := image_processor(directory, KEY)) is None:
            assumed = (
                "SigLIP's (mean and std 0.5, squashed)" if not self.is_clip else "CLIP's (its mean and std, cropped)"
            )
            rank_zero_warn(
                f"{KEY}: {directory} has no {' and no '.join(PROCESSOR_FILES)}, so its preprocessing is unknown; "
                f"{assumed} are assumed"
            )
        self._set_preprocessing(directory, processor)
        self.tokenizer = pretrained_tokenizer(directory, self.max_length, fixed_length=not self.is_clip)
        self._loaded = True

    def _set_preprocessing(self, directory: str, processor: Any) -> None:
        """Use the model's own image processor, or the usual one of CLIP or SigLIP."""
        if processor is None:
            statistics = Statistics(_CLIP_MEAN, _CLIP_STD) if self.is_clip else Statistics(_HALF, _HALF)
            how = Preprocessing("crop" if self.is_clip else "squash", 1.0, "bicubic", "down")
        else:
            statistics = statistics_of(processor, directory, KEY)
            how = preprocessing_of(processor, directory, KEY)
        self.normalize.load_state_dict(Normalize(*statistics).state_dict())
        size = int(self.configuration.vision_config.image_size)
        self.input_options = {"size": size, **how._asdict()}  # type: ignore[typeddict-item]  # the same keys

    def train_tokenizer(self, texts: list[str]) -> TextTokenizer:
        """See ``Towers``."""
        vocabulary_size = int(self.configuration.text_config.vocab_size)
        return trained_tokenizer(texts, vocabulary_size, self.max_length, fixed_length=not self.is_clip)

    @property
    def own_inputs(self) -> InputOptions | None:
        """See ``Towers``."""
        return self.input_options if self.wholly_pretrained else None

    @property
    def origins(self) -> list[WeightsOrigin]:
        """See ``Towers``."""
        return [self._origin] if self._origin else []

    @property
    def architectures(self) -> Architectures:
        """See ``Towers``."""
        return {"model": configuration_values(self.configuration)}

    def pretrained_logit_scale(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """See ``Towers``."""
        if not self.wholly_pretrained:
            return None, None
        return cast("torch.Tensor", self.model.logit_scale), getattr(self.model, "logit_bias", None)


class _Size(NamedTuple):
    image: str
    embed_dim: int
    width: int
    heads: int


RESNETS = {
    "openai/clip-rn50": _Size("resnet50_clip", 1024, 512, 8),
    "openai/clip-rn101": _Size("resnet101_clip", 512, 512, 8),
    "openai/clip-rn50x4": _Size("resnet50x4_clip", 640, 640, 10),
    "openai/clip-rn50x16": _Size("resnet50x16_clip", 768, 768, 12),
    "openai/clip-rn50x64": _Size("resnet50x64_clip", 1024, 1024, 16),
}
"""By names like those on the hub, where they are not in the format of ``transformers``."""


class ClipResNet(Towers):
    """CLIP with a residual network (Radford et al., 2021, table 20) and random weights, in the original size.

    ``transformers`` has only CLIP's vision transformers, so the image tower is ``timm``'s.
    """

    def __init__(self, options: TowerOptions, image_size: int) -> None:
        super().__init__()
        self.name = name = options.model or ""
        if options.pretrained:
            raise UserError(
                f"towers.pretrained: the weights of {name} are not in a format that is read here; set pretrained: "
                "false, or take a vision transformer such as openai/clip-vit-base-patch32"
            )
        size = RESNETS[name]
        self.image = ImageEncoder(size.image, image_size, pretrained=False)
        values = {"hidden_size": size.width, "intermediate_size": 4 * size.width, "num_attention_heads": size.heads}
        configuration = configuration_from_values({"model_type": "clip_text_model", **values, **SPECIAL_IDS})
        longest = longest_text(configuration)
        self.max_length = checked_length(options.max_length or longest, longest)
        self.text = build_model(configuration)
        # The last layer of the attention pool, which has a bias unlike the text projection.
        self.image_projection = nn.Linear(self.image.num_features, size.embed_dim)
        self.text_projection = nn.Linear(size.width, size.embed_dim, bias=False)
        self.embed_dim = size.embed_dim
        self.vocabulary_size = int(cast("Any", configuration).vocab_size)
        self.input_options = self.image.input_options
        self.tokenizer: TextTokenizer | None = None

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """See ``Towers``."""
        return cast("torch.Tensor", self.image(image))

    def text_features(self, tokens: Tokens) -> torch.Tensor:
        """See ``Towers``."""
        outputs = self.text(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return cast("torch.Tensor", outputs.pooler_output)

    def backbone(self, side: Side) -> nn.Module:
        """See ``Towers``."""
        return self.image.backbone if side == "image" else self.text

    def projections(self, side: Side) -> list[nn.Module]:
        """See ``Towers``."""
        return [self.image_projection if side == "image" else self.text_projection]

    def train_tokenizer(self, texts: list[str]) -> TextTokenizer:
        """See ``Towers``."""
        return trained_tokenizer(texts, self.vocabulary_size, self.max_length, fixed_length=False)
