"""Embeddings of whole models equal those of the libraries that they come from, for one PIL image of any shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from datamodules.loading.decode import image_pixels
from datamodules.loading.transforms import eval_transform
from lightning_modules.encoders.dual import FAMILIES, Towers, build_towers
from lightning_modules.options import TowerOptions
from tests.support.models import TEXTS, write_open_clip, write_whole_model
from vitrail.errors import UserError

SHAPES = {"square": (64, 64), "wide": (300, 70), "tall": (41, 190), "tiny": (5, 3), "large": (640, 480)}


def images() -> dict[str, Image.Image]:
    """One image of each shape and mode; the RGBA one is opaque."""
    found = {}
    rng = np.random.default_rng(0)
    for name, (width, height) in SHAPES.items():
        rows, columns = np.mgrid[0:height, 0:width]
        waves = [np.sin(columns / width * 9), np.cos(rows / height * 7), np.sin((columns + rows) / 50)]
        noise = rng.normal(0, 30, (height, width, 3))
        found[name] = Image.fromarray((127 + 90 * np.stack(waves, -1) + noise).clip(0, 255).astype("u1"))
    return {**found, "gray": found["wide"].convert("L"), "rgba": found["tall"].convert("RGBA")}


def our_embedding(towers: Towers, image: Image.Image) -> torch.Tensor:
    pixels = eval_transform(towers.input_options)(image_pixels(image, "auto"))
    return F.normalize(towers.encode_image(pixels[None]), dim=-1)


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_every_family_embeds_as_transformers_does(kind: str, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = write_whole_model(tmp_path, kind)
    peer: Any = AutoModel.from_pretrained(folder).eval()
    processor: Any = AutoImageProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]  # the library's own
    towers = build_towers(TowerOptions(model=str(folder)), 32).eval()
    towers.load_pretrained()
    for name, image in images().items():
        if kind == "siglip2" and image.width != image.height:
            continue  # others are squashed, so that a batch has one shape
        inputs = processor(
            images=image.convert("RGB"), return_tensors="pt", **({"max_num_patches": 16} if kind == "siglip2" else {})
        )
        expected = F.normalize(peer.get_image_features(**inputs).pooler_output, dim=-1)
        torch.testing.assert_close(our_embedding(towers, image), expected, rtol=0, atol=1e-4, msg=name)
    assert towers.tokenizer is not None
    fixed = not FAMILIES[kind].masked
    how: dict[str, Any] = {"padding": "max_length" if fixed else True, "max_length": towers.max_length}
    tokens = AutoTokenizer.from_pretrained(folder)(list(TEXTS), truncation=True, return_tensors="pt", **how)
    arguments = {"input_ids": tokens["input_ids"], "attention_mask": None if fixed else tokens["attention_mask"]}
    texts = F.normalize(towers.encode_text(towers.tokenizer(list(TEXTS))), dim=-1)
    expected = F.normalize(peer.get_text_features(**arguments).pooler_output, dim=-1)
    torch.testing.assert_close(texts, expected, rtol=0, atol=1e-4)
    scale, bias = towers.pretrained_logit_scale()
    assert scale is not None
    assert float(scale.exp()) == pytest.approx(20.0 if kind == "align" else np.exp(3.0), rel=1e-5)
    assert (bias is None) == (not kind.startswith("siglip"))


@pytest.mark.parametrize(
    ("kind", "preprocessing"),
    [("vit", {}), ("resnet", {"interpolation": "bilinear"}), ("timm", {"resize_mode": "squash", "mean": [0.5] * 3})],
)
@torch.no_grad()
def test_models_of_open_clip_embed_as_there(kind: str, preprocessing: dict[str, Any], tmp_path: Path) -> None:
    import open_clip

    folder = write_open_clip(tmp_path, kind, **preprocessing)
    peer, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    peer.eval()
    towers = build_towers(TowerOptions(model=str(folder)), 32).eval()
    towers.load_pretrained()
    for name, image in images().items():
        expected = peer.encode_image(transform(image)[None], normalize=True)
        torch.testing.assert_close(our_embedding(towers, image), expected, rtol=0, atol=1e-4, msg=name)
    texts = [*TEXTS, "Two  Dogs'  &amp; a longer text that is cut at some place because it has too many words"]
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    assert towers.tokenizer is not None
    ours = towers.tokenizer([texts[0], *texts[1:-1], texts[-1].replace("&amp;", "&")])
    assert torch.equal(ours["input_ids"], tokens)
    expected = peer.encode_text(tokens, normalize=True)
    torch.testing.assert_close(F.normalize(towers.encode_text(ours), dim=-1), expected, rtol=0, atol=1e-4)
    scale, _ = towers.pretrained_logit_scale()
    assert float(scale) == 3.0  # type: ignore[arg-type]  # there is one


OPENAI = {
    **{f"openai/clip-{name.lower()}": name for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")},
    **{f"open_clip:{name}/openai": name for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")},
}


@pytest.mark.parametrize("name", OPENAI)
def test_openai_architectures_have_their_weights_layout_and_activation(name: str) -> None:
    """Without values: names and shapes of all weights, and the activation that OpenAI trained with."""
    import open_clip

    size = {"RN50x4": 288, "RN50x16": 384, "RN50x64": 448, "ViT-L-14-336": 336}.get(OPENAI[name], 224)
    with torch.device("meta"):
        peer = open_clip.CustomTextCLIP(**open_clip.get_model_config(f"{OPENAI[name]}-quickgelu"))
        towers: Any = build_towers(TowerOptions(model=name), size)
    assert {key: value.shape for key, value in towers.model.state_dict().items()} == {
        key: value.shape for key, value in peer.state_dict().items()
    }
    assert any(type(module).__name__ == "QuickGELU" for module in towers.model.text.modules())
    assert towers.input_options == {
        **{"size": size, "resize": "crop", "crop_fraction": 1.0, "interpolation": "bicubic"},
        **{"crop_rounding": "even", "resampler": "pillow"},
    }
    assert towers.normalize.mean.shape == (3, 1, 1)


@torch.no_grad()
def test_weights_in_openais_own_layout_are_read(tmp_path: Path) -> None:
    """As one network whose text tower has no module of its own, in half precision."""
    import open_clip

    folder = write_open_clip(tmp_path, "vit")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    torch.manual_seed(3)
    theirs = open_clip.CLIP(**config).half().float().eval()
    torch.save(
        {key: value.half() for key, value in theirs.state_dict().items()}, folder / "open_clip_pytorch_model.bin"
    )
    (folder / "open_clip_model.safetensors").unlink()
    towers = build_towers(TowerOptions(model=str(folder)), 32).eval()
    towers.load_pretrained()
    image = images()["square"].resize((32, 32))
    pixels = (image_pixels(image, "auto") / 255 - towers.normalize.mean) / towers.normalize.std  # type: ignore[operator]  # buffers
    expected = theirs.encode_image(pixels[None], normalize=True)
    torch.testing.assert_close(our_embedding(towers, image), expected, rtol=0, atol=1e-4)


def test_mistakes_with_open_clip_are_one_line(tmp_path: Path) -> None:
    folder = write_open_clip(tmp_path / "model", "vit")
    for name, message in {
        "open_clip:ViT-B-33/openai": "has no 'ViT-B-33'; did you mean ViT-B-32",
        "open_clip:RN50/laion": "has no weights 'laion' of RN50; it has openai, yfcc15m, cc12m",
    }.items():
        with pytest.raises(UserError, match=message):
            build_towers(TowerOptions(model=name), 224)
    towers = build_towers(TowerOptions(model=str(folder)), 32)
    (folder / "open_clip_model.safetensors").write_bytes(
        (write_open_clip(tmp_path / "other", "resnet") / "open_clip_model.safetensors").read_bytes()
    )
    with pytest.raises(UserError, match=r"open_clip_model.safetensors do not fit .*; give those of this model"):
        towers.load_pretrained()
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no weights; it needs open_clip_model.safetensors or"):
        towers.load_pretrained()
