from __future__ import annotations

import pytest
import torch

from lightning_modules.encoders.dual import RESNETS, SIDES, Towers, build_towers
from lightning_modules.finetune import freeze
from vitrail.errors import UserError

SIZES = {"rn50": 224, "rn101": 224, "rn50x4": 288, "rn50x16": 384, "rn50x64": 448}


def numbers(towers: Towers) -> tuple[int, int]:
    """Parameters of the image side and of the text side."""
    parts = [[towers.backbone(side), *towers.projections(side)] for side in SIDES]
    image, text = (sum(p.numel() for part in side for p in part.parameters()) for side in parts)
    return image, text


@pytest.mark.parametrize("name", RESNETS)
def test_towers_are_as_large_as_open_clip_has_them(name: str) -> None:
    import open_clip
    from open_clip.model import CLIP

    kind = name.removeprefix("openai/clip-")
    values = open_clip.get_model_config(kind.upper().replace("X", "x"))
    with torch.device("meta"):
        peer = CLIP(**values)
        towers = build_towers({"model": name, "pretrained": False}, SIZES[kind])
    total = sum(p.numel() for p in peer.parameters()) - 1  # without the temperature
    image = sum(p.numel() for p in peer.visual.parameters())
    assert numbers(towers) == (image, total - image)
    assert towers.embed_dim == values["embed_dim"]
    assert towers.input_options["size"] == values["vision_cfg"]["image_size"] == SIZES[kind]


@pytest.fixture(scope="module")
def small() -> Towers:
    return build_towers({"model": "openai/clip-rn50", "pretrained": False, "max_length": 8}, 64)


def test_both_sides_meet_in_one_space_and_texts_end_where_they_end(small: Towers) -> None:
    small.eval()
    ids = torch.tensor([[1, 5, 6, 3, 0, 0, 0, 0], [1, 5, 6, 3, 9, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]])
    with torch.no_grad():
        images = small.encode_image(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
        texts = small.encode_text({"input_ids": ids, "attention_mask": mask})
    assert images.shape == texts.shape == (2, 1024)
    assert torch.isfinite(images).all()
    # The summary is read at the end token, and what follows it is not seen from there.
    torch.testing.assert_close(texts[0], texts[1])


def test_its_tokenizer_is_trained(small: Towers) -> None:
    tokenizer = small.train_tokenizer(["a red rose", "a white daisy"])
    assert tokenizer.state["max_length"] == 8


def test_a_probe_leaves_the_two_maps_into_the_space(small: Towers) -> None:
    freeze(small, "towers")
    free = {name for name, parameter in small.named_parameters() if parameter.requires_grad}
    assert free == {"image_projection.weight", "image_projection.bias", "text_projection.weight"}


def test_pretrained_weights_are_refused() -> None:
    with pytest.raises(UserError, match="pretrained: false"):
        build_towers({"model": "openai/clip-rn50"}, 224)
