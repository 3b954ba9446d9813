"""Tests of maps against other ways to compute the same, and of what is refused where there is no map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from evaluation.saliency import (
    attention_rollout,
    check_method,
    class_scores,
    grad_cam,
    image_backbone,
    map_layer,
    text_scores,
    watched_attention,
)
from lightning_modules.classification import ImageClassifier
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.options import TowerOptions
from tests.evaluation.saliency.networks import draw_scenes, fresh
from tests.support.models import TEXTS, write_clip, write_siglip
from vitrail.errors import UserError

FLAT = ("test_resnet", "test_efficientnet", "test_mambaout", "test_vit", "test_vit2")
"""Convolutional, the same with a further layer in its head, channels last, ViT with class token, ViT that averages."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_clip(root / "clip")
    write_siglip(root / "siglip")
    return root


@pytest.fixture(params=["clip", "siglip"])
def dual(folder: Path, request: pytest.FixtureRequest) -> DualEncoder:
    task = DualEncoder(
        TowerOptions(model=str(folder / request.param)), ["rose", "tulip"], [[TEXTS[0]], [TEXTS[1]]], image_size=32
    )
    task.load_pretrained()
    return task.eval()


def noise(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def by_finite_differences(model: nn.Module, score: Callable[[], torch.Tensor], prefix: int | None) -> torch.Tensor:
    """Grad-CAM's map before it is scaled, for one image: each channel's weight from moving it up and down everywhere.

    Args:
        model: in float64.
        score: a scalar.
        prefix: class tokens in front of the patches; None for feature maps.

    Returns:
        ``(places,)``, not negative.
    """
    layer, features, step = map_layer(image_backbone(model)).module, list[torch.Tensor](), 1e-2
    with layer.register_forward_hook(lambda _, __, output: features.append(output.detach())), torch.no_grad():
        score()
    tokens, last = features[0][0], getattr(image_backbone(model), "output_fmt", "NCHW") == "NHWC"
    channels = tokens.shape[-1] if prefix is not None or last else tokens.shape[0]

    def moved(channel: int, by: float) -> float:
        def move(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
            changed = output.clone()
            if prefix is not None:
                changed[:, prefix:, channel] += by
            elif last:
                changed[..., channel] += by
            else:
                changed[:, channel] += by
            return changed

        with layer.register_forward_hook(move), torch.no_grad():
            return float(score())

    slopes = torch.tensor([(moved(c, step) - moved(c, -step)) / (2 * step) for c in range(channels)])
    if prefix is not None:
        return (tokens[prefix:].float() @ slopes).relu()
    return (tokens.float() @ slopes if last else torch.einsum("chw,c->hw", tokens.float(), slopes)).relu().flatten()


def coarse(maps: torch.Tensor, side: int) -> torch.Tensor:
    """What a map of ``side`` × ``side`` places looks like when it is enlarged, from the enlarged one itself."""
    return torch.nn.functional.interpolate(maps[None, None], scale_factor=side, mode="bilinear", align_corners=False)[
        0, 0
    ]


@pytest.mark.parametrize("backbone", FLAT)
def test_gradcam_is_what_finite_differences_give(backbone: str) -> None:
    torch.manual_seed(1)
    size = 64
    model = ImageClassifier(backbone, list("abcdefgh"), pretrained=False, image_size=size).eval().double()
    image, scores = noise(1, size), class_scores(model)
    prefix = 1 if backbone in ("test_vit", "test_vit2") else None
    # One that something speaks for.
    wanted = int(grad_cam(model, scores, image, torch.arange(8)[None])[0].amax((1, 2)).argmax())
    expected = by_finite_differences(model, lambda: scores(image)[0, wanted], prefix)
    side = int(len(expected) ** 0.5)
    large = coarse(expected.reshape(side, side), size // side)
    found = grad_cam(model, scores, image, torch.tensor([[wanted]]))[0, 0]
    assert found.shape == (size, size)
    torch.testing.assert_close(found, large / large.max(), atol=2e-3, rtol=0)


def test_gradcam_of_a_similarity_is_what_finite_differences_give(dual: DualEncoder) -> None:
    dual.double()
    image, scores = noise(1, 32), text_scores(dual, ["two dogs", "a red bicycle"])
    prefix = 1 if hasattr(image_backbone(dual).embeddings, "class_embedding") else 0
    expected = by_finite_differences(dual, lambda: scores(image)[0, 1], prefix)
    large = coarse(expected.reshape(4, 4), 8)
    found = grad_cam(dual, scores, image, torch.tensor([[1]]))[0, 0]
    torch.testing.assert_close(found, large / large.max(), atol=2e-3, rtol=0)


def test_rollout_of_clip_is_the_product_of_the_attentions_that_transformers_returns(dual: DualEncoder) -> None:
    images, backbone = noise(2, 32), cast("Any", image_backbone(dual))
    backbone.config._attn_implementation = "eager"
    outputs = backbone(pixel_values=dual.towers.normalize(images), output_attentions=True)  # type: ignore[operator]
    product = torch.eye(outputs.attentions[0].shape[-1])
    for weights in outputs.attentions:
        assert weights.shape[0] == 2
        product = (weights.mean(1) / 2 + torch.eye(weights.shape[-1]) / 2) @ product
    backbone.config._attn_implementation = "sdpa"
    with watched_attention(backbone) as watch:
        dual.image_features(images)
    assert watch.rollout is not None
    torch.testing.assert_close(watch.rollout, product, atol=1e-5, rtol=0)
    torch.testing.assert_close(watch.rollout.sum(-1), torch.ones(2, len(product[0])))
    if watch.pooling is None:
        read = product[:, 0, 1:]
    else:
        torch.testing.assert_close(watch.pooling.sum(-1), torch.ones(2))
        read = torch.einsum("bn,bnm->bm", watch.pooling, product)
    large = torch.stack([coarse(one.reshape(4, 4), 8) for one in read.detach()])
    least, most = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    torch.testing.assert_close(
        attention_rollout(dual, images)[:, 0], (large - least) / (most - least), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("backbone", ["test_vit", "test_vit2", "deit_tiny_distilled_patch16_224"])
def test_rollout_of_timm_multiplies_what_the_projections_give(backbone: str) -> None:
    torch.manual_seed(0)
    model = ImageClassifier(backbone, ["a", "b"], pretrained=False, image_size=32).eval()
    network, products = cast("Any", model.backbone), list[torch.Tensor]()

    def multiply(attention: Any, inputs: tuple[torch.Tensor, ...], _: Any) -> None:
        tokens = inputs[0]
        query, key, _ = attention.qkv(tokens).reshape(2, tokens.shape[1], 3, attention.num_heads, -1).unbind(2)
        query, key = attention.q_norm(query.transpose(1, 2)), attention.k_norm(key.transpose(1, 2))
        weights = (query @ key.transpose(-2, -1) * attention.scale).softmax(-1).mean(1)
        layer = (weights + torch.eye(weights.shape[-1])) / 2
        products.append(layer @ products[-1] if products else layer)

    handles = [block.attn.register_forward_hook(multiply) for block in network.blocks]
    with torch.no_grad(), watched_attention(network) as watch:
        model(noise(2, 32))
    for handle in handles:
        handle.remove()
    assert len(products) == len(network.blocks)
    assert watch.rollout is not None
    torch.testing.assert_close(watch.rollout, products[-1], atol=1e-5, rtol=0)
    torch.testing.assert_close(watch.rollout.sum(-1), torch.ones(watch.rollout.shape[:2]))


def test_maps_are_the_same_in_inference_mode_and_with_mixed_precision(dual: DualEncoder) -> None:
    images, classes = noise(2, 32), torch.tensor([[0], [1]])
    expected = grad_cam(dual, class_scores(dual), images, classes)
    dual._class_embeddings = None
    with torch.inference_mode():
        found = grad_cam(dual, class_scores(dual), images.clone(), classes.clone())
        with torch.autocast("cpu", torch.bfloat16):
            mixed = grad_cam(dual, class_scores(dual), images.clone(), classes.clone())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("backbone", ["test_efficientnet", "mobilevit_xxs", "test_mambaout", "test_vit3"])
def test_rollout_is_refused_where_there_is_none(backbone: str) -> None:
    model = fresh(backbone)
    check_method(model, "gradcam")
    with pytest.raises(UserError, match="use gradcam"):
        check_method(model, "rollout")
    with pytest.raises(UserError, match="use gradcam"):
        attention_rollout(model, draw_scenes(1, 0).images)


def test_gradcam_is_refused_for_a_network_whose_last_map_is_not_known() -> None:
    model = fresh("test_efficientnet")
    model.encoder.backbone = nn.Flatten()
    with pytest.raises(UserError, match="Flatten"):
        check_method(model, "gradcam")


def test_a_task_that_is_not_there_and_texts_no_model_reads_are_refused() -> None:
    model = fresh("test_efficientnet")
    with pytest.raises(UserError, match=r"'size'.*square, disc"):
        class_scores(model, "size")
    with pytest.raises(UserError, match="has no text encoder"):
        text_scores(model, ["a dog"])


def test_a_dual_encoder_without_classes_is_explained_by_texts_only(folder: Path) -> None:
    model = DualEncoder(TowerOptions(model=str(folder / "clip")), image_size=32)
    with pytest.raises(UserError, match="--text"):
        class_scores(model)
