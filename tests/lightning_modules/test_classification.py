from __future__ import annotations

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from lightning_modules.classification import (
    ImageClassifier,
    MultiTaskClassifier,
)
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.generative import GenerativeClassifier
from lightning_modules.heads import SingleLabelOutput
from lightning_modules.heads.single_label import class_weights_from_counts, masked_cross_entropy
from lightning_modules.options import ClassWeighting, LossOptions, OptimOptions
from tests.support.models import (
    SIZE,
    TASKS,
    Recorder,
    TinyData,
    make_batch,
    seeded_multitask,
    tiny_classifier,
    tiny_multitask,
    tiny_trainer,
)
from vitrail.errors import UserError
from vitrail.types import UNKNOWN, Mix, TaskFacts


def test_logged_values_are_over_samples_and_padding_is_not_one(tmp_path: Path) -> None:
    recorder, task = (
        Recorder(),
        seeded_multitask(task_weights={"class": 1.0, "type": 0.5}, loss_options=LossOptions(label_smoothing=0.1)),
    )
    trainer = tiny_trainer(tmp_path, callbacks=[recorder])
    trainer.fit(task, TinyData())
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    ids = torch.cat([outputs["sample_id"] for outputs in recorder.outputs])
    assert ids.tolist() == [20, 21, 22, 23, 24, 25, 26]
    losses = {}
    for task_name in TASKS:
        logits = torch.cat([outputs["logits"][task_name] for outputs in recorder.outputs])
        targets = torch.cat([outputs["targets"][task_name] for outputs in recorder.outputs])
        known = targets != UNKNOWN
        assert known.sum() == (7 if task_name == "class" else 5)
        losses[task_name] = float(F.cross_entropy(logits[known], targets[known]))
        assert logged[f"val/{task_name}/loss"] == pytest.approx(losses[task_name], rel=1e-5)
        accuracy = float((logits[known].argmax(1) == targets[known]).float().mean())
        assert logged[f"val/{task_name}/accuracy"] == pytest.approx(accuracy)
    assert logged["val/loss"] == pytest.approx(losses["class"] + 0.5 * losses["type"], rel=1e-5)
    expected = {"val/class/top3", "val/class/f1_macro", "val/class/f1_weighted", "val/type/f1_macro", "train/loss"}
    assert expected | {"train/class/loss", "train/type/loss"} <= logged.keys()
    assert not {"val/class/top5", "val/type/top3", "train/class/accuracy"} & logged.keys()


def test_the_training_loss_of_an_epoch_is_over_samples_too(tmp_path: Path) -> None:
    task = seeded_multitask(lr=0.0)
    task.eval()  # without dropout the losses can be computed again
    trainer = tiny_trainer(tmp_path, limit_val_batches=0)
    trainer.fit(task, TinyData())
    batch = make_batch(list(range(10)))
    with torch.no_grad():
        loss, _ = task._shared_step(batch, "train")
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(loss), rel=1e-5)


def test_testing_and_predicting_give_outputs_of_the_same_shape(tmp_path: Path) -> None:
    task, trainer = seeded_multitask(), tiny_trainer(tmp_path)
    [metrics] = trainer.test(task, TinyData(), verbose=False)
    assert "test/class/f1_macro" in metrics
    batches: Any = trainer.predict(task, TinyData())
    assert [len(outputs["sample_id"]) for outputs in batches] == [4, 3]
    last = batches[-1]
    assert last["logits"]["class"].shape == (3, 4)
    assert last["logits"]["type"].dtype == torch.float32
    assert last["targets"]["type"].tolist() == [UNKNOWN, 1, 0]
    batch = make_batch([0, 1])
    del batch["label"]
    assert task.eval().predict_step(batch, 0)["targets"]["class"].tolist() == [UNKNOWN, UNKNOWN]


def test_a_batch_without_any_known_target_of_a_task_leaves_its_head_alone() -> None:
    task, batch = seeded_multitask(loss_options=LossOptions(label_smoothing=0.1)), make_batch([0, 3, 6])
    loss, _ = task._shared_step(batch, "train")
    loss.backward()  # type: ignore[no-untyped-call]
    heads: Any = task.heads
    assert torch.isfinite(loss)
    assert not any(parameter.grad.any() for parameter in heads[1].parameters())
    assert any(parameter.grad.any() for parameter in heads[0].parameters())


