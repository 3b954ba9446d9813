"""What a run record contains, and how it records the end of a stage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from experiments.train.run_record import RunRecorder, git_revision, hardware
from lightning_modules.base import VisionTask
from lightning_modules.checkpoint import load_task
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.ensemble import Ensemble
from lightning_modules.options import TowerOptions
from tests.lightning_modules.generative.tiny_answers import tiny_answerer
from tests.support.models import (
    CLASSES,
    PROMPTS,
    TinyData,
    TinyPairs,
    tiny_classifier,
    tiny_pair,
    tiny_trainer,
    write_bert,
    write_clip,
)


def trainer_of(directory: Path, seed: int = 1, max_epochs: int = 1) -> Trainer:
    directory.mkdir(exist_ok=True)
    return tiny_trainer(directory, max_epochs=max_epochs, callbacks=[RunRecorder(directory, "tiny", seed)])


def record_of(directory: Path, model: BoringModel, seed: int = 1, stage: str = "fit") -> dict[str, Any]:
    getattr(trainer_of(directory, seed), stage)(model)
    record: dict[str, Any] = json.loads((directory / "run.json").read_text())
    return record


def test_record_names_what_a_number_depends_on(tmp_path: Path) -> None:
    record = record_of(tmp_path, BoringModel())
    assert record["name"] == "tiny"
    assert record["seed"] == 1
    assert record["packages"]["torch"]
    assert record["hardware"]["cpu_count"] >= 1
    assert record["model"] == {"class": "BoringModel", "parameters": 66, "trainable": 66}
    (stage,) = record["stages"]
    assert stage["exit"] == "finished"
    assert stage["trainable"] == 66
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
    assert record_of(tmp_path, MadeInSetup(), stage=stage)["model"] == {
        "class": "MadeInSetup",
        "parameters": 66,
        "trainable": 66,
    }


def test_a_record_without_parameters_is_completed_by_the_next_stage(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"model": {"class": "BoringModel", "parameters": 0}, "stages": []}))
    assert record_of(tmp_path, BoringModel(), stage="test")["model"] == {
        "class": "BoringModel",
        "parameters": 66,
        "trainable": 66,
    }


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


@pytest.mark.parametrize("lossy", [True, False])
def test_whether_training_images_came_as_jpeg_files_is_recorded(tmp_path: Path, lossy: bool) -> None:
    data = TinyData()
    data.lossy_cache = lossy  # type: ignore[attr-defined]  # as ImageDataModule
    trainer_of(tmp_path).fit(tiny_classifier(), data)
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["data"] or {}).get("cache") == ("jpeg" if lossy else None)


def test_revision_is_that_of_the_source() -> None:
    revision = git_revision()
    assert revision is None or len(revision["revision"]) == 40


def test_hardware_counts_memory() -> None:
    assert hardware()["memory_bytes"] > 1 << 28


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def staged(directory: Path, task: VisionTask, data: Any, stage: str, **arguments: Any) -> list[dict[str, Any]]:
    """The pretrained weights in the record after a stage."""
    trainer = trainer_of(directory, max_epochs=arguments.pop("max_epochs", 1))
    getattr(trainer, stage)(task, datamodule=data, **arguments)
    trainer.save_checkpoint(directory / "last.ckpt")
    pretrained: list[dict[str, Any]] = json.loads((directory / "run.json").read_text())["pretrained"]
    return pretrained


def test_pretrained_weights_are_recorded_and_go_with_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(timm.create_model("test_efficientnet").state_dict(), file)
    expected = {
        "part": "backbone",
        "name": "test_efficientnet",
        "source": str(file),
        "revision": None,
        "sha256": {"w.pth": sha256(file)},
        "left_out": {"classifier": 2},
    }
    assert staged(tmp_path / "one", tiny_classifier(pretrained=str(file)), TinyData(), "fit") == [expected]
    file.unlink()
    # Going on in another directory, testing there, and being a member of an ensemble do not forget it.
    last = tmp_path / "one" / "last.ckpt"
    more = staged(
        tmp_path / "two", tiny_classifier(pretrained=str(file)), TinyData(), "fit", ckpt_path=last, max_epochs=2
    )
    assert more == [expected]
    tested = staged(tmp_path / "three", tiny_classifier(pretrained=str(file)), TinyData(), "test", ckpt_path=last)
    assert tested == [expected]
    (tmp_path / "one" / "checkpoints").mkdir()
    last.rename(tmp_path / "one" / "checkpoints" / "best.ckpt")
    ensemble = Ensemble([str(tmp_path / "one")], tta_views=["identity", "hflip"])
    assert ensemble.origins == [{**expected, "part": "members.0.backbone"}]
    content: dict[str, Any] = {"state_dict": ensemble.state_dict()}
    ensemble.on_save_checkpoint(content)
    torch.save(content, tmp_path / "ensemble.ckpt")
    assert load_task(tmp_path / "ensemble.ckpt").origins == ensemble.origins


def test_random_weights_are_recorded_as_nothing(tmp_path: Path) -> None:
    assert staged(tmp_path, tiny_classifier(), TinyData(), "fit") == []


def test_both_towers_are_recorded(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(timm.create_model("test_vit").state_dict(), file)
    bert = write_bert(tmp_path / "bert")
    towers: Any = {"image": "test_vit", "image_pretrained": str(file), "text": str(bert), "max_length": 12}
    image, text = staged(tmp_path / "run", tiny_pair(tmp_path / "clip", towers=towers), TinyPairs(), "fit")
    assert (image["part"], image["source"], image["sha256"]) == ("towers.image", str(file), {"w.pth": sha256(file)})
    assert (text["part"], text["source"]) == ("towers.text", str(bert))
    assert text["sha256"] == {"model.safetensors": sha256(bert / "model.safetensors")}
    assert text["left_out"] == {"pooler": 2}


def test_a_whole_model_of_the_hub_is_recorded_with_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "c0ffee" * 6 + "abcd"
    repository = tmp_path / "models--someone--tiny-clip"
    folder = write_clip(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    task = DualEncoder(TowerOptions(model="someone/tiny-clip"), CLASSES, PROMPTS, image_size=32)
    [origin] = staged(tmp_path / "run", task, TinyPairs(), "test")
    assert (origin["source"], origin["revision"]) == ("someone/tiny-clip", commit)
    assert origin["sha256"] == {"model.safetensors": sha256(folder / "model.safetensors")}


def test_a_generative_models_weights_are_recorded(tmp_path: Path) -> None:
    task = tiny_answerer(tmp_path / "qwen", lora={"rank": 2})
    task.load_pretrained()
    [origin] = task.origins
    assert origin["part"] == "model"
    assert origin["sha256"] == {"model.safetensors": sha256(tmp_path / "qwen" / "model.safetensors")}


class Recorded(LightningDataModule):
    """Records another value range once a checkpoint was loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.value_range = [0, 255]

    def data_record(self) -> dict[str, Any]:
        return {"fingerprint": "f", "value_range": self.value_range}


