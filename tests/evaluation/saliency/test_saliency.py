"""Tests of what maps say of trained networks, that nothing else changes them, and that they leave nothing behind."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from evaluation import saliency
from evaluation.saliency import attention_rollout, class_scores, grad_cam, image_backbone, score_images
from lightning_modules.classification import MultiTaskClassifier
from tests.evaluation.saliency.networks import TASKS, Scenes, draw_scenes, fresh, trained
from vitrail.errors import UserError

CHANCE = 1 / 16
"""Share of an image that one cell is."""


@pytest.fixture(scope="module")
def convolutional() -> MultiTaskClassifier:
    return trained("test_efficientnet", 90, 3e-3)


@pytest.fixture(scope="module")
def transformer() -> MultiTaskClassifier:
    return trained("test_vit2", 90, 1e-3)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(32, 7)


@pytest.mark.parametrize("network", ["convolutional", pytest.param("transformer", marks=pytest.mark.slow)])
def test_maps_of_a_trained_network_lie_on_the_object_that_its_task_is_about(
    network: str, scenes: Scenes, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(network)
    for task, other in (("square", "disc"), ("disc", "square")):
        scores = class_scores(model, task)
        assert (score_images(model, scores, scenes.images).argmax(1) == scenes.targets[task]).float().mean() > 0.9
        maps = grad_cam(model, scores, scenes.images, scenes.targets[task][:, None])[:, 0]
        assert float(share(maps, scenes.inside[task])) > 3 * CHANCE
        assert float(share(maps, scenes.inside[task])) > 1.5 * float(share(maps, scenes.inside[other]))


def share(maps: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Mean share of the maps' mass that is inside."""
    return ((maps * inside).sum((1, 2)) / maps.sum((1, 2)).clamp(min=1e-9)).mean()


@pytest.mark.parametrize("network", ["convolutional", pytest.param("transformer", marks=pytest.mark.slow)])
def test_maps_depend_on_the_weights(network: str, scenes: Scenes, request: pytest.FixtureRequest) -> None:
    # Adebayo et al., 2018: a map that random weights give as well explains the image, not the model.
    model = request.getfixturevalue(network)
    random = fresh("test_efficientnet" if network == "convolutional" else "test_vit2", 5)
    for task in TASKS:
        learned, same, other = (
            grad_cam(one, class_scores(one, task), scenes.images, scenes.targets[task][:, None])[:, 0]
            for one in (model, model, random)
        )
        assert rank_correlation(learned, same) == pytest.approx(1)
        assert abs(rank_correlation(learned, other)) < 0.5
    if network == "transformer":
        learned, other = (attention_rollout(one, scenes.images)[:, 0] for one in (model, random))
        assert abs(rank_correlation(learned, other)) < 0.5


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean over the images in which both have a map."""
    pairs = [(a[::8, ::8].ravel(), b[::8, ::8].ravel()) for a, b in zip(first, second, strict=True)]
    found = [float(spearmanr(a, b)[0]) for a, b in pairs if a.any() and b.any()]
    assert len(found) > len(pairs) / 2
    return sum(found) / len(found)


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
        score_images(model, class_scores(model), draw_scenes(2, 0).images)
    assert before == [state(model)[key] for key in ("modes", "learnable", "hooks")]


def test_few_images_go_through_the_network_together(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_several_maps_of_a_image_are_those_of_each_class_alone() -> None:
    model, images = fresh("test_efficientnet"), draw_scenes(2, 3).images
    scores = class_scores(model, "disc")
    both = grad_cam(model, scores, images, torch.tensor([[0, 1], [1, 0]]))
    first = grad_cam(model, scores, images, torch.tensor([[0], [0]]))
    torch.testing.assert_close(both[0, 0], first[0, 0])
    torch.testing.assert_close(both[1, 1], first[1, 0])


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
