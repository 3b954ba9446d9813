from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import resize

from lightning_modules.base import VisionTask
from lightning_modules.checkpoint import load_task
from lightning_modules.classification import ImageClassifier, TokenHeads
from lightning_modules.distillation import Teacher, load_teacher
from lightning_modules.options import DistillOptions
from tests.support.models import (
    BACKBONE,
    SIZE,
    TASKS,
    Recorder,
    TinyData,
    make_batch,
    pair_batch,
    same_weights,
    tiny_classifier,
    tiny_multitask,
    tiny_trainer,
)
from vitrail.errors import UserError
from vitrail.types import Batch

KINDS: list[dict[str, Any]] = [
    {"kind": "logits", "temperature": 2.0},
    {"kind": "hard"},
    {"kind": "features"},
    {"kind": "features", "distance": "cosine"},
]


def saved(task: VisionTask, path: Path) -> Path:
    """A checkpoint of a task that is not trained."""
    task.input_options["size"] = SIZE  # as its data had
    trainer = tiny_trainer(path.parent)
    trainer.strategy.connect(task)
    trainer.save_checkpoint(path, weights_only=True)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pl.seed_everything(1)
    task = tiny_classifier(backbone="test_resnet")
    # Without training its features would be close to zero, and its predictions not confident.
    next(task.backbone.parameters()).data.mul_(10)
    return saved(task, tmp_path_factory.mktemp("teacher") / "best.ckpt")


def student(teacher: Path | str, *, backbone: str = BACKBONE, lr: float = 1e-2, **options: Any) -> ImageClassifier:
    pl.seed_everything(3)
    return tiny_classifier(backbone=backbone, loss_options={"distill": {"teacher": str(teacher), **options}}, lr=lr)


def fitted(task: VisionTask, root: Path, **changes: Any) -> pl.Trainer:
    ckpt_path = changes.pop("ckpt_path", None)
    trainer = tiny_trainer(root, **changes)
    trainer.fit(task, TinyData(), ckpt_path=ckpt_path)
    return trainer


class Colours(TinyData):
    """Images of distinct colours."""

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader([pair_batch([0, 1, 2, 3]), pair_batch([4, 5, 6, 7])])

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader([pair_batch([20, 21, 22, 23])])


def distance(task: ImageClassifier) -> float:
    """The teacher's loss on unseen images."""
    assert task.distillation is not None
    batch = pair_batch(list(range(30, 42)))
    with torch.no_grad():
        features = task.eval().encoder(batch["image"])
        return float(task.distillation(batch, features, task.classify(features), task.task_weights))


class DistanceAtStart(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ImageClassifier)
        self.value = distance(pl_module)
        pl_module.train()


