from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from datamodules.schema import UserError
from evaluation import saliency
from evaluation.saliency import (
    attention_rollout,
    check_method,
    class_scores,
    grad_cam,
    image_backbone,
    score_pictures,
    text_scores,
)
from evaluation.saliency_layers import map_layer, watched_attention
from lightning_modules.classifier import ImageClassifier
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.multitask import MultiTaskClassifier
from tests.evaluation.saliency_networks import TASKS, Scenes, draw_scenes, fresh, trained
from tests.fakes_models import TEXTS, write_clip, write_siglip

CHANCE = 1 / 16
"""Share of a picture that one cell is."""

FLAT = ("test_resnet", "test_efficientnet", "test_mambaout", "test_vit", "test_vit2")
"""Convolutional, the same with a further layer in its head, channels last, ViT with class token, ViT that averages."""


@pytest.fixture(scope="module")
def convolutional() -> MultiTaskClassifier:
    return trained("test_efficientnet", 90, 3e-3)


@pytest.fixture(scope="module")
def transformer() -> MultiTaskClassifier:
    return trained("test_vit2", 90, 1e-3)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(32, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_clip(root / "clip")
    write_siglip(root / "siglip")
    return root


@pytest.fixture(params=["clip", "siglip"])
def dual(folder: Path, request: pytest.FixtureRequest) -> DualEncoder:
    task = DualEncoder(
        {"model": str(folder / request.param)}, ["rose", "tulip"], [[TEXTS[0]], [TEXTS[1]]], image_size=32
    )
    task.load_pretrained()
    return task.eval()


def noise(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def by_finite_differences(model: nn.Module, score: Callable[[], torch.Tensor], prefix: int | None) -> torch.Tensor:
    """Grad-CAM's map before it is scaled, for one picture: each channel's weight from moving it up and down everywhere.

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
    model = ImageClassifier(backbone, list("abcdefgh"), image_size=size).eval().double()
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


@pytest.mark.parametrize("backbone", ["test_resnet", "mobilevit_xxs"])
def test_gradcam_of_a_pooled_linear_head_is_the_class_activation_map(backbone: str) -> None:
    # Zhou et al., 2016: the head's weights on the last feature map.
    torch.manual_seed(0)
    model = ImageClassifier(backbone, ["a", "b", "c"], image_size=128).eval()
    image = noise(1, 128)
    features = cast("Any", model.backbone).forward_features(model.encoder.normalize(image))[0]
    expected = coarse(torch.einsum("chw,c->hw", features, model.head.weight[1]).relu().detach(), 32)
    found = grad_cam(model, class_scores(model), image, torch.tensor([[1]]))[0, 0]
    torch.testing.assert_close(found, expected / expected.max(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("network", ["convolutional", "transformer"])
def test_maps_of_a_trained_network_lie_on_the_object_that_its_task_is_about(
    network: str, scenes: Scenes, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(network)
    for task, other in (("square", "disc"), ("disc", "square")):
        scores = class_scores(model, task)
        assert (score_pictures(model, scores, scenes.images).argmax(1) == scenes.targets[task]).float().mean() > 0.9
        maps = grad_cam(model, scores, scenes.images, scenes.targets[task][:, None])[:, 0]
        assert float(share(maps, scenes.inside[task])) > 3 * CHANCE
        assert float(share(maps, scenes.inside[task])) > 1.5 * float(share(maps, scenes.inside[other]))


def share(maps: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Mean share of the maps' mass that is inside."""
    return ((maps * inside).sum((1, 2)) / maps.sum((1, 2)).clamp(min=1e-9)).mean()


def test_maps_depend_on_the_weights(
    convolutional: MultiTaskClassifier, transformer: MultiTaskClassifier, scenes: Scenes
) -> None:
    # Adebayo et al., 2018: a map that random weights give as well explains the picture, not the model.
    for model, backbone in ((convolutional, "test_efficientnet"), (transformer, "test_vit2")):
        random = fresh(backbone, 5)
        for task in TASKS:
            learned, same, other = (
                grad_cam(one, class_scores(one, task), scenes.images, scenes.targets[task][:, None])[:, 0]
                for one in (model, model, random)
            )
            assert rank_correlation(learned, same) == pytest.approx(1)
            assert abs(rank_correlation(learned, other)) < 0.5
    learned, other = (attention_rollout(one, scenes.images)[:, 0] for one in (transformer, fresh("test_vit2", 5)))
    assert abs(rank_correlation(learned, other)) < 0.5


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean over the pictures in which both have a map."""
    pairs = [(a[::8, ::8].ravel(), b[::8, ::8].ravel()) for a, b in zip(first, second, strict=True)]
    found = [float(spearmanr(a, b)[0]) for a, b in pairs if a.any() and b.any()]
    assert len(found) > len(pairs) / 2
    return sum(found) / len(found)


def test_rollout_of_clip_is_the_product_of_the_attentions_that_transformers_puts_out(dual: DualEncoder) -> None:
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
    model = ImageClassifier(backbone, ["a", "b"], image_size=32).eval()
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


def state(model: nn.Module) -> dict[str, Any]:
    """All that an explanation might leave behind."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "learnable": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "fused": [getattr(module, "fused_attn", None) for module in model.modules()],
        "hooks": hooks,
        "random": torch.get_rng_state(),
    }


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    tensors = [*zip(first["values"].values(), second["values"].values(), strict=True)]
    tensors += [(first["random"], second["random"])]
    for before, after in zip(first["gradients"], second["gradients"], strict=True):
        if (before is None) != (after is None):
            return False
        tensors += [] if before is None else [(before, after)]
    kept = all(first[key] == second[key] for key in ("modes", "learnable", "fused", "hooks"))
    return kept and all(torch.equal(before, after) for before, after in tensors)


@pytest.mark.parametrize("backbone", ["test_efficientnet", "test_vit"])
def test_the_model_is_left_as_it_was(backbone: str) -> None:
    model = fresh(backbone).train()
    images = draw_scenes(4, 0).images
    model(images)["disc"].sum().backward()
    model.freeze_backbone()
    before = state(model)
    grad_cam(model, class_scores(model, "disc"), images, torch.zeros(4, 1, dtype=torch.int64))
    assert same(before, state(model))
    if backbone == "test_vit":
        assert {True, None} == set(before["fused"])
        attention_rollout(model, images)
        assert same(before, state(model))


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = fresh("test_vit").train()
    with torch.no_grad():
        cast("Any", model.heads[0])[-1].bias.fill_(torch.nan)
    before = [state(model)[key] for key in ("modes", "learnable", "hooks")]
    with pytest.raises(UserError, match="not finite"):
        grad_cam(model, class_scores(model), draw_scenes(2, 0).images, torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(UserError, match="not finite"):
        score_pictures(model, class_scores(model), draw_scenes(2, 0).images)
    assert before == [state(model)[key] for key in ("modes", "learnable", "hooks")]


def test_few_pictures_go_through_the_network_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = fresh("test_vit"), draw_scenes(7, 3).images
    classes = torch.arange(7)[:, None] % 2
    together = grad_cam(model, class_scores(model), images, classes), attention_rollout(model, images)
    monkeypatch.setattr(saliency, "AT_A_TIME", 3)
    seen: list[int] = []
    with image_backbone(model).register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]))):
        apart = grad_cam(model, class_scores(model), images, classes), attention_rollout(model, images)
    assert seen == [3, 3, 1] * 2
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_several_maps_of_a_picture_are_those_of_each_class_alone() -> None:
    model, images = fresh("test_efficientnet"), draw_scenes(2, 3).images
    scores = class_scores(model, "disc")
    both = grad_cam(model, scores, images, torch.tensor([[0, 1], [1, 0]]))
    first = grad_cam(model, scores, images, torch.tensor([[0], [0]]))
    torch.testing.assert_close(both[0, 0], first[0, 0])
    torch.testing.assert_close(both[1, 1], first[1, 0])


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


