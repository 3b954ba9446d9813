from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_modules.classification import MultiTaskClassifier
from tests.lightning_modules.tiny import TASKS, make_batch, tiny_multitask
from vitrail.errors import UserError

SIZES = {"class": 10, "colour": 15, "material": 9, "condition": 4, "size": 3, "style": 6}
REFERENCE_WEIGHTS = {"class": 1.0, "colour": 0.5, "material": 0.5, "condition": 0.5}


@pytest.mark.parametrize(("backbone", "count"), [("deit_tiny_patch16_224", 5_602_214), ("mobilevit_xxs", 1_162_582)])
def test_the_reference_models_have_the_parameters_of_the_reference(backbone: str, count: int) -> None:
    tasks = {task: [str(i) for i in range(size)] for task, size in SIZES.items()}
    task = MultiTaskClassifier(backbone, tasks, pretrained=False, task_weights=REFERENCE_WEIGHTS)
    assert sum(parameter.numel() for parameter in task.parameters()) == count
    assert list(task.tasks) == ["class", "colour", "material", "condition"]


def test_a_head_is_that_of_the_reference() -> None:
    task = tiny_multitask()
    layers: Any = task.heads[0]
    assert [type(layer) for layer in layers] == [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    width = task.encoder.num_features
    assert [layers[0].in_features, layers[0].out_features, layers[3].out_features] == [width, width // 2, 4]
    assert (task.drop.p, layers[2].p) == (0.1, 0.2)


def test_logits_have_the_size_of_each_task() -> None:
    logits = tiny_multitask()(make_batch([0, 1, 2])["image"])
    assert {task: tuple(values.shape) for task, values in logits.items()} == {"class": (3, 4), "type": (3, 2)}


def test_the_loss_is_the_weighted_sum_of_the_tasks() -> None:
    batch = make_batch(list(range(8)))

    def loss(weights: dict[str, float] | None) -> torch.Tensor:
        torch.manual_seed(0)
        task = tiny_multitask(task_weights=weights).eval()
        return task._shared_step(batch, "train")[0]

    single = loss({"class": 1.0, "type": 1.0})
    torch.testing.assert_close(loss(None), single)
    parts = [loss({"class": 1.0, "type": 1e-9}), loss({"class": 1e-9, "type": 1.0})]
    torch.testing.assert_close(single, parts[0] + parts[1])
    torch.testing.assert_close(loss({"class": 1.0, "type": 0.5}), parts[0] + 0.5 * parts[1])


def test_only_tasks_that_are_named_are_learned() -> None:
    task = tiny_multitask(task_weights={"type": 2.0})
    assert task.tasks == {"type": TASKS["type"]}
    assert list(task(make_batch([0, 1])["image"])) == ["type"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_weights": {"class": 1.0, "weight": 1.0}}, "no weight; they have class, type"),
        ({"task_weights": {}}, "task_weights"),
        ({"task_weights": {"class": 0.0}}, "above 0"),
        ({"tasks": None}, "there are none"),
        ({"tasks": {"class": ["a"]}}, "fewer than two classes"),
    ],
)
def test_tasks_that_do_not_fit_are_user_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_multitask(**changes)
