from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ImageFolder
from datamodules.captions import PromptOptions
from datamodules.loading.transforms import eval_transform
from datamodules.options import CheckOptions, LoaderOptions
from datamodules.splits import SplitOptions
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.encoders.dual import build_towers
from lightning_modules.encoders.image import ImageEncoder
from lightning_modules.encoders.transformers import image_processor, preprocessing_of, statistics_of
from lightning_modules.generative.weights import image_statistics
from lightning_modules.options import TowerOptions
from tests.support.models import tiny_trainer, write_clip, write_qwen2_vl, write_siglip
from vitrail.errors import UserError

SIDE = 32
SHAPES = [
    (32, 32),
    (640, 480),
    (480, 640),
    (1000, 333),
    (333, 1000),
    (101, 77),
    (77, 101),
    (41, 37),
    (19, 23),
    (7, 301),
]

CLIP = {"image_processor_type": "CLIPImageProcessor", "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
CROP = {"crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True}
SIGLIP = {"image_processor_type": "SiglipImageProcessor", "size": {"height": SIDE, "width": SIDE}}
PROCESSORS: dict[str, dict[str, Any]] = {
    "clip": {**CLIP, **CROP, "size": {"shortest_edge": SIDE}},
    "clip, some cropped": {**CLIP, **CROP, "size": {"shortest_edge": 37}, "resample": 2},
    "clip, old format": {**CLIP, "feature_extractor_type": "CLIPFeatureExtractor", "size": 36, "crop_size": 32},
    "clip, squashed": {**CLIP, "size": {"height": SIDE, "width": SIDE}, "do_center_crop": False},
    "clip, from 0 to 2.55": {
        **CLIP,
        **CROP,
        "size": {"shortest_edge": SIDE},
        "do_normalize": False,
        "rescale_factor": 0.01,
    },
    "siglip": SIGLIP,
    "siglip2 of a fixed size": {**SIGLIP, "image_processor_type": "SiglipImageProcessorFast", "resample": 2},
}


@functools.cache
def photo(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(columns / width * 9), np.cos(rows / height * 7), np.sin((columns + rows) / 50)]
    return Image.fromarray(
        (127 + 90 * np.stack(waves, -1) + rng.normal(0, 30, (height, width, 3))).clip(0, 255).astype("u1")
    )


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def write_processor(folder: Path, values: dict[str, Any], *, nested: bool) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink(missing_ok=True)
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (folder / name).write_text(json.dumps({"image_processor": values} if nested else values), encoding="utf-8")


@pytest.mark.parametrize(("kind", "nested"), [*((kind, False) for kind in PROCESSORS), ("clip", True)])
@torch.no_grad()
def test_embeddings_of_any_shape_are_those_of_the_models_own_processor(tmp_path: Path, kind: str, nested: bool) -> None:
    from transformers import AutoImageProcessor, AutoModel

    folder = write_siglip(tmp_path) if "siglip" in kind else write_clip(tmp_path)
    write_processor(folder, PROCESSORS[kind], nested=nested)
    peer: Any = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]  # the library's own
    towers = build_towers(TowerOptions(model=str(folder)), SIDE).eval()
    towers.load_pretrained()
    transform = eval_transform(towers.input_options)  # a plain dictionary
    for shape in SHAPES:
        image = photo(*shape)
        expected = peer.get_image_features(**processor(image, return_tensors="pt")).pooler_output
        ours = towers.encode_image(transform(pixels(image))[None])
        assert float(torch.cosine_similarity(ours, expected)) > 0.9999, shape
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))


def test_the_rule_is_known_before_the_weights_are_loaded_and_the_file_has_the_last_word(tmp_path: Path) -> None:
    folder = write_siglip(tmp_path)
    write_processor(folder, {**SIGLIP, "resample": 2}, nested=False)
    assert build_towers(TowerOptions(model=str(folder)), SIDE).input_options["interpolation"] == "bilinear"
    with torch.device("meta"):
        known = build_towers(TowerOptions(model="google/siglip-base-patch16-224", pretrained=False), 32)
    assert known.input_options["resize"] == "squash"
    assert known.own_inputs is None


def test_assumptions_without_a_file_are_reported(tmp_path: Path) -> None:
    for write, assumed in ((write_clip, "of clip"), (write_siglip, "of siglip")):
        folder = write(tmp_path / assumed)
        (folder / "preprocessor_config.json").unlink(missing_ok=True)
        (folder / "processor_config.json").write_text('{"processor_class": "of texts alone"}', encoding="utf-8")
        towers = build_towers(TowerOptions(model=str(folder)), SIDE)
        with pytest.warns(UserWarning, match=f"no preprocessor_config.json.*{assumed}.*assumed"):
            towers.load_pretrained()


