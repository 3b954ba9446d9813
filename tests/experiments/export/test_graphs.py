from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from experiments.export.graphs import graph_of, towers_of
from lightning_modules.base import VisionTask
from lightning_modules.classification import MultiTaskClassifier
from lightning_modules.encoders.tokenizer import trained_tokenizer
from tests.support.models import PROMPTS, SIZE, TEXTS, make_batch, pair_batch, tiny_multitask, tiny_pair
from vitrail.errors import UserError


def ready_classifier() -> MultiTaskClassifier:
    """A classifier of images of the size that its checkpoint would record."""
    task = tiny_multitask().eval()
    task.input_options = {**task.input_options, "size": SIZE}
    return task


def ready_pair(folder: Path, **changes: Any) -> Any:
    """A dual encoder that could go on without training."""
    task = tiny_pair(folder, **changes)
    texts = [*TEXTS, *(prompt for prompts in PROMPTS for prompt in prompts)]
    task.towers.tokenizer = trained_tokenizer(texts, 400, 20, fixed_length=False)
    return task.eval()


def perturbed_adapters(task: nn.Module) -> None:
    """Adapters begin as zero, so that a mistake in merging would not show."""
    generator = torch.Generator().manual_seed(0)
    for name, value in task.named_parameters():
        if ".lora_B." in name:
            value.data.normal_(0, 0.2, generator=generator)


def test_a_classifiers_graph_outputs_what_its_steps_output_for_any_batch() -> None:
    task = ready_classifier()
    [tower] = towers_of(task)
    assert (tower.name, tower.outputs) == ("model", ["logits_class", "logits_type", "image_embedding"])
    module = graph_of(tower).module()
    for ids in ([1], [1, 2, 3], [4, 5]):
        batch = make_batch(ids)
        with torch.no_grad():
            own = task.predict_step(batch, 0)
            found = dict(zip(tower.outputs, module(batch["image"]), strict=True))
        torch.testing.assert_close(found["logits_class"], own["logits"]["class"])
        torch.testing.assert_close(found["logits_type"], own["logits"]["type"])
        torch.testing.assert_close(found["image_embedding"], own["image_embedding"])


@torch.no_grad()
def test_cocoop_runs_as_a_module_and_is_no_graph(tmp_path: Path) -> None:
    task = ready_pair(tmp_path, few_shot={"method": "cocoop"})
    for parameter in task.few_shot.parameters():
        parameter.normal_(0, 0.1)
    image, _ = towers_of(task)
    batch = pair_batch([1, 2, 3])
    logits, _ = image.module(batch["image"])
    torch.testing.assert_close(logits, task.predict_step(batch, 0)["logits"]["class"])
    assert logits.std(dim=1).min() > 0
    with pytest.raises(UserError, match=r"cocoop encodes texts for each image.*choose --format safetensors"):
        graph_of(image)


def test_each_tower_holds_its_own_weights_only_and_adapters_are_merged(tmp_path: Path) -> None:
    task = ready_pair(tmp_path, lora={"rank": 2})
    perturbed_adapters(task)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    image, text = towers_of(task)
    batch = pair_batch([1, 2, 3])
    with torch.no_grad():
        own = task.predict_step(batch, 0)
        images = graph_of(image)
        logits, embedding = images.module()(batch["image"])
    torch.testing.assert_close(logits, own["logits"]["class"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(embedding, own["image_embedding"], atol=1e-5, rtol=1e-4)
    assert not [name for name in images.state_dict if "text" in name or "lora" in name]
    texts = graph_of(text)
    assert not [name for name in texts.state_dict if "vision" in name or "lora" in name]
    for some in (["a rose"], ["a photo of a tulip.", "x", "a much longer text than the others"]):
        tokens = task.towers.tokenizer(some)
        with torch.no_grad():
            [found] = texts.module()(tokens["input_ids"], tokens["attention_mask"])
            torch.testing.assert_close(found, task.encode_text(some), atol=1e-5, rtol=1e-4)
    # The task itself is as it was: its safetensors are to hold adapters apart.
    for name, value in task.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_other_tasks_are_refused() -> None:
    class Other:
        pass

    with pytest.raises(UserError, match="Other is not made of single graphs"):
        towers_of(cast("VisionTask", Other()))


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    task = ready_classifier()
    [tower] = towers_of(task)

    class Branching(nn.Module):
        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found: tuple[torch.Tensor, ...] = tower.module(image)
            return found if float(found[0].sum()) > 0 else found[::-1]

    broken = type(tower)("model", Branching(), tower.inputs, tower.dynamic, tower.outputs)
    with pytest.raises(UserError, match="--format safetensors"):
        graph_of(broken)
