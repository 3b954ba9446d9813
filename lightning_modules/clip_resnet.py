"""OpenAI's CLIP with a residual network as its image tower (Radford et al., 2021, table 20), with random weights.

``transformers`` has only CLIP's vision transformers. The image tower is ``timm``'s, the text tower is the causal
transformer of ``transformers``; both are as wide and as deep as the originals, so counts and costs are theirs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import nn

from lightning_modules.encoders import ImageEncoder, InputOptions
from lightning_modules.text_encoders import checked_length, longest_text
from lightning_modules.text_tokenizer import SPECIAL_IDS, TextTokenizer, Tokens, trained_tokenizer
from lightning_modules.towers import Architectures, Side, TowerOptions, Towers
from lightning_modules.transformers_models import build_model, configuration_from_values
from lightning_modules.weights import WeightsOrigin
from vitrail.errors import UserError


class _Size(NamedTuple):
    """What differs between them.

    Attributes:
        image: name of the image tower in timm.
        embed_dim: length of the embeddings.
        width: of the text tower.
        heads: of the text tower's attention.
    """

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
"""By a name of ours, in the manner of the hub, where they are not in the format of ``transformers``."""


class ClipResNet(Towers):
    """CLIP RN50 to RN50x64.

    Args:
        options: ``model``, ``pretrained``, which must be false, and ``max_length`` are read.
        image_size: height and width of the pictures in pixels.

    Raises:
        UserError: if pretrained weights are asked for.
    """

    def __init__(self, options: TowerOptions, image_size: int) -> None:
        super().__init__()
        name = options.get("model", "")
        if options.get("pretrained", True):
            raise UserError(
                f"towers.pretrained: the weights of {name} are not in a format that is read here; set pretrained: "
                "false, or take a vision transformer such as openai/clip-vit-base-patch32"
            )
        size = RESNETS[name]
        self.image = ImageEncoder(size.image, image_size, pretrained=False)
        values = {"hidden_size": size.width, "intermediate_size": 4 * size.width, "num_attention_heads": size.heads}
        configuration = configuration_from_values({"model_type": "clip_text_model", **values, **SPECIAL_IDS})
        longest = longest_text(configuration)
        self.max_length = checked_length(options.get("max_length") or longest, longest)
        self.text = build_model(configuration)
        # The attention pool's last layer maps into the common space; unlike the text's map it has a bias.
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

    def load_pretrained(self) -> None:
        """Nothing to load: the weights are random."""

    def train_tokenizer(self, texts: list[str]) -> TextTokenizer:
        """See ``Towers``."""
        return trained_tokenizer(texts, self.vocabulary_size, self.max_length, fixed_length=False)

    def warn_of_other_inputs(self, options: InputOptions) -> None:
        """Nothing to warn of: random weights have learned from no pictures."""

    @property
    def own_inputs(self) -> InputOptions | None:
        """None: random weights have learned from no images."""
        return None

    @property
    def wholly_pretrained(self) -> bool:
        """See ``Towers``."""
        return False

    @property
    def origins(self) -> list[WeightsOrigin]:
        """None: the weights are random."""
        return []

    @property
    def architectures(self) -> Architectures:
        """Nothing: the name says it all."""
        return {}