def test_the_record_describes_how_a_checkpoints_model_takes_images(tmp_path: Path) -> None:
    """Which is known only when the checkpoint has been loaded, after the stage's setup."""
    for checkpoint, expected in ((None, [0, 255]), (tmp_path / "a.ckpt", [0, 4095])):
        folder = tmp_path / str(bool(checkpoint))
        folder.mkdir()
        data = Recorded()
        recorder = RunRecorder(folder, "deep", 1, checkpoint)
        host = SimpleNamespace(is_global_zero=True, datamodule=data, world_size=1)
        recorder.setup(host, BoringModel(), "test")  # type: ignore[arg-type]  # as far as it is asked
        if checkpoint:
            data.value_range = [0, 4095]
        recorder.on_test_start(host, BoringModel())  # type: ignore[arg-type]  # as far as it is asked
        record = json.loads((folder / "run.json").read_text())
        assert record["data"] == {"fingerprint": "f", "value_range": expected}
        # What training saw stays in the record of its run.
        recorder._stage = {**recorder._stage, "started": "later"}
        data.value_range = [0, 1]
        recorder.on_test_start(host, BoringModel())  # type: ignore[arg-type]  # as far as it is asked
        assert json.loads((folder / "run.json").read_text())["data"]["value_range"] == expected
