"""Training losses of several processes and accumulated batches: the gradient is that of the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes
from torch.utils.data import DataLoader

from lightning_modules.classification import ImageClassifier, MultiTaskClassifier
from lightning_modules.options import LossOptions
from tests.support.models import Recorder, TinyData, make_batch, tiny_trainer
from vitrail.types import UNKNOWN, TaskFacts, TaskKind

KINDS: dict[str, TaskKind] = {"tags": "multi_label", "grade": "ordinal", "price": "regression"}
TASKS = {"class": ["a", "b", "c"], "tags": ["a", "b", "c"], "grade": ["a", "b", "c"], "price": []}
FACTS = TaskFacts(KINDS, {"class": [9, 3, 1], "grade": [2, 5, 9]}, {"price": [0.0, 1.0]})
FIRST = 6
"""Samples of the first process; those of the second one have few known targets, and no price."""
OPTIONS = {
    "plain": LossOptions(),
    "uncertainty": LossOptions(balance="uncertainty", class_weighting="inverse"),
    "others": LossOptions("focal", "focal", "cumulative_link", "gaussian_nll", class_weighting="inverse"),
    "asymmetric": LossOptions("bce", "asymmetric", regression="huber", class_weighting="inverse"),
}


def model_of(name: str) -> MultiTaskClassifier:
    torch.manual_seed(0)
    model = MultiTaskClassifier(
        "test_resnet",
        TASKS,
        task_facts=FACTS,
        image_size=32,
        pretrained=False,
        loss_options=OPTIONS[name],
        task_weights={"class": 1.0, "tags": 2.0, "grade": 0.5, "price": 1.0},
    )
    if model.log_variances is not None:
        torch.nn.init.normal_(model.log_variances)
    return model.eval()


def samples() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Features and targets of twice six samples."""
    generator = torch.Generator().manual_seed(0)
    classes, grades = torch.randint(0, 3, (2, 2 * FIRST), generator=generator)
    tags = torch.randint(-1, 2, (2 * FIRST, 3), generator=generator).to(torch.int8)
    prices = torch.randn(2 * FIRST, generator=generator)
    classes[FIRST + 1 :] = grades[FIRST + 2 :] = tags[FIRST + 1 :] = UNKNOWN
    prices[FIRST:] = torch.nan
    features = torch.randn(2 * FIRST, model_of("plain").encoder.num_features, generator=generator)
    return features, {"class": classes, "tags": tags, "grade": grades, "price": prices}


def gradients(name: str, rows: slice) -> dict[str, torch.Tensor]:
    """Gradients of heads, outputs and noises from the training loss of some of the samples."""
    model, (features, targets) = model_of(name), samples()
    logits = model.classify(features[rows])
    losses = {task: output.loss(logits[task], targets[task][rows]) for task, output in model._outputs.items()}
    model.training_loss(losses).backward()  # type: ignore[no-untyped-call]  # torch's
    return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}


def _half(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = slice(FIRST, 2 * FIRST) if rank else slice(0, FIRST)
    found = {}
    for name in OPTIONS:
        own = gradients(name, rows)
        for gradient in own.values():
            dist.all_reduce(gradient)
            gradient.div_(2)
        found[name] = own
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_the_gradient_of_processes_with_unequal_masks_is_that_of_the_joined_batch(tmp_path: Path) -> None:
    method = "spawn" if torch.accelerator.is_available() else "fork"
    start_processes(_half, args=(str(tmp_path),), nprocs=2, start_method=method)  # type: ignore[no-untyped-call]
    for rank in range(2):
        found: dict[str, Any] = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name in OPTIONS:
            expected = gradients(name, slice(0, 2 * FIRST))
            assert found[name].keys() == expected.keys()
            assert all(gradient.isfinite().all() for gradient in found[name].values())
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


def accumulated(folder: Path, batches: list[list[int]], accumulate: int) -> list[torch.Tensor]:
    """Gradients of the steps of an epoch of a single task with class weights, where samples above 3 are unknown."""

    class Data(TinyData):
        def train_dataloader(self) -> DataLoader[Any]:
            made = [make_batch(ids) for ids in batches]
            for batch in made:
                batch["label"] = torch.where(batch["sample_id"] > 3, UNKNOWN, batch["label"])
            return self._loader(made)

    torch.manual_seed(0)
    facts = TaskFacts({}, {"class": [9, 3, 1, 1]})
    model = ImageClassifier(
        "test_resnet",
        ["a", "b", "c", "d"],
        task_facts=facts,
        image_size=32,
        pretrained=False,
        loss_options=LossOptions(class_weighting="inverse"),
        lr=0.0,
        weight_decay=0.0,
    )
    model.fix_batchnorm()
    trainer = tiny_trainer(
        folder, accumulate_grad_batches=accumulate, limit_val_batches=0, callbacks=[recorder := Recorder()]
    )
    trainer.fit(model, Data())
    return [torch.cat([gradient.flatten() for gradient in step.values()]) for step in recorder.gradients]


@pytest.mark.parametrize("batches", [[[0, 1, 2, 3], [1, 7, 5, 6]], [[4, 5, 6, 7], [0, 1, 2, 4]]], ids=str)
def test_accumulated_batches_of_a_single_task_weigh_by_their_known_targets(
    tmp_path: Path, batches: list[list[int]]
) -> None:
    [found], [expected] = accumulated(tmp_path, batches, 2), accumulated(tmp_path, [[*batches[0], *batches[1]]], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_step_without_any_known_target_has_no_gradient(tmp_path: Path) -> None:
    [found] = accumulated(tmp_path, [[4, 5], [6, 7]], 2)
    assert not found.any()
