"""What a run record says, and that it says how a stage ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from experiments.run_record import RunRecorder, git_revision, hardware


def record_of(directory: Path, model: BoringModel, seed: int = 1, stage: str = "fit") -> dict[str, Any]:
    trainer = Trainer(
        default_root_dir=directory,
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=1,
        limit_test_batches=1,
        limit_predict_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RunRecorder(directory, "boring", seed)],
    )
    getattr(trainer, stage)(model)
    record: dict[str, Any] = json.loads((directory / "run.json").read_text())
    return record


def test_record_names_what_a_number_depends_on(tmp_path: Path) -> None:
    record = record_of(tmp_path, BoringModel())
    assert record["name"] == "boring"
    assert record["seed"] == 1
    assert record["packages"]["torch"]
    assert record["hardware"]["cpu_count"] >= 1
    assert record["model"] == {"class": "BoringModel", "parameters": 66}
    (stage,) = record["stages"]
    assert stage["exit"] == "finished"
    assert stage["started"] <= stage["ended"]


class MadeInSetup(BoringModel):
    """Has no network before."""

    def __init__(self) -> None:
        super().__init__()
        del self.layer

    def setup(self, stage: str) -> None:
        self.layer = nn.Linear(32, 2)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_network_that_its_task_makes_in_setup_is_counted(tmp_path: Path, stage: str) -> None:
    assert record_of(tmp_path, MadeInSetup(), stage=stage)["model"] == {"class": "MadeInSetup", "parameters": 66}


def test_a_record_without_parameters_is_completed_by_the_next_stage(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"model": {"class": "BoringModel", "parameters": 0}, "stages": []}))
    assert record_of(tmp_path, BoringModel(), stage="test")["model"] == {"class": "BoringModel", "parameters": 66}


def test_failure_is_recorded_with_its_reason(tmp_path: Path) -> None:
    class Failing(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ArithmeticError("loss is not a number")

    with pytest.raises(ArithmeticError):
        record_of(tmp_path, Failing())
    (stage,) = json.loads((tmp_path / "run.json").read_text())["stages"]
    assert stage["exit"] == "ArithmeticError: loss is not a number"


def test_later_stage_is_added_and_keeps_what_training_saw(tmp_path: Path) -> None:
    first = record_of(tmp_path, BoringModel(), seed=1)
    second = record_of(tmp_path, BoringModel(), seed=2)
    assert second["seed"] == 1
    assert len(second["stages"]) == 2
    assert second["stages"][0] == first["stages"][0]


def test_missing_knowledge_of_the_data_is_added(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"data": {"fingerprint": "f"}, "stages": []}))
    assert record_of(tmp_path, BoringModel())["data"] == {"fingerprint": "f"}


def test_revision_is_that_of_the_source() -> None:
    revision = git_revision()
    assert revision is None or len(revision["revision"]) == 40


def test_hardware_counts_memory() -> None:
    assert hardware()["memory_bytes"] > 1 << 28
