"""The two encoders of a dual encoder, and what a task may ask of them.

``TwoTowers`` joins any ``timm`` network with any ``transformers`` text model by projection heads; a model that was
pretrained as a whole is in ``whole_model.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, TypedDict, cast, get_args

import torch
from torch import nn

from lightning_modules.encoders import ImageEncoder, InputOptions
from lightning_modules.projection import ProjectionHead
from lightning_modules.text_encoders import Pooling, TextEncoder
from lightning_modules.text_tokenizer import TextTokenizer, Tokens
from lightning_modules.transformers_models import (
    configuration_from_values,
    configuration_values,
    model_configuration,
    model_directory,
)
from lightning_modules.weights import WeightsOrigin
from vitrail.errors import UserError

Side = Literal["image", "text"]
SIDES: tuple[Side, ...] = get_args(Side)

Architectures = dict[str, dict[str, Any]]
"""Configurations that a checkpoint keeps, so that it can be loaded without the folders that they came from."""


class TowerOptions(TypedDict, total=False):
    """Which encoders; either ``model`` or ``image`` and ``text``.

    Attributes:
        model: a whole pretrained dual encoder (CLIP, SigLIP): local folder or name on the hub.
        pretrained: whether ``model`` has its pretrained weights, default true.
        image: name of the image tower in timm.
        image_pretrained: true for the weights on the hub, false for random ones, or a weights file; default true.
        text: the text tower: local folder or name on the hub.
        text_pretrained: whether it has its pretrained weights; else a tokenizer is trained on the captions; default
            true.
        pooling: how the text tower's tokens become one vector: auto, cls, eos (the last token) or mean; default auto,
            its own rule, refused where it is not known.
        max_length: longest text in tokens; default 64, or the model's longest, if that is shorter; with ``model`` its
            longest.
        embed_dim: length of the embeddings that both towers are projected to; default 256.
        projection_dropout: dropout of the projection heads, in [0, 1); default 0.1.
    """

    model: str
    pretrained: bool
    image: str
    image_pretrained: bool | str
    text: str
    text_pretrained: bool
    pooling: Pooling
    max_length: int
    embed_dim: int
    projection_dropout: float


class Towers(nn.Module, ABC):
    """Encodes pictures and texts into one space.

    Attributes:
        embed_dim: length of the embeddings.
        input_options: how the pictures were made that the pretrained weights learned from.
        tokenizer: None until the weights are loaded or one was trained.
    """

    embed_dim: int
    input_options: InputOptions
    tokenizer: TextTokenizer | None

    @abstractmethod
    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        """What the image backbone puts out.

        Args:
            image: uint8 ``(B, 3, H, W)``, RGB.

        Returns:
            float ``(B, D)``.
        """

    @abstractmethod
    def text_features(self, tokens: Tokens) -> torch.Tensor:
        """What the text backbone puts out.

        Returns:
            float ``(B, D)``.
        """

    def project(self, side: Side, features: torch.Tensor) -> torch.Tensor:
        """From the features of one side into the common space.

        Args:
            side: image or text.
            features: float ``(B, D)``, of its backbone.

        Returns:
            float ``(B, embed_dim)``, not of unit length.
        """
        for projection in self.projections(side):
            features = projection(features)
        return features

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """Embeddings of pictures, not of unit length.

        Args:
            image: uint8 ``(B, 3, H, W)``, RGB.

        Returns:
            float ``(B, embed_dim)``.
        """
        return self.project("image", self.image_features(image))

    def encode_text(self, tokens: Tokens) -> torch.Tensor:
        """Embeddings of texts, not of unit length.

        Returns:
            float ``(B, embed_dim)``.
        """
        return self.project("text", self.text_features(tokens))

    @abstractmethod
    def backbone(self, side: Side) -> nn.Module:
        """The pretrained part of a tower."""

    @abstractmethod
    def projections(self, side: Side) -> list[nn.Module]:
        """The part of a tower that maps its features into the common space; may be nothing."""

    @abstractmethod
    def load_pretrained(self) -> None:
        """Replace random weights by pretrained ones, once, where there are to be any.

        Raises:
            UserError: if they cannot be had or do not fit.
        """

    @abstractmethod
    def train_tokenizer(self, texts: list[str]) -> TextTokenizer:
        """A tokenizer learned from texts."""

    @abstractmethod
    def warn_of_other_inputs(self, options: InputOptions) -> None:
        """One warning line where pictures are made otherwise than those that the weights learned from."""

    @property
    @abstractmethod
    def own_inputs(self) -> InputOptions | None:
        """How images must be made for the pretrained weights of the image tower; None where there are none."""

    @property
    @abstractmethod
    def wholly_pretrained(self) -> bool:
        """Whether nothing begins random."""

    @property
    @abstractmethod
    def origins(self) -> list[WeightsOrigin]:
        """Where the pretrained weights came from that were loaded."""

    @property
    @abstractmethod
    def architectures(self) -> Architectures:
        """What a checkpoint keeps of the configurations."""

    def pretrained_temperature(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logarithm of the scale, and bias, that came with the weights; nothing where there were none."""
        return None, None