@pytest.mark.parametrize("changes", [{"class_names": []}, {"class_names": None}, {"class_names": ["one"]}])
def test_fewer_than_two_classes_are_a_user_error(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="fewer than two classes"):
        tiny_classifier(**changes)


@pytest.mark.parametrize("model", [ImageClassifier, MultiTaskClassifier, DualEncoder, GenerativeClassifier])
def test_every_model_begins_with_pretrained_weights_by_default(model: type) -> None:
    assert inspect.signature(model).parameters["pretrained"].default is True


def test_with_timms_weights_it_is_timms_own_classifier() -> None:
    peer = timm.create_model("deit_tiny_patch16_224", num_classes=4, img_size=SIZE).eval()
    task = tiny_classifier(backbone="deit_tiny_patch16_224").eval()
    task.head.load_state_dict(peer.get_classifier().state_dict())
    peer.reset_classifier(0)
    task.encoder.backbone.load_state_dict(peer.state_dict())
    image = make_batch([0, 1])["image"]
    with torch.no_grad():
        expected = task.head(peer(task.encoder.normalize(image)))
        torch.testing.assert_close(task(image)["class"], expected)


def test_dropout_is_in_front_of_the_head_and_off_in_evaluation() -> None:
    task, image = tiny_classifier(drop_rate=0.5), make_batch([0, 1])["image"]
    task.eval()
    torch.testing.assert_close(task(image)["class"], task(image)["class"])
    task.drop.train()
    assert not torch.equal(task(image)["class"], task(image)["class"])


def test_class_weights_come_from_the_counts_of_the_data() -> None:
    counts = {"class": [4, 2, 1, 1], "type": [1, 1]}
    weights = (
        tiny_classifier(task_facts=TaskFacts(class_counts=counts), loss_options=LossOptions(class_weighting="inverse"))
        .outputs[0]
        .class_weights
    )
    assert isinstance(weights, torch.Tensor)
    assert weights.tolist() == [0.5, 1.0, 2.0, 2.0]
    with pytest.raises(UserError, match="class_weighting"):
        tiny_classifier(loss_options=LossOptions(class_weighting="inverse"))


def test_it_fits_ten_samples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = tiny_classifier(backbone="test_resnet", lr=1e-3, schedule="onecycle", weight_decay=0.0)
    trainer = tiny_trainer(tmp_path, max_epochs=12, limit_val_batches=0)
    trainer.fit(task, TinyData())
    batch = make_batch(list(range(10)))
    task.eval()
    assert (task(batch["image"])["class"].argmax(1) == batch["label"]).float().mean() > 0.8
    # Further targets of the data are ignored.
    [metrics] = tiny_trainer(tmp_path).validate(task, TinyData(), verbose=False)
    assert {name.split("/")[1] for name in metrics} == {"loss", "class"}


def test_arguments_are_saved_as_plain_values() -> None:
    hparams = dict(tiny_classifier(optim_options=OptimOptions(betas=(0.9, 0.98))).hparams)
    assert hparams["class_names"] == TASKS["class"]
    assert hparams["optim_options"] == asdict(OptimOptions(betas=(0.9, 0.98)))
    assert len(hparams) == 12


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


def test_only_tasks_with_weights_are_trained() -> None:
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


WEIGHTS = torch.tensor([0.5, 1.0, 3.0])


