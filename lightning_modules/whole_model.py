"""Dual encoders that were pretrained as a whole: CLIP and SigLIP in ``transformers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_modules.encoders import InputOptions, Normalize, warn_of_other_inputs
from lightning_modules.image_processing import (
    FILES,
    Preprocessing,
    Statistics,
    image_processor,
    preprocessing_of,
    statistics_of,
)
from lightning_modules.precision import Conversion, not_halved
from lightning_modules.text_encoders import checked_length, longest_text
from lightning_modules.text_tokenizer import TextTokenizer, Tokens, pretrained_tokenizer, trained_tokenizer
from lightning_modules.towers import Architectures, Side, TowerOptions, Towers
from lightning_modules.transformers_models import (
    build_model,
    configuration_from_values,
    configuration_values,
    load_model,
    model_configuration,
)
from lightning_modules.weights import WeightsOrigin, hub_directory, weights_origin
from vitrail.errors import UserError

KEY = "towers.model"
"""The option that names the model, for messages."""

KINDS = ("clip", "siglip")

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)


class WholeModel(Towers):
    """CLIP (Radford et al., 2021) or SigLIP (Zhai et al., 2023), with its own projections, tokenizer and temperature.

    Pictures of another size than the model's are encoded with interpolated position embeddings.

    Args:
        options: ``model``, ``pretrained`` and ``max_length`` are read.
        image_size: height and width of the pictures in pixels.
        architectures: as a checkpoint keeps them.

    Raises:
        UserError: if the model is of another kind, or the size does not fit its patches.
    """

    def __init__(self, options: TowerOptions, image_size: int, architectures: Architectures | None) -> None:
        super().__init__()
        self.name, self.pretrained = options.get("model", ""), options.get("pretrained", True)
        if architectures and "model" in architectures:
            configuration = configuration_from_values(architectures["model"])
        else:
            configuration = model_configuration(self.name, self.pretrained, "towers.model")
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
                f"data.image.size: {self.name} cuts pictures into patches of {vision.patch_size} px, {image_size} px "
                f"do not fit; it was built for {vision.image_size}"
            )
        self.configuration = configuration
        self.max_length = checked_length(options.get("max_length") or longest_text(text), longest_text(text))
        self.model = build_model(configuration)
        # The temperature is the task's; left here as parameters, they would never get a gradient.
        for name in ("logit_scale", "logit_bias"):
            if isinstance(value := getattr(self.model, name, None), nn.Parameter):
                delattr(self.model, name)
                self.model.register_buffer(name, value.detach())
        self.is_clip = configuration.model_type == "clip"
        self.embed_dim = int(configuration.projection_dim if self.is_clip else vision.hidden_size)
        self.normalize = Normalize(_HALF, _HALF)
        known = self.name if not architectures and Path(self.name).is_dir() else ""
        self._take_processor(known, image_processor(known, KEY) if known else None)
        self._interpolate = image_size != vision.image_size
        self._origin: WeightsOrigin | None = None
        self._loaded = not self.pretrained
        self.tokenizer: TextTokenizer | None = None

    def _apply(self, fn: Conversion, recurse: bool = True) -> Self:
        """Leave the pretrained scale and bias in float32: the task takes them over."""
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
        # SigLIP was trained without a mask: it reads the padding, and its summary is the last place.
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
        directory = self.name if Path(self.name).is_dir() else hub_directory(self.name, "towers.model")
        left_out = load_model(self.model, directory, KEY)
        self._origin = weights_origin(KEY, self.name, Path(directory), left_out)
        if (processor := image_processor(directory, KEY)) is None:
            assumed = (
                "SigLIP's (mean and std 0.5, squashed)" if not self.is_clip else "CLIP's (its mean and std, cropped)"
            )
            rank_zero_warn(
                f"{KEY}: {directory} has no {' and no '.join(FILES)}, so it is not known how its images were made; "
                f"{assumed} are assumed"
            )
        self._take_processor(directory, processor)
        self.tokenizer = pretrained_tokenizer(directory, self.max_length, fixed_length=not self.is_clip)
        self._loaded = True

    def _take_processor(self, directory: str, processor: Any) -> None:
        """How images are made and normalised: as the model's own processor does, or as those of its kind."""
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

    def warn_of_other_inputs(self, options: InputOptions) -> None:
        """See ``Towers``."""
        if self.pretrained:
            warn_of_other_inputs(self.name, options, self.input_options)

    @property
    def own_inputs(self) -> InputOptions | None:
        """See ``Towers``."""
        return self.input_options if self.pretrained else None

    @property
    def wholly_pretrained(self) -> bool:
        """See ``Towers``."""
        return self.pretrained

    @property
    def origins(self) -> list[WeightsOrigin]:
        """See ``Towers``."""
        return [self._origin] if self._origin else []

    @property
    def architectures(self) -> Architectures:
        """See ``Towers``."""
        return {"model": configuration_values(self.configuration)}

    def pretrained_temperature(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """See ``Towers``."""
        if not self.pretrained:
            return None, None
        return cast("torch.Tensor", self.model.logit_scale), getattr(self.model, "logit_bias", None)
