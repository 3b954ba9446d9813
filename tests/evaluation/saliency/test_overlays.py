from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.metrics import log_loss

from evaluation.saliency import class_scores, grad_cam
from evaluation.saliency.overlays import explain_task, explain_texts, explained_figure, overlay, worst_mistakes
from evaluation.tables.per_class import NO_PREDICTION
from lightning_modules.classification import MultiTaskClassifier
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.options import TowerOptions
from tests.evaluation.saliency.networks import TASKS, Scenes, draw_scenes, fresh
from tests.support.models import TEXTS, write_clip
from vitrail.types import UNKNOWN, TaskFacts

TAGS = ("red", "blue", "round")


def test_worst_mistakes_are_those_with_the_least_probability_of_the_right_class() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(50, 4)).astype(np.float32), rng.integers(-1, 4, 50)
    rows = worst_mistakes(logits, targets, 10)
    probability = softmax(logits.astype(np.float64), axis=1)
    wrong = [row for row in range(50) if targets[row] != UNKNOWN and logits[row].argmax() != targets[row]]
    assert rows.tolist() == sorted(wrong, key=lambda row: probability[row, targets[row]])[:10]
    assert sorted(worst_mistakes(logits, targets, 1000)) == wrong
    assert not len(worst_mistakes(logits, logits.argmax(axis=1), 5))
    assert not len(worst_mistakes(logits, np.full(50, UNKNOWN), 5))


def test_explained_classes_say_what_the_model_says() -> None:
    model, scenes = fresh("test_efficientnet"), draw_scenes(6, 1)
    with torch.no_grad():
        logits = model(scenes.images)["disc"]
    targets = [UNKNOWN, *(1 - logits.argmax(1)[1:3]).tolist(), *logits.argmax(1)[3:].tolist()]
    explained = explain_task(model, "disc", scenes.images, [f"image {row}" for row in range(6)], targets)
    for row, one in enumerate(explained):
        chosen = int(logits[row].argmax())
        assert one.name == f"image {row}"
        assert one.predicted == TASKS["disc"][chosen]
        assert one.confidence == pytest.approx(float(logits[row].softmax(0).max()), abs=1e-5)
        np.testing.assert_array_equal(one.image, scenes.images[row].permute(1, 2, 0).numpy())
        is_mistake = row in (1, 2)
        assert len(one.heats) == (2 if is_mistake else 1)
        assert one.target == ("" if row == 0 else TASKS["disc"][targets[row]])
        assert one.heats[0].caption.startswith(f"predicted\n{one.predicted} {one.confidence:.2f}")
        if is_mistake:
            assert one.heats[1].caption.startswith(f"right\n{one.target} {1 - one.confidence:.2f}")
    expected = grad_cam(model, class_scores(model, "disc"), scenes.images[1:2], torch.tensor([[targets[1]]]))
    np.testing.assert_allclose(explained[1].heats[1].values, expected[0, 0].numpy(), atol=1e-5)


def kinds() -> tuple[MultiTaskClassifier, Scenes]:
    """A model of tags and a price with random weights, and images."""
    torch.manual_seed(0)
    tasks: dict[str, list[str]] = {"tags": list(TAGS), "price": []}
    model = MultiTaskClassifier(
        "test_efficientnet",
        tasks,
        task_facts=TaskFacts({"tags": "multi_label", "price": "regression"}, target_stats={"price": [20.0, 4.0]}),
        pretrained=False,
        image_size=128,
    )
    model.thresholds["tags"] = [0.01, 0.99, 0.5]
    return model.eval(), draw_scenes(4, 1)


def test_worst_labels_and_numbers_have_the_highest_loss() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(40, 3)).astype(np.float32), rng.integers(-1, 2, (40, 3)).astype(np.int8)
    thresholds, known = [0.3, 0.5, 0.7], targets != UNKNOWN
    rows = worst_mistakes(logits, targets, 40, "multi_label", thresholds)
    wrong = [row for row in range(40) if (known[row] & ((expit(logits[row]) >= thresholds) != targets[row])).any()]
    losses = [
        log_loss(targets[row][known[row]], expit(logits[row].astype(float))[known[row]], labels=[0, 1]) for row in wrong
    ]
    assert rows.tolist() == [wrong[place] for place in np.argsort(np.negative(losses), kind="stable")]
    values, numbers = np.array([[1.0], [5.0], [2.0], [9.0]], np.float32), np.array([1.0, 3.0, np.nan, 10.0])
    assert worst_mistakes(values, numbers, 9, "regression").tolist() == [1, 3]


def test_labels_are_explained_by_the_most_probable_one_and_the_worst_mistake() -> None:
    model, scenes = kinds()
    with torch.no_grad():
        probability = model(scenes.images)["tags"].sigmoid().numpy()
    # At these thresholds red is predicted, blue never; "round" is not known.
    targets = np.array([[1, 0, -1], [0, 0, -1], [1, 1, -1], [-1, -1, -1]], np.int8)
    explained = explain_task(model, "tags", scenes.images, list("abcd"), targets)
    expected: list[dict[str, int]] = [{}, {"wrongly predicted": 0}, {"missed": 1}, {}]
    for row, (one, mistake) in enumerate(zip(explained, expected, strict=True)):
        first = int(probability[row].argmax())
        roles = {"most probable": first} | mistake if first not in mistake.values() else mistake
        names = [f"{role}\n{TAGS[index]} {probability[row, index]:.2f}" for role, index in roles.items()]
        assert [heat.caption.removesuffix(" (nothing contributes to it)") for heat in one.heats] == names
        marked = [
            name for name in np.argsort(-probability[row]) if probability[row, name] >= model.thresholds["tags"][name]
        ]
        assert one.predicted == ";".join(TAGS[index] for index in marked)
        wanted = torch.tensor([list(roles.values())])
        maps = grad_cam(model, class_scores(model, "tags"), scenes.images[row : row + 1], wanted)[0]
        np.testing.assert_allclose([heat.values for heat in one.heats], maps.numpy(), atol=1e-5)
    assert [one.target for one in explained] == ["red", NO_PREDICTION, "red;blue", ""]
    [asked] = explain_task(model, "tags", scenes.images[:1], ["a"], shown=2)
    assert [heat.caption.split("\n")[0] for heat in asked.heats] == ["asked for"]


