"""What would make a number untrustworthy is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from datamodules.schema import UserError
from experiments.refusals import refuse_conflicting_checkpoint, refuse_test_metrics, refuse_untrained


class Model(LightningModule):
    def __init__(self, lr: float, class_names: list[str], class_counts: dict[str, list[int]] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()


class Ready(Model):
    ready_without_training = True


def checkpoint(path: Path, **hyper_parameters: object) -> Path:
    versions = {"pytorch-lightning_version": "2.6.6"}
    torch.save({**versions, "hyper_parameters": hyper_parameters, "state_dict": {}}, path)
    return path


def test_equal_hyper_parameters_pass(tmp_path: Path) -> None:
    refuse_conflicting_checkpoint(Model(0.1, ["a"]), checkpoint(tmp_path / "x.ckpt", lr=0.1, class_names=["a"]))


@pytest.mark.parametrize(
    ("saved", "key"),
    [({"lr": 0.2, "class_names": ["a", "b"]}, "lr"), ({"lr": 0.1, "class_names": ["b", "a"]}, "class_names")],
)
def test_each_difference_is_named(tmp_path: Path, saved: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=key) as refusal:
        refuse_conflicting_checkpoint(Model(0.1, ["a", "b"]), checkpoint(tmp_path / "x.ckpt", **saved))
    assert "\n" not in str(refusal.value)


def test_counts_of_the_training_split_may_differ(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "x.ckpt", lr=0.1, class_names=["a"], class_counts={"class": [3]})
    refuse_conflicting_checkpoint(Model(0.1, ["a"], {"class": [4]}), path)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"x\.ckpt"):
        refuse_conflicting_checkpoint(Model(0.1, []), path)


def test_a_file_of_plain_weights_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x\.ckpt: is not a checkpoint of a run; plain weights belong to"):
        refuse_conflicting_checkpoint(Model(0.1, []), tmp_path / "x.ckpt")


def test_code_inside_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"hyper_parameters": {"lr": Model}}, path)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        refuse_conflicting_checkpoint(Model(0.1, []), path)


@pytest.mark.parametrize(
    "callback", [ModelCheckpoint(monitor="test/loss"), EarlyStopping(monitor="test/class/accuracy")]
)
def test_selection_on_test_is_refused(callback: ModelCheckpoint | EarlyStopping) -> None:
    with pytest.raises(UserError, match="test"):
        refuse_test_metrics([callback])


def test_selection_on_validation_passes() -> None:
    refuse_test_metrics([ModelCheckpoint(monitor="val/loss"), ModelCheckpoint()])


def test_untrained_model_is_not_evaluated() -> None:
    with pytest.raises(UserError, match="--ckpt_path"):
        refuse_untrained(Model(0.1, []), "test")
    refuse_untrained(Ready(0.1, []), "test")
