from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import timm
import torch

from lightning_modules.classification import ImageClassifier, MultiTaskClassifier
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.generative import GenerativeClassifier
from tests.lightning_modules.tiny import SIZE, TASKS, TinyData, make_batch, tiny_classifier, tiny_trainer
from vitrail.errors import UserError


@pytest.mark.parametrize("model", [ImageClassifier, MultiTaskClassifier, DualEncoder, GenerativeClassifier])
def test_every_model_begins_with_pretrained_weights_by_default(model: type) -> None:
    assert inspect.signature(model).parameters["pretrained"].default is True


@pytest.mark.parametrize("backbone", ["deit_tiny_patch16_224", "mobilevit_xxs", "resnet18"])
def test_it_has_as_many_parameters_as_timms_own_classifier(backbone: str) -> None:
    task = ImageClassifier(backbone, [str(i) for i in range(10)], pretrained=False)
    peer = timm.create_model(backbone, num_classes=10)
    assert sum(p.numel() for p in task.parameters()) == sum(p.numel() for p in peer.parameters())


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


def test_further_targets_of_the_data_are_ignored(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    [metrics] = trainer.validate(tiny_classifier(), TinyData(), verbose=False)
    assert {name.split("/")[1] for name in metrics} == {"loss", "class"}


def test_class_weights_come_from_the_counts_of_the_data() -> None:
    counts = {"class": [4, 2, 1, 1], "type": [1, 1]}
    weights = tiny_classifier(class_counts=counts, class_weighting="inverse").losses[0].class_weights
    assert isinstance(weights, torch.Tensor)
    assert weights.tolist() == [0.5, 1.0, 2.0, 2.0]
    with pytest.raises(UserError, match="class_weighting"):
        tiny_classifier(class_weighting="inverse")


def test_it_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = tiny_classifier(backbone="test_resnet", lr=1e-3, schedule="onecycle", weight_decay=0.0)
    trainer = tiny_trainer(tmp_path, max_epochs=12, limit_val_batches=0)
    trainer.fit(task, TinyData())
    batch = make_batch(list(range(10)))
    task.eval()
    assert (task(batch["image"])["class"].argmax(1) == batch["label"]).float().mean() > 0.8


def test_arguments_are_saved_as_plain_values() -> None:
    hparams = dict(tiny_classifier(optim_options={"betas": [0.9, 0.98]}).hparams)
    assert hparams["class_names"] == TASKS["class"]
    assert hparams["optim_options"] == {"betas": [0.9, 0.98]}
    assert len(hparams) == 12
