"""Embeddings of whole models equal those of the libraries that they come from, for one PIL image of any shape."""

from __future__ import annotations

import functools
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
from lightning_modules.checkpoint import load_task
from lightning_modules.encoders.dual import FAMILIES, SIDES, Towers, build_towers
from lightning_modules.options import TowerOptions
from tests.support.models import (
    TEXTS,
    TinyPairs,
    pair_batch,
    same_weights,
    tiny_pair,
    tiny_trainer,
    write_open_clip,
    write_whole_model,
)
from vitrail.errors import UserError

SHAPES = {"square": (64, 64), "wide": (300, 70), "tall": (41, 190), "tiny": (5, 3), "large": (640, 480)}


@functools.cache
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
    parts = [module for side in SIDES for module in (towers.backbone(side), *towers.projections(side))]
    assert sum(p.numel() for part in parts for p in part.parameters()) == sum(p.numel() for p in peer.parameters()) - 1
    assert towers.embed_dim == open_clip.get_model_config(OPENAI[name])["embed_dim"]


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


def training_step(folder: Path, kind: str, **options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Embeddings in training, and the gradients of a step."""
    towers = build_towers(TowerOptions(**{"model": str(folder), **options}), 32)
    if "model" in options or options.get("image") is None:
        towers.load_pretrained()
    torch.manual_seed(5)
    towers.train()
    pixels = torch.stack([image_pixels(images()[name].resize((32, 32)), "auto") for name in ("square", "wide")])
    ids = torch.tensor([[1, 5, 9, 3], [1, 7, 3, 3]])
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    embedded = torch.cat([towers.encode_image(pixels), towers.encode_text(tokens)])  # type: ignore[arg-type]  # plain
    embedded.square().sum().backward()  # type: ignore[no-untyped-call]  # torch's own
    return embedded.detach(), [p.grad for p in towers.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["clip", "siglip", "open_clip"])
def test_activations_are_recomputed_and_patches_left_out_in_training_only(kind: str, tmp_path: Path) -> None:
    folder = write_open_clip(tmp_path, "vit") if kind == "open_clip" else write_whole_model(tmp_path, kind)
    plain, gradients = training_step(folder, kind)
    again, recomputed = training_step(folder, kind, gradient_checkpointing=True)
    torch.testing.assert_close(again, plain)
    for one, other in zip(recomputed, gradients, strict=True):
        torch.testing.assert_close(one, other)
    fewer, _ = training_step(folder, kind, patch_dropout=0.5)
    assert not torch.allclose(fewer[:2], plain[:2], atol=1e-3)
    torch.testing.assert_close(fewer[2:], plain[2:])
    towers = build_towers(TowerOptions(model=str(folder), patch_dropout=0.5), 32).eval()
    counts: list[int] = []
    network: Any = towers.backbone("image")
    block = network.transformer.resblocks[0] if kind == "open_clip" else network.encoder.layers[0]
    block.register_forward_hook(lambda _, inputs, output: counts.append(inputs[0].shape[1]))
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    towers.encode_image(pixels)
    towers.train().encode_image(pixels)
    prefix = int(kind != "siglip")
    assert counts == [16 + prefix, 8 + prefix]


def test_towers_without_patches_refuse_to_leave_any_out(tmp_path: Path) -> None:
    for model in (write_whole_model(tmp_path / "align", "align"), write_open_clip(tmp_path / "resnet", "resnet")):
        with pytest.raises(UserError, match=r"^towers.patch_dropout: .* does not support it; leave it out"):
            build_towers(TowerOptions(model=str(model), patch_dropout=0.5), 32)


@pytest.mark.parametrize(("kind", "freeze"), [("vit", "early_layers"), ("resnet", "vision_only")])
def test_models_of_open_clip_are_trained_saved_and_loaded(kind: str, freeze: str, tmp_path: Path) -> None:
    folder = write_open_clip(tmp_path / "model", kind)
    task = tiny_pair(tmp_path / "clip", towers={"model": str(folder)}, freeze=freeze)
    task.load_pretrained()
    trainable = {name for name, parameter in task.towers.model.named_parameters() if parameter.requires_grad}  # type: ignore[union-attr]  # a network
    assert ("visual.proj" in trainable) == (kind == "vit")
    assert "text.text_projection" in trainable
    assert not any(name.startswith(("visual.conv1", "text.token_embedding")) for name in trainable) or kind == "resnet"
    trainer = tiny_trainer(tmp_path)
    trainer.fit(task, TinyPairs())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (folder / "open_clip_model.safetensors").unlink()  # a checkpoint has all that is needed
    (folder / "open_clip_config.json").unlink()
    again = load_task(tmp_path / "last.ckpt")
    assert same_weights(again, task)
    batch = pair_batch([1, 2, 3])
    for one, other in zip(
        again.predict_step(batch, 0)["logits"].values(),
        task.eval().predict_step(batch, 0)["logits"].values(),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