def test_a_number_is_explained_by_what_raises_and_what_lowers_it() -> None:
    model, scenes = kinds()
    with torch.no_grad():
        values = model(scenes.images)["price"][:, 0]
    targets = [21.5, float("nan"), 20.0, 19.0]
    for row, one in enumerate(explain_task(model, "price", scenes.images, list("abcd"), targets)):
        assert one.predicted == f"{values[row]:.6g}"
        assert np.isnan(one.confidence)
        assert one.target == ("" if row == 1 else f"{targets[row]:g}")
        assert [heat.caption.split("\n")[0] for heat in one.heats] == [
            "what raises the predicted",
            "what lowers the predicted",
        ]
        raising, lowering = (heat.values for heat in one.heats)
        expected = grad_cam(
            model, lambda image: model(image)["price"], scenes.images[row : row + 1], torch.tensor([[0]])
        )
        np.testing.assert_allclose(raising, expected[0, 0].numpy(), atol=1e-5)
        expected = grad_cam(
            model, lambda image: -model(image)["price"], scenes.images[row : row + 1], torch.tensor([[0]])
        )
        np.testing.assert_allclose(lowering, expected[0, 0].numpy(), atol=1e-5)
    [asked] = explain_task(model, "price", scenes.images[:1], ["a"], shown=1)
    assert [heat.caption.split("\n")[0] for heat in asked.heats] == ["what lowers the predicted"]


def test_a_class_can_be_asked_for_and_rollout_has_one_map() -> None:
    model, scenes = fresh("test_vit"), draw_scenes(2, 1)
    targets = scenes.targets["square"].tolist()
    for one in explain_task(model, "square", scenes.images, ["a", "b"], targets, shown=1):
        assert one.heats[0].caption.startswith("asked for\nblue ")
    for one in explain_task(model, "square", scenes.images, ["a", "b"], targets, method="rollout"):
        assert [heat.caption for heat in one.heats] == ["attention rollout"]
    assert explain_task(model, "square", scenes.images[:0], [], []) == []


def test_a_class_that_nothing_speaks_for_is_said_to_be_so() -> None:
    model = fresh("test_efficientnet")
    with torch.no_grad():
        cast("Any", model.heads[0])[-1].weight.zero_()
    [one] = explain_task(model, "square", draw_scenes(1, 0).images, ["a"], [UNKNOWN])
    assert one.heats[0].caption.endswith("(nothing contributes to it)")


def test_texts_and_zero_shot_classes_of_a_dual_encoder(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    prompts = [[TEXTS[0]], [TEXTS[1], TEXTS[2]]]
    model = DualEncoder(TowerOptions(model=str(tmp_path / "clip")), ["rose", "tulip"], prompts, image_size=32)
    model.load_pretrained()
    model.eval()
    images = draw_scenes(3, 2).images[..., ::4, ::4]
    with torch.no_grad():
        embedded, texts = model.encode_image(images), model.encode_text(list(TEXTS[:2]))
        scale = model.objective.logit_scale()[0]
        probability = (scale * embedded @ model.class_embeddings().T).softmax(1)
    for row, one in enumerate(explain_texts(model, list(TEXTS[:2]), images, ["a", "b", "c"])):
        for heat, text, vector in zip(one.heats, TEXTS, texts, strict=False):
            assert heat.caption.startswith(f"“{text}” {float(embedded[row] @ vector):.2f}")
    for row, one in enumerate(explain_task(model, "class", images, ["a", "b", "c"], [UNKNOWN] * 3)):
        assert one.confidence == pytest.approx(float(probability[row].max()), abs=1e-5)


def test_an_overlay_leaves_the_image_where_the_map_is_empty() -> None:
    image = draw_scenes(1, 0).images[0].permute(1, 2, 0).numpy()
    heat = np.zeros((128, 128), np.float32)
    heat[:64] = 1
    mixed = overlay(image, heat)
    np.testing.assert_array_equal(mixed[64:], image[64:])
    assert (np.abs(mixed[:64].astype(int) - image[:64]).max(axis=2) > 20).mean() > 0.9


def test_a_figure_has_a_panel_for_each_image_and_map() -> None:
    model, scenes = fresh("test_efficientnet"), draw_scenes(3, 1)
    with torch.no_grad():
        wrong = (1 - model(scenes.images)["disc"].argmax(1)).tolist()
    explained = explain_task(model, "disc", scenes.images, ["a", "b", "c"], wrong)
    drawn = [axes for axes in explained_figure(explained, columns=2).axes if axes.images]
    assert len(drawn) == 9
    assert [axes.get_title() for axes in drawn[:2]] == [f"a\nis {explained[0].target}", explained[0].heats[0].caption]
