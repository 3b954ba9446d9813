"""Image and text towers of dual encoders."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import PatchDropout
from torch import nn

from lightning_modules.encoders import open_clip
from lightning_modules.encoders.image import ImageEncoder, Normalize
from lightning_modules.encoders.open_clip import is_open_clip
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
from lightning_modules.encoders.weights import WeightsOrigin, copy_weights, local_directory, weights_origin
from lightning_modules.options import TowerOptions, checked
from lightning_modules.precision import Conversion, not_halved
from vitrail.errors import UserError
from vitrail.types import InputOptions, Resize


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

    def with_image_tokens(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same output, and the image's tokens that it is pooled from, float ``(B, N, W)``."""
        raise NotImplementedError

    @property
    def caption_sizes(self) -> tuple[int, int, int]:
        """Length of an image token, size of the vocabulary and maximum length of a text.

        Raises:
            UserError: the image tower has no tokens to write captions from.
        """
        raise UserError(f"loss_options.captioning: {self.name} has no image tokens here; use other towers")

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

    def load_pretrained(self, place: str = "") -> None:
        """Load the pretrained weights once, if any.

        Args:
            place: folder or file that has them, by default that of their name.
        """

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
        image_options = dict(options.image_options or {})
        if options.patch_dropout:
            image_options["patch_drop_rate"] = options.patch_dropout
        self.image = ImageEncoder(
            options.image or "", image_size, options.image_pretrained, image_options, part="towers.image"
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
        if options.gradient_checkpointing:
            self.image.checkpoint_activations()
            _recompute_text(self.text.backbone, name)
        self.embed_dim, drop_rate = options.embed_dim, options.projection_dropout
        self.image_projection = ProjectionHead(self.image.num_features, self.embed_dim, drop_rate)
        self.text_projection = ProjectionHead(self.text.num_features, self.embed_dim, drop_rate)
        self.name, self.input_options = self.image.name, self.image.input_options

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """See ``Towers``."""
        return cast("torch.Tensor", self.image(image))

    def with_image_tokens(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Towers``."""
        return self.image.with_tokens(image)

    @property
    def caption_sizes(self) -> tuple[int, int, int]:
        """See ``Towers``."""
        vocabulary_size = int(self.text.configuration.vocab_size)
        return int(cast("Any", self.image.backbone).num_features), vocabulary_size, self.text.max_length

    def text_features(self, tokens: Tokens) -> torch.Tensor:
        """See ``Towers``."""
        return cast("torch.Tensor", self.text(tokens))

    def backbone(self, side: Side) -> nn.Module:
        """See ``Towers``."""
        return self.image.backbone if side == "image" else self.text.backbone

    def projections(self, side: Side) -> list[nn.Module]:
        """See ``Towers``."""
        return [self.image_projection if side == "image" else self.text_projection]

    def load_pretrained(self, place: str = "") -> None:
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


_OF_WHOLE_MODELS = ("model", "pretrained", "max_length", "patch_dropout", "gradient_checkpointing")


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
            if one.name not in _OF_WHOLE_MODELS and getattr(options, one.name) != one.default
        ]
        if others:
            raise UserError(f"towers: {', '.join(others)} do not go with model, which has both towers; leave them out")
        saved = "open_clip" in (architectures or {})
        if saved or is_open_clip(options.model) or (options.model in RESNETS and options.pretrained):
            return OpenClipModel(options, image_size, architectures)
        if options.model in RESNETS:
            return ClipResNet(options, image_size)
        return WholeModel(options, image_size, architectures)
    if not (options.image and options.text):
        raise UserError("towers: give either model, or image (a timm name) and text (a folder or a name on the hub)")
    if not options.pretrained:
        raise UserError("towers.pretrained: belongs to model; for two towers give image_pretrained and text_pretrained")
    return TwoTowers(options, image_size, architectures)


def _recompute_text(model: Any, name: str) -> None:
    """Recompute the activations of a network of ``transformers``."""
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"towers.gradient_checkpointing: {name} does not support it; leave it out") from error


KEY = "towers.model"

_HALF = (0.5, 0.5, 0.5)


class _Family(NamedTuple):
    """What distinguishes a kind of whole model.

    Attributes:
        first_token: whether a text's features are its first token instead of the model's own pooling.
        masked: whether texts are attended to without their padding; the others pad to the maximum length.
        sized: whether the image tower has position embeddings of a size, which may be interpolated.
        mean: mean of each channel where a folder has no image processor.
        std: standard deviation likewise.
        resize: likewise.
    """

    first_token: bool = False
    masked: bool = True
    sized: bool = True
    mean: tuple[float, ...] = OPENAI_CLIP_MEAN
    std: tuple[float, ...] = OPENAI_CLIP_STD
    resize: Resize = "crop"


_SIGLIP = _Family(masked=False, mean=_HALF, std=_HALF, resize="squash")

FAMILIES = {
    "clip": _Family(),  # Radford et al., ICML 2021; also MetaCLIP (Xu et al., ICLR 2024)
    "metaclip_2": _Family(),  # Chuang et al., 2025
    "altclip": _Family(first_token=True),  # Chen et al., Findings of ACL 2023
    "chinese_clip": _Family(first_token=True),  # Yang et al., 2022
    "align": _Family(first_token=True, sized=False, mean=_HALF, std=_HALF),  # Jia et al., ICML 2021
    "siglip": _SIGLIP,  # Zhai et al., ICCV 2023; also SigLIP 2 of a fixed size (Tschannen et al., 2025)
    "siglip2": _SIGLIP,  # NaFlex
}
"""Whole models of ``transformers`` by ``model_type``."""


class _JointTowers(Towers):
    """Two towers that were trained together as one network.

    Attributes:
        model: the network.
    """

    model: nn.Module

    def __init__(self, options: TowerOptions) -> None:
        super().__init__()
        self.name, self.wholly_pretrained = options.model or "", options.pretrained
        self.normalize = Normalize(_HALF, _HALF)
        self._origin: WeightsOrigin | None = None
        self._loaded = not self.wholly_pretrained
        self.tokenizer: TextTokenizer | None = None

    def _own_the_scale(self) -> None:
        """Make scale and bias buffers: the task has the logit scale, and these would never get a gradient."""
        for name in _SCALES:
            if isinstance(value := getattr(self.model, name, None), nn.Parameter):
                delattr(self.model, name)
                self.model.register_buffer(name, value.detach())

    def _apply(self, fn: Conversion, recurse: bool = True) -> Self:
        """Keep the pretrained scale and bias in float32 for the task."""
        exact = {name: value for name, value in self.model.named_buffers(recurse=False) if name in _SCALES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for name, value in exact.items():
            setattr(self.model, name, not_halved(fn)(value))
        return self

    @property
    def own_inputs(self) -> InputOptions | None:
        """See ``Towers``."""
        return self.input_options if self.wholly_pretrained else None

    @property
    def origins(self) -> list[WeightsOrigin]:
        """See ``Towers``."""
        return [self._origin] if self._origin else []

    def pretrained_logit_scale(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """See ``Towers``; ALIGN has a temperature, by which it divides."""
        if not self.wholly_pretrained:
            return None, None
        values: dict[str, torch.Tensor] = dict(self.model.named_buffers(recurse=False))
        log_scale = values["logit_scale"] if "logit_scale" in values else -values["temperature"].log()
        return log_scale, values.get("logit_bias")


class WholeModel(_JointTowers):
    """An image and a text encoder that were trained together, of ``FAMILIES``, for square images of any size.

    SigLIP 2 NaFlex takes images of any aspect ratio. Here they are squashed to a square, so that batches have one
    shape; embeddings of square images are its own.
    """

    def __init__(self, options: TowerOptions, image_size: int, architectures: Architectures | None) -> None:
        super().__init__(options)
        if architectures and "model" in architectures:
            configuration = configuration_from_values(architectures["model"])
        else:
            configuration = model_configuration(self.name, self.wholly_pretrained, "towers.model")
        if configuration.model_type not in FAMILIES:
            raise UserError(
                f"towers.model: {self.name} is a {configuration.model_type}, not one of {', '.join(FAMILIES)}; for "
                "other encoders give towers.image and towers.text"
            )
        self.family = FAMILIES[configuration.model_type]
        vision, text = configuration.vision_config, configuration.text_config
        self.patch_size = int(getattr(vision, "patch_size", 1))
        self.is_naflex = configuration.model_type == "siglip2"
        self.own_size = int(math.isqrt(vision.num_patches) * self.patch_size if self.is_naflex else vision.image_size)
        if image_size % self.patch_size and image_size != self.own_size:
            raise UserError(
                f"data.image.size: {self.name} cuts images into patches of {self.patch_size} px, {image_size} px "
                f"do not fit; it was built for {self.own_size}"
            )
        self.configuration = configuration
        self.model = build_model(configuration)
        if options.gradient_checkpointing:
            _recompute_text(self.model, self.name)
        self._drop_patches(options.patch_dropout)
        longest = longest_text(text, cast("nn.Module", self.model.text_model))
        self.max_length = checked_length(options.max_length or longest, longest)
        self._own_the_scale()
        self.embed_dim = int(getattr(configuration, "projection_dim", None) or vision.hidden_size)
        known = self.name if not architectures and Path(self.name).is_dir() else ""
        self._set_preprocessing(known, image_processor(known, KEY) if known else None)
        self._interpolate = image_size != self.own_size

    def _drop_patches(self, rate: float) -> None:
        """Leave patches out after their position embeddings, in training."""
        if not rate:
            return
        embeddings = getattr(self.model.vision_model, "embeddings", None)
        if self.is_naflex or not hasattr(embeddings, "patch_embedding"):
            raise UserError(f"towers.patch_dropout: {self.name} does not support it; leave it out")
        self.patch_dropout = PatchDropout(rate, num_prefix_tokens=int(hasattr(embeddings, "class_embedding")))
        cast("nn.Module", embeddings).register_forward_hook(lambda _, inputs, tokens: self.patch_dropout(tokens))

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """See ``Towers``."""
        return cast("torch.Tensor", self._encoded(image).pooler_output)

    def with_image_tokens(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Towers``."""
        outputs = self._encoded(image)
        return outputs.pooler_output, outputs.last_hidden_state

    @property
    def caption_sizes(self) -> tuple[int, int, int]:
        """See ``Towers``; ALIGN's image tower is a convolutional network."""
        if not self.family.sized:
            return super().caption_sizes
        configuration = self.configuration
        return int(configuration.vision_config.hidden_size), int(configuration.text_config.vocab_size), self.max_length

    def _encoded(self, image: torch.Tensor) -> Any:
        pixels = self.normalize(image)
        arguments: dict[str, Any] = {}
        if self.is_naflex:
            rows, columns = (side // self.patch_size for side in pixels.shape[-2:])
            pixels = _patches(pixels, self.patch_size)
            shapes = torch.tensor([[rows, columns]], device="cpu").expand(len(pixels), -1)
            mask = torch.ones(pixels.shape[:2], dtype=torch.int32, device=pixels.device)
            arguments = {"pixel_attention_mask": mask, "spatial_shapes": shapes}
        elif self.family.sized:
            arguments = {"interpolate_pos_encoding": self._interpolate}
        return self.backbone("image")(pixel_values=pixels, **arguments)

    def text_features(self, tokens: Tokens) -> torch.Tensor:
        """See ``Towers``."""
        # SigLIP was trained without a mask: it attends to the padding and pools the last position.
        mask = tokens["attention_mask"] if self.family.masked else None
        outputs = self.backbone("text")(input_ids=tokens["input_ids"], attention_mask=mask)
        if self.family.first_token:
            return cast("torch.Tensor", outputs.last_hidden_state[:, 0])
        return cast("torch.Tensor", outputs.pooler_output)

    def backbone(self, side: Side) -> nn.Module:
        """See ``Towers``."""
        return cast("nn.Module", self.model.vision_model if side == "image" else self.model.text_model)

    def projections(self, side: Side) -> list[nn.Module]:
        """CLIP's two linear maps; ALIGN has that of texts only, SigLIP has none."""
        name = "visual_projection" if side == "image" else "text_projection"
        return [getattr(self.model, name)] if hasattr(self.model, name) else []

    def load_pretrained(self, place: str = "") -> None:
        """See ``Towers``."""
        if self._loaded:
            return
        directory = place or local_directory(self.name, KEY)
        left_out = load_model(self.model, directory, KEY)
        self._origin = weights_origin(KEY, self.name, Path(directory), left_out)
        if (processor := image_processor(directory, KEY)) is None:
            how = f"mean {self.family.mean}, std {self.family.std}, {self.family.resize}"
            rank_zero_warn(
                f"{KEY}: {directory} has no {' and no '.join(PROCESSOR_FILES)}, so its preprocessing is unknown; that "
                f"of {self.configuration.model_type} ({how}) is assumed"
            )
        if self.is_naflex:
            rank_zero_warn(
                f"{KEY}: {self.name} takes images of any aspect ratio (NaFlex); here they are squashed to squares, so "
                "that a batch has one shape"
            )
        self._set_preprocessing(directory, processor)
        self.tokenizer = pretrained_tokenizer(directory, self.max_length, fixed_length=not self.family.masked)
        self._loaded = True

    def _set_preprocessing(self, directory: str, processor: Any) -> None:
        """Use the model's own image processor, or the usual one of its family."""
        if processor is None:
            statistics = Statistics(self.family.mean, self.family.std)
            how = Preprocessing(self.family.resize, 1.0, "bicubic", "down")
        else:
            statistics = statistics_of(processor, directory, KEY)
            how = preprocessing_of(processor, directory, KEY)
        self.normalize.load_state_dict(Normalize(*statistics).state_dict())
        self.input_options = {"size": self.own_size, **how._asdict()}  # type: ignore[typeddict-item]  # the same keys

    def train_tokenizer(self, texts: list[str]) -> TextTokenizer:
        """See ``Towers``."""
        vocabulary_size = int(self.configuration.text_config.vocab_size)
        return trained_tokenizer(texts, vocabulary_size, self.max_length, fixed_length=not self.family.masked)

    @property
    def architectures(self) -> Architectures:
        """See ``Towers``."""
        return {"model": configuration_values(self.configuration)}


_SCALES = ("logit_scale", "logit_bias", "temperature")


def _patches(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Patches of images in the order of NaFlex, float ``(B, patches, 3 · side²)``."""
    rows, columns = (length // side for length in pixels.shape[-2:])
    grid = pixels.reshape(len(pixels), 3, rows, side, columns, side)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(len(pixels), rows * columns, -1)


class OpenClipModel(_JointTowers):
    """A dual encoder of open_clip, whose towers contain their projections; see ``encoders.open_clip`` for its names."""

    def __init__(self, options: TowerOptions, image_size: int, architectures: Architectures | None) -> None:
        super().__init__(options)
        saved = (architectures or {}).get("open_clip")
        self._named = _OPENAI_RESNETS.get(self.name, self.name)
        self.configuration = open_clip.Configuration(**saved) if saved else open_clip.configuration_of(self._named)
        self.image_size = image_size
        self.model = open_clip.build(self.configuration, image_size, options.patch_dropout)
        if options.gradient_checkpointing:
            cast("Any", self.model).set_grad_checkpointing(True)
        if hasattr(self.model, "text_decoder"):
            del self.model.text_decoder  # of CoCa (Yu et al., TMLR 2022), which takes no part in embeddings
        self._own_the_scale()
        self.embed_dim = int(self.configuration.model_cfg["embed_dim"])
        self.max_length = int(self.configuration.model_cfg["text_cfg"].get("context_length", 77))
        if options.max_length not in (None, self.max_length):
            raise UserError(f"towers.max_length: {self.name} pads all texts to {self.max_length} tokens; leave it out")
        how = self.configuration.preprocess_cfg
        self.normalize.load_state_dict(Normalize(tuple(how["mean"]), tuple(how["std"])).state_dict())
        self.input_options = open_clip.input_options(self.configuration)

    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """See ``Towers``."""
        return cast("torch.Tensor", cast("Any", self.model).encode_image(self.normalize(image), normalize=False))

    def text_features(self, tokens: Tokens) -> torch.Tensor:
        """See ``Towers``."""
        ids = F.pad(tokens["input_ids"], (0, self.max_length - tokens["input_ids"].shape[1]))
        return cast("torch.Tensor", cast("Any", self.model).encode_text(ids, normalize=False))

    def backbone(self, side: Side) -> nn.Module:
        """See ``Towers``."""
        return cast("nn.Module", self.model.visual if side == "image" else self.model.text)

    def projections(self, side: Side) -> list[nn.Module]:
        """None apart from the towers."""
        return []

    def load_pretrained(self, place: str = "") -> None:
        """See ``Towers``."""
        if self._loaded:
            return
        path = open_clip.weights_file(place or self._named)
        source = open_clip.build(self.configuration, self.image_size)
        open_clip.load_file(source, path)
        copy_weights(source, self.model, f"{KEY}: {path}")
        self._origin = weights_origin(KEY, self.name, path, {})
        if self.tokenizer is None:
            self.tokenizer = open_clip.tokenizer_of(self.configuration, self._named)
        self._loaded = True

    def train_tokenizer(self, texts: list[str]) -> TextTokenizer:
        """The model's own tokenizer, which needs no training."""
        return open_clip.tokenizer_of(self.configuration, self._named)

    @property
    def architectures(self) -> Architectures:
        """See ``Towers``."""
        return {"open_clip": dict(open_clip.plain(self.configuration))}


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

_OPENAI_RESNETS = {
    name: f"open_clip:{name.removeprefix('openai/clip-').upper().replace('X', 'x')}/openai" for name in RESNETS
}
"""Their pretrained weights in open_clip."""


class ClipResNet(Towers):
    """CLIP with a residual network (Radford et al., 2021, table 20) and random weights, in the original size.

    ``transformers`` has only CLIP's vision transformers, so the image tower is ``timm``'s.
    """

    def __init__(self, options: TowerOptions, image_size: int) -> None:
        super().__init__()
        self.name = name = options.model or ""
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