def test_a_compiled_network_is_explained_like_any_other() -> None:
    model, images, classes = fresh("test_efficientnet"), draw_scenes(2, 3).images, torch.zeros(2, 1, dtype=torch.int64)
    expected = grad_cam(model, class_scores(model), images, classes)
    model.backbone.compile(backend="eager")
    with torch.no_grad():
        model(images)
    torch.testing.assert_close(grad_cam(model, class_scores(model), images, classes), expected)


def test_a_class_that_nothing_speaks_for_has_an_empty_map() -> None:
    model = fresh("test_efficientnet")
    with torch.no_grad():
        cast("Any", model.heads[0])[-1].weight.zero_()
    maps = grad_cam(
        model, class_scores(model, "square"), draw_scenes(2, 0).images, torch.zeros(2, 1, dtype=torch.int64)
    )
    assert not maps.any()


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


def test_a_task_that_is_not_there_and_texts_nobody_reads_are_refused() -> None:
    model = fresh("test_efficientnet")
    with pytest.raises(UserError, match=r"'size'.*square, disc"):
        class_scores(model, "size")
    with pytest.raises(UserError, match="reads no texts"):
        text_scores(model, ["a dog"])


def test_a_dual_encoder_without_classes_is_explained_by_texts_only(folder: Path) -> None:
    model = DualEncoder({"model": str(folder / "clip")}, image_size=32)
    with pytest.raises(UserError, match="--text"):
        class_scores(model)