@pytest.mark.parametrize("options", KINDS, ids=lambda one: "-".join(map(str, one.values())))
def test_a_student_learns_from_its_teacher_alone(teacher: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    task, start = student(teacher, weight=1.0, backbone="test_vit", lr=2e-3, **options), DistanceAtStart()
    tiny_trainer(tmp_path, max_epochs=8, callbacks=[start]).fit(task, Colours())
    assert distance(task) < 0.6 * start.value


@pytest.mark.parametrize("options", KINDS[:3], ids=lambda one: one["kind"])
def test_gradients_reach_the_student_alone(teacher: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    task, recorder = student(teacher, **options), Recorder()
    fitted(task, tmp_path, callbacks=[recorder])
    assert task.distillation is not None
    network = task.distillation.teacher._network
    assert same_weights(network, load_task(teacher))  # BatchNorm's statistics, too
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.modules())
    trained = {name for name, _ in task.named_parameters()}
    assert set(recorder.gradients[0]) == trained
    others = (
        {"distillation.projection.weight", "distillation.projection.bias"} if options["kind"] == "features" else set()
    )
    assert trained == {name for name, _ in tiny_classifier().named_parameters()} | others


def test_the_loss_is_hintons_with_the_share_of_the_labels(teacher: Path, tmp_path: Path) -> None:
    # The teacher's classes are in another order.
    names = [TASKS["class"][index] for index in (2, 0, 3, 1)]
    task = tiny_classifier(
        class_names=names, loss_options={"distill": {"teacher": str(teacher), "weight": 0.3, "temperature": 3.0}}
    )
    fitted(task, tmp_path, max_epochs=1, limit_train_batches=1)
    batch = make_batch([0, 1, 2, 3])
    loss = task.eval()._shared_step(batch, "train")[0].detach()
    own = task(batch["image"])["class"].detach()
    taught = load_task(teacher)(batch["image"])["class"].detach()[:, [2, 0, 3, 1]]
    divergence = (taught / 3).softmax(1) * ((taught / 3).log_softmax(1) - (own / 3).log_softmax(1))
    labels = F.cross_entropy(own, batch["label"])
    torch.testing.assert_close(loss, 0.7 * labels + 0.3 * 9 * divergence.sum(1).mean(), rtol=1e-5, atol=1e-6)


def test_hard_labels_are_those_that_the_teacher_predicts_in_every_task(tmp_path: Path) -> None:
    path = saved(tiny_multitask(backbone="test_resnet"), tmp_path / "best.ckpt")
    weights = {"class": 1.0, "type": 0.5}
    task = tiny_multitask(
        task_weights=weights, loss_options={"distill": {"teacher": str(path), "kind": "hard", "weight": 1.0}}
    )
    fitted(task, tmp_path, limit_train_batches=1)
    batch = make_batch([0, 1, 2, 3], padding=1)
    loss = task.eval()._shared_step(batch, "train")[0].detach()
    own, taught = task(batch["image"]), load_task(path)(batch["image"])
    expected = [weights[t] * F.cross_entropy(own[t][:3], taught[t][:3].argmax(1)) for t in weights]
    torch.testing.assert_close(loss, torch.stack(expected).sum().detach())


class SaveAfterFirstEpoch(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_a_resumed_student_is_exact_and_its_checkpoint_is_that_of_a_plain_one(tmp_path: Path) -> None:
    pl.seed_everything(1)
    path = saved(tiny_classifier(backbone="test_resnet"), tmp_path / "best.ckpt")
    whole = student(path, kind="features")
    fitted(whole, tmp_path, max_epochs=2, callbacks=[SaveAfterFirstEpoch(tmp_path / "last.ckpt")])
    resumed = student(path, kind="features")
    fitted(resumed, tmp_path, max_epochs=2, ckpt_path=str(tmp_path / "last.ckpt"))
    assert same_weights(whole, resumed)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == tiny_classifier().state_dict().keys()
    [origin] = checkpoint["pretrained"]
    assert origin["part"] == "distill.teacher"
    assert origin["source"] == str(path)
    assert origin["sha256"] == {"best.ckpt": hashlib.sha256(path.read_bytes()).hexdigest()}
    # With another teacher it would be another training.
    saved(tiny_classifier(backbone="test_resnet"), path)
    with pytest.raises(UserError, match="has other weights than the teacher that training began with"):
        fitted(student(path, kind="features"), tmp_path, max_epochs=2, ckpt_path=str(tmp_path / "last.ckpt"))
    # To predict, the teacher is not needed.
    path.unlink()
    image = make_batch([1, 2])["image"]
    assert load_task(tmp_path / "last.ckpt")(image)["class"].shape == (2, 4)


def test_a_pretrained_teacher_gets_images_of_its_own_size_and_statistics(tmp_path: Path) -> None:
    whole = timm.create_model("test_vit").eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    options: dict[str, Any] = {"teacher": "test_vit", "pretrained": str(tmp_path / "w.pth")}
    image = make_batch([0, 1, 2])["image"]
    config = timm.data.resolve_data_config(model=whole)
    normal = (resize(image, [160, 160]) / 255 - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(
        config["std"]
    ).view(3, 1, 1)
    with torch.no_grad():
        features = whole.forward_head(whole.forward_features(normal), pre_logits=True)
        logits = whole(normal)
    found = load_teacher(DistillOptions(**options, kind="features"))
    torch.testing.assert_close(found.features(image), features, rtol=1e-3, atol=1e-3)
    classifies = load_teacher(DistillOptions(**options))
    torch.testing.assert_close(classifies.logits(image)["class"], logits, rtol=1e-3, atol=1e-3)
    assert classifies.tasks["class"] == ImageNetInfo("imagenet-1k").label_names()
    assert classifies.origin["name"] == "test_vit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "runs/no/such"}, "there is no run runs/no/such"),
        ({"teacher": "resnet_18"}, "timm does not know 'resnet_18'"),
        ({"teacher": "resnet18", "pretrained": False}, "a teacher with random weights"),
        ({"teacher": "test_vit", "pretrained": "w.pth"}, r"test_vit predicts 1000 classes of 'class', the data have 4"),
        ({"teacher": "test_resnet", "pretrained": "w.pth"}, "w.pth does not fit test_resnet with its classifier"),
        ({"teacher": "best.ckpt"}, "has no task 'class', it has other"),
    ],
)
def test_teachers_that_do_not_fit_are_user_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "w.pth")
    saved(tiny_multitask(tasks={"other": ["a", "b"]}), tmp_path / "best.ckpt")
    with pytest.raises(UserError, match=message) as caught:
        fitted(tiny_classifier(loss_options={"distill": options}), tmp_path)
    assert "\n" not in str(caught.value)


