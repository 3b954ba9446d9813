"""Our own classes keep the contract, and each part of it is noticed where it is broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from datamodules import ImageFolder, Table, Wares
from datamodules.base import ImageDataModule
from lightning_modules import ImageClassifier, MultiTaskClassifier
from lightning_modules.options import LossOptions
from tests.support.data import Noise, write_csv, write_image_folder
from tests.support.runs import data_of, flowers_run
from vitrail import Run
from vitrail.testing import check_datamodule, check_task
from vitrail.types import Batch, Outputs

SMALL: dict[str, Any] = {"image": {"size": 32}, "loader": {"batch_size": 8}}


def noise(**options: Any) -> Noise:
    return Noise(**{"n": 30, **SMALL, **options})


def classifier(cls: type[ImageClassifier] = ImageClassifier, **options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    return cls("test_resnet", noise().class_names, pretrained=False, image_size=32, **options)


def test_our_data_sets_keep_the_contract(tmp_path: Path) -> None:
    folder = write_image_folder(tmp_path / "photos", splits=(), objects=10)
    files = sorted(folder.rglob("[!.]*.png"))
    write_csv(tmp_path / "table.csv", [["file", "label"], *([str(file), file.stem.split("_")[0]] for file in files)])
    for data in (
        Wares(n_samples=60, **SMALL),
        ImageFolder(str(folder), **SMALL),
        Table(str(tmp_path / "table.csv"), **SMALL),
        noise(),
    ):
        assert check_datamodule(data)[-1] == "index"


def test_our_classifiers_keep_the_contract() -> None:
    parts = ["class", "arguments", "prediction", "features", "frozen", "training", "checkpoint", "index", "export"]
    assert check_task(classifier(), noise()) == parts


def of_every_kind(**options: Any) -> tuple[MultiTaskClassifier, Wares]:
    data = Wares(n_samples=60, every_kind=True, **SMALL)
    torch.manual_seed(0)
    facts = data.task_facts
    return MultiTaskClassifier(
        "test_resnet", data.tasks, task_facts=facts, pretrained=False, image_size=32, **options
    ), data


def test_tasks_of_every_kind_keep_the_contract() -> None:
    model, data = of_every_kind()
    assert {*model.task_kinds.values()} == {"ordinal", "multi_label", "regression"}
    assert check_datamodule(data)[-1] == "index"
    assert check_task(model, data)[-1] == "index", "only single-label and ordinal tasks are exported as graphs"
    uncertain, data = of_every_kind(loss_options=LossOptions(regression="gaussian_nll"))
    assert check_task(uncertain, data)[-1] == "index", "a number may come with its variance"


@pytest.mark.slow  # it trains a dual encoder first
def test_our_dual_encoder_keeps_the_contract() -> None:
    run = Run(flowers_run())
    assert "export" in check_task(run.load_model(), data_of(run.path))


class FloatImages(Noise):
    def read_image(self, index: int) -> torch.Tensor:
        return super().read_image(index).float()


class Unstable(Noise):
    def read_image(self, index: int) -> torch.Tensor:
        return torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8)


class Forgetful(Noise):
    """A constructor that keeps an argument to itself."""

    def __init__(self, n: int = 30, **shared: Any) -> None:
        super().__init__(n, **shared)
        self.hparams["n"] = 12


class WithObject(Noise):
    def __init__(self, n: int = 30, **shared: Any) -> None:
        super().__init__(n, **shared)
        self.hparams["extra"] = Path()


class OtherTargets(Wares):
    """Of a task by its kind, what a user may return by mistake."""

    def __init__(self, mistake: str = "", **shared: Any) -> None:
        super().__init__(n_samples=60, every_kind=True, **shared)
        self.mistake = mistake

    def eval_dataloader(self, split: str) -> Any:
        for batch in super().eval_dataloader(split):
            targets = batch["attributes"]
            if self.mistake == "multi_label":
                targets["tags"] = targets["tags"].argmax(dim=1)
            elif self.mistake == "value":
                targets["tags"][0, 0] = 2
            elif self.mistake == "regression":
                targets["price"] = targets["price"].double()
            elif self.mistake == "infinite":
                targets["price"][0] = torch.inf
            yield batch


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        ("multi_label", r"targets of tags must be torch.int8 \(8, 4\); got torch.int64 \(8,\)"),
        ("value", r"targets of tags must be from -1 to 1"),
        ("regression", r"targets of price must be torch.float32 \(8,\); got torch.float64"),
        ("infinite", r"targets of price must be finite"),
    ],
)
def test_targets_are_as_their_kind_wants_them(mistake: str, line: str) -> None:
    data = OtherTargets(mistake, **SMALL)
    with pytest.raises(AssertionError, match=f"OtherTargets, batches: train: {line}"):
        check_datamodule(data)


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (FloatImages, r"FloatImages, images: read_image\(\d+\): must return uint8 \(3, H, W\); got torch.float32"),
        (Unstable, r"Unstable, images: read_image\(\d+\): returns another image each time"),
        (Forgetful, r"Forgetful, rebuilding: a copy has another table"),
        (WithObject, r"WithObject, arguments: extra: is a \w*Path; checkpoints hold numbers"),
    ],
)
def test_what_a_data_set_breaks_is_a_line(broken: type[ImageDataModule], line: str) -> None:
    with pytest.raises(AssertionError, match=line) as caught:
        check_datamodule(broken(**SMALL))
    assert all(one.startswith(broken.__name__) for one in str(caught.value).splitlines())


class HalfPrecision(ImageClassifier):
    def predict_step(self, batch: Batch, batch_idx: int) -> Outputs:
        outputs = super().predict_step(batch, batch_idx)
        return {**outputs, "logits": {task: logits.half() for task, logits in outputs["logits"].items()}}


class NeverFrozen(ImageClassifier):
    def freeze_backbone(self) -> None:
        self._frozen = []


class NoFeatures(ImageClassifier):
    def image_features(self, image: torch.Tensor) -> torch.Tensor:
        return super().image_features(image) * 2


class Unsaved(ImageClassifier):
    """The constructor draws what a checkpoint does not keep."""

    def __init__(self, backbone: str, class_names: list[str], pretrained: bool = False, image_size: int = 32) -> None:
        super().__init__(backbone, class_names, pretrained=pretrained, image_size=image_size)
        self.shift = nn.Buffer(torch.rand(1) * 100, persistent=False)

    def classify(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {task: logits + self.shift for task, logits in super().classify(features).items()}


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (
            HalfPrecision,
            r"HalfPrecision, prediction: predict_step: logits of class must be torch.float32 \(\d+, \d\); got",
        ),
        (NeverFrozen, r"NeverFrozen, frozen: freeze_backbone: the backbone must stay in evaluation mode"),
        (NoFeatures, r"NoFeatures, features: image_features: a batch with these .* predicts class differently"),
        (Unsaved, r"Unsaved, checkpoint: a loaded task predicts class differently"),
    ],
)
def test_what_a_task_breaks_is_a_line(broken: type[ImageClassifier], line: str) -> None:
    with pytest.raises(AssertionError, match=line):
        check_task(classifier(broken), noise())