def some_logits(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()


def some_mix() -> Mix:
    return {"partner": torch.tensor([4, 3, 2, 1, 0]), "lam": torch.tensor([0.9, 0.6, 0.5, 0.25, 1.0])}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_loss_is_that_of_torch_over_the_known_targets(smoothing: float, weights: torch.Tensor | None) -> None:
    logits, target = some_logits(), torch.tensor([0, 2, UNKNOWN, 1, UNKNOWN])
    known = target != UNKNOWN
    loss = masked_cross_entropy(logits, target, class_weights=weights, label_smoothing=smoothing)
    expected = F.cross_entropy(logits[known], target[known], weights, label_smoothing=smoothing)
    torch.testing.assert_close(loss.value, expected)
    assert loss.weight == (3.0 if weights is None else 4.5)


def test_without_any_known_target_the_loss_is_zero_and_differentiable() -> None:
    logits = some_logits()
    loss = masked_cross_entropy(logits, torch.full((5,), UNKNOWN), class_weights=WEIGHTS, label_smoothing=0.1)
    loss.value.backward()  # type: ignore[no-untyped-call]
    assert loss.value == 0
    assert loss.weight == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mixed_loss_is_that_of_soft_targets(smoothing: float) -> None:
    logits, target, mix = some_logits(), torch.tensor([0, 2, 2, 1, 0]), some_mix()
    one_hot, lam = F.one_hot(target, 3).float(), mix["lam"][:, None]
    soft = lam * one_hot + (1 - lam) * one_hot[mix["partner"]]
    loss = masked_cross_entropy(logits, target, label_smoothing=smoothing, mix=mix)
    torch.testing.assert_close(loss.value, F.cross_entropy(logits, soft, label_smoothing=smoothing))
    torch.testing.assert_close(loss.weight, torch.tensor(5.0))


def test_of_a_mixed_image_only_the_known_sides_count() -> None:
    logits, target, mix = some_logits(), torch.tensor([0, UNKNOWN, 2, 1, UNKNOWN]), some_mix()
    rows = F.log_softmax(logits, dim=1).neg()
    total, weight = torch.tensor(0.0), 0.0
    for row, (partner, lam) in enumerate(zip(mix["partner"].tolist(), mix["lam"].tolist(), strict=True)):
        for label, share in ((int(target[row]), lam), (int(target[partner]), 1 - lam)):
            if label != UNKNOWN:
                total = total + share * WEIGHTS[label] * rows[row, label]
                weight += share * float(WEIGHTS[label])
    loss = masked_cross_entropy(logits, target, class_weights=WEIGHTS, mix=mix)
    torch.testing.assert_close(loss.value, total / weight)
    torch.testing.assert_close(loss.weight, torch.tensor(weight))


def test_means_of_unequal_batches_join_to_the_mean_over_all_samples() -> None:
    logits, target = some_logits(7), torch.tensor([0, 1, 2, UNKNOWN, 1, 2, 2])
    parts = [
        masked_cross_entropy(logits[rows], target[rows], class_weights=WEIGHTS) for rows in (slice(4), slice(4, 7))
    ]
    whole = masked_cross_entropy(logits, target, class_weights=WEIGHTS)
    joined = sum(part.value * part.weight for part in parts) / sum(part.weight for part in parts)
    torch.testing.assert_close(joined, whole.value)


def test_inverse_weights_are_those_of_scikit_learn() -> None:
    labels = [0] * 7 + [1] * 2 + [2]
    weights = class_weights_from_counts("class", 3, {"class": [7, 2, 1]}, "inverse")
    assert weights is not None
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert weights.tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("scheme", ["inverse", "sqrt_inverse", "effective_number"])
def test_rare_classes_count_more_and_the_mean_over_samples_is_one(scheme: ClassWeighting) -> None:
    counts = torch.tensor([700.0, 20.0, 1.0, 0.0])
    weights = class_weights_from_counts("class", 4, {"class": [700, 20, 1, 0]}, scheme)
    assert weights is not None
    assert weights[0] < weights[1] < weights[2]
    assert weights[3] == 1
    assert float((weights * counts).sum() / counts.sum()) == pytest.approx(1)


def test_no_weights_need_no_counts() -> None:
    assert class_weights_from_counts("class", 3, None, "none") is None


@pytest.mark.parametrize("counts", [None, {}, {"class": [1, 2]}])
def test_counts_that_are_missing_or_do_not_fit_are_a_user_error(counts: dict[str, list[int]] | None) -> None:
    with pytest.raises(UserError, match="class_weighting"):
        class_weights_from_counts("class", 3, counts, "inverse")


def test_an_unknown_scheme_and_smoothing_out_of_range_are_user_errors() -> None:
    with pytest.raises(UserError, match="must be one of"):
        class_weights_from_counts("class", 3, None, "rare")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="label_smoothing"):
        tiny_classifier(loss_options=LossOptions(label_smoothing=1.0))


def test_class_weights_are_not_saved() -> None:
    assert not SingleLabelOutput("class", len(WEIGHTS), class_weights=WEIGHTS).state_dict()