def test_a_generative_model_takes_its_statistics_from_the_same_places(tmp_path: Path) -> None:
    folder = write_qwen2_vl(tmp_path)
    write_processor(folder, {"image_processor_type": "Qwen2VLImageProcessor", "image_mean": [0.5] * 3}, nested=True)
    assert image_statistics(str(folder))[0] == (0.5, 0.5, 0.5)
    (folder / "processor_config.json").unlink()
    with pytest.warns(UserWarning, match="CLIP's mean and std are assumed"):
        image_statistics(str(folder))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"do_resize": False}, "in their own size"),
        ({"resample": 1}, "resample 1 instead of"),
        ({"resample": "bicubic"}, "resample bicubic instead of"),
        ({"do_center_crop": False}, "without a center crop"),
        ({"crop_size": {"height": 40, "width": 40}}, "of 32 pixels with borders up to 40"),
        ({"crop_size": {"height": 32, "width": 24}}, "of 24 × 32 pixels"),
        ({"size": {"height": 32, "width": 24}}, "of the size"),
        ({"do_pad": True}, "with borders"),
    ],
)
def test_processors_that_do_something_else_are_refused_in_one_line(
    tmp_path: Path, values: dict[str, Any], expected: str
) -> None:
    folder = write_clip(tmp_path)
    write_processor(folder, {**PROCESSORS["clip"], **values}, nested=False)
    processor = image_processor(str(folder), "towers.model")
    with pytest.raises(UserError, match=f"^towers.model: .*{expected}.*") as refused:
        preprocessing_of(processor, str(folder), "towers.model")
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=expected):
        build_towers(TowerOptions(model=str(folder)), SIDE)


@pytest.mark.parametrize(
    "text", ["no json", "[]", json.dumps({**CLIP, "image_std": [0, 1, 1]}), json.dumps({**CLIP, "image_mean": [0.5]})]
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    folder = write_clip(tmp_path)
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="image_mean and image_std"):
        statistics_of(image_processor(str(folder), "towers.model"), str(folder), "towers.model")


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("fraction", [1.0, 0.9])
def test_timms_networks_get_what_timm_would_give_them(
    monkeypatch: pytest.MonkeyPatch, mode: str, fraction: float
) -> None:
    from timm.data import create_transform
    from timm.data.config import resolve_data_config

    wanted = {
        "crop_mode": mode,
        "crop_pct": fraction,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bicubic",
    }
    config = {**resolve_data_config(pretrained_cfg={"num_classes": 0}), **wanted, "input_size": (3, SIDE, SIDE)}
    monkeypatch.setattr("timm.data.resolve_data_config", lambda **_: config)
    encoder = ImageEncoder("test_resnet", SIDE)
    ours = eval_transform(encoder.input_options)  # a plain dictionary
    theirs = create_transform(**config)
    for shape in SHAPES:
        image = photo(*shape)
        difference = encoder.normalize(ours(pixels(image))[None])[0] - theirs(image)
        # Pillow and torch round a pixel differently here and there; a shift by one pixel would show as .2 or so.
        assert float(difference.abs().max()) < 0.03, shape


def test_resizing_follows_the_pretrained_configurations_of_timm() -> None:
    names = {
        "resnet18": "crop",
        "convnext_tiny.in12k_ft_in1k_384": "squash",
        "deepseek_vit_412m.deepseek_v4_flash_vision_exp": "pad",
    }
    with torch.device("meta"):
        for name, resize in names.items():
            assert ImageEncoder(name, 392).input_options["resize"] == resize
        # 384 is no multiple of 14, and what it was built for.
        assert ImageEncoder("vit_so400m_patch14_siglip_384", 384).input_options["size"] == 384
        with pytest.raises(UserError, match="patches of 14 px, 390 px"):
            ImageEncoder("vit_so400m_patch14_siglip_384", 390)
        so400m = build_towers(TowerOptions(model="google/siglip-so400m-patch14-384", pretrained=False), 384)
        assert so400m.embed_dim == 1152


@pytest.mark.parametrize("given", [{}, {"resize": "crop"}], ids=["open", "explicit"])
def test_a_run_makes_images_as_the_model_needs_them_unless_options_differ(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    from transformers import AutoImageProcessor, AutoModel

    folder = write_siglip(tmp_path / "siglip")
    write_processor(folder, SIGLIP, nested=False)
    photos = [photo(*shape) for shape in [(90, 60), (60, 90), (40, 41), (120, 33)] * 2]
    for number, image in enumerate(photos):
        (tmp_path / "data" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "data" / "ab"[number % 2] / f"{number}.png")
    data = ImageFolder(
        str(tmp_path / "data"),
        image={"size": SIDE, **given},
        loader=LoaderOptions(predict=["train", "val", "test"], batch_size=3),
        split=SplitOptions(by="random"),
        checks=CheckOptions(allow_leaks=["near", "exact"]),
        prompts=PromptOptions(templates=["a photo of a {}."]),
    )
    task = DualEncoder(TowerOptions(model=str(folder)), data.class_names, data.class_prompts, image_size=SIDE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs: Any = tiny_trainer(tmp_path).predict(task, datamodule=data)
    warned = [str(one.message) for one in caught if "data.image differs" in str(one.message)]
    assert len(warned) == len(given)
    assert task.input_options["resize"] == ("crop" if given else "squash")
    found = torch.cat([batch["image_embedding"] for batch in outputs])
    names = [Path(data.sample_names()[int(row)]).name for batch in outputs for row in batch["sample_id"]]
    processor = AutoImageProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]  # the library's own
    inputs = processor([photos[int(name.removesuffix(".png"))] for name in names], return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder).eval().get_image_features(**inputs).pooler_output
    cosine = torch.cosine_similarity(found, expected)
    assert bool((cosine > 0.9999).all()) is not bool(given)