class TwoTowers(Towers):
    """A timm network and a transformers text model, each with a ``ProjectionHead``.

    Args:
        options: which ones.
        image_size: height and width of the pictures in pixels.
        architectures: as a checkpoint keeps them.

    Raises:
        UserError: if a name is unknown or the settings do not fit together.
    """

    def __init__(self, options: TowerOptions, image_size: int, architectures: Architectures | None) -> None:
        super().__init__()
        saved = architectures or {}
        name, pretrained = options.get("text", ""), options.get("text_pretrained", True)
        if "text" in saved:
            configuration = configuration_from_values(saved["text"])
        else:
            configuration = model_configuration(name, pretrained, "towers.text")
        self.image = ImageEncoder(options.get("image", ""), image_size, options.get("image_pretrained", True))
        self.image.part = "towers.image"
        self.text = TextEncoder(
            name,
            configuration,
            pretrained=pretrained,
            pooling=options.get("pooling", "auto"),
            max_length=options.get("max_length"),
            directory="" if "text" in saved else model_directory(name, "towers.text"),
            rule=saved["pooling"]["rule"] if "text" in saved else None,
        )
        self.embed_dim = options.get("embed_dim", 256)
        drop_rate = options.get("projection_dropout", 0.1)
        if self.embed_dim < 1 or not 0 <= drop_rate < 1:
            raise UserError(
                f"towers: embed_dim must be at least 1 and projection_dropout in [0, 1), got {self.embed_dim} and "
                f"{drop_rate}"
            )
        self.image_projection = ProjectionHead(self.image.num_features, self.embed_dim, drop_rate)
        self.text_projection = ProjectionHead(self.text.num_features, self.embed_dim, drop_rate)
        self.input_options = self.image.input_options

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

    def warn_of_other_inputs(self, options: InputOptions) -> None:
        """See ``Towers``."""
        self.image.warn_of_other_inputs(options)

    @property
    def own_inputs(self) -> InputOptions | None:
        """See ``Towers``."""
        return self.image.own_inputs

    @property
    def wholly_pretrained(self) -> bool:
        """Its projections always begin random."""
        return False

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
    if options.get("model"):
        return {**options, "pretrained": False}
    return {**options, "image_pretrained": False, "text_pretrained": False}


def build_towers(options: TowerOptions, image_size: int, architectures: Architectures | None = None) -> Towers:
    """The towers that the options name, with random weights.

    Args:
        options: which ones.
        image_size: height and width of the pictures in pixels.
        architectures: as a checkpoint keeps them; else configurations are looked up by name.

    Raises:
        UserError: if an option is unknown or they contradict each other.
    """
    from lightning_modules.clip_resnet import RESNETS, ClipResNet
    from lightning_modules.whole_model import WholeModel

    if strange := sorted(set(options) - set(TowerOptions.__annotations__)):
        known = ", ".join(TowerOptions.__annotations__)
        raise UserError(f"towers: unknown key {strange[0]!r}; known keys are {known}")
    whole = {"model", "pretrained", "max_length"}
    if options.get("model"):
        if others := sorted(set(options) - whole):
            raise UserError(f"towers: {', '.join(others)} do not go with model, which has both towers; leave them out")
        if options["model"] in RESNETS:
            return ClipResNet(options, image_size)
        return WholeModel(options, image_size, architectures)
    if not (options.get("image") and options.get("text")):
        raise UserError("towers: give either model, or image (a timm name) and text (a folder or a name on the hub)")
    if "pretrained" in options:
        raise UserError("towers.pretrained: belongs to model; for two towers give image_pretrained and text_pretrained")
    return TwoTowers(options, image_size, architectures)