def test_images_are_needed_although_the_backbone_is_frozen(teacher: Path) -> None:
    task = student(teacher)
    assert not task.needs_images
    assert isinstance(load_teacher(DistillOptions(str(teacher))), Teacher)


@pytest.mark.parametrize("make", [tiny_classifier, tiny_multitask])
def test_the_distillation_token_of_deit_has_a_head_of_its_own(tmp_path: Path, make: Any) -> None:
    path = saved(make(backbone="test_resnet"), tmp_path / "best.ckpt")
    name, depth = "deit_tiny_distilled_patch16_224", {"timm": {"depth": 2}}
    distill = {"teacher": str(path), "kind": "hard", "weight": 0.5}
    task = make(backbone=name, backbone_options=depth, loss_options={"distill": distill})
    for head in (module for module in task.modules() if isinstance(module, TokenHeads)):
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.2)
    fitted(task, tmp_path, max_epochs=1, limit_train_batches=1, callbacks=[SaveAfterFirstEpoch(tmp_path / "last.ckpt")])
    batch = make_batch([1, 2, 4, 5])
    image, encoder = batch["image"], task.eval().encoder
    with torch.no_grad():
        tokens = encoder.backbone.forward_features(encoder.normalize(image))
        heads = [task.head] if make is tiny_classifier else list(task.heads)
        own = {t: head.own(tokens[:, 0]) for t, head in zip(task.tasks, heads, strict=True)}
        taught = {t: head.taught(tokens[:, 1]) for t, head in zip(task.tasks, heads, strict=True)}
        found = load_task(tmp_path / "last.ckpt")(image)
        teacher, targets = load_task(path)(image), {"class": batch["label"], **batch["attributes"]}
        loss = task._shared_step(batch, "train")[0]
    for one in task.tasks:
        # Predictions are the mean of both heads (Touvron et al., 2021).
        torch.testing.assert_close(found[one], (own[one] + taught[one]) / 2)
    labels = [F.cross_entropy(own[t], targets[t]) for t in task.tasks]
    hard = [F.cross_entropy(taught[t], teacher[t].argmax(1)) for t in task.tasks]
    torch.testing.assert_close(loss, torch.stack([*labels, *hard]).sum() / 2)
    # Without a teacher the features are the mean of the tokens, as timm's.
    assert tiny_classifier(backbone=name, backbone_options=depth).encoder.num_features == 192
    assert encoder.num_features == 2 * 192
