from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from evaluation.cost.efficiency import ModelSource, build, source_of
from lightning_modules import MultiTaskClassifier
from vitrail.errors import UserError

EXPERIMENT: dict[str, Any] = {
    "data": {
        "class_path": "datamodules.Wares",
        "init_args": {"n_samples": 60, "resolution": 32, "image": {"size": 32}},
    },
    "model": {
        "class_path": "lightning_modules.MultiTaskClassifier",
        "init_args": {"backbone": "test_resnet", "pretrained": True, "lr": 0.001},
    },
}


def test_an_experiment_is_built_without_weights_and_with_the_datas_tasks() -> None:
    task, size = build(ModelSource(EXPERIMENT), "meta")
    assert size == 32
    assert all(parameter.is_meta for parameter in task.parameters())
    assert not task.training
    assert isinstance(task, MultiTaskClassifier)
    assert set(task.tasks) == {"class", "colour", "material", "condition"}
    real, _ = build(ModelSource(EXPERIMENT), "cpu")
    assert real(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))["class"].shape[0] == 2


def test_overlays_are_laid_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    (tmp_path / "b.yaml").write_text("data: {init_args: {image: {size: 64}}}")
    source = source_of(tmp_path / "a.yaml", [tmp_path / "b.yaml"])
    assert build(source, "meta")[1] == 64


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"model": {}}, "class_path"),
        ({"data": None}, "needs data"),
        ({"model": {"class_path": "lightning_modules.Nothing"}}, "no task"),
        ({"model": {"class_path": "os.system"}}, "no task"),
        ({"model": {**EXPERIMENT["model"], "init_args": {"backbone": "test_resnet", "lr": "x"}}}, "lr"),
        ({"model": {**EXPERIMENT["model"], "init_args": {"backbone": "resnet_nobody"}}}, "timm does not know"),
    ],
)
def test_what_cannot_be_built_is_told(part: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build(ModelSource({**EXPERIMENT, **part}), "meta")


def test_a_run_without_a_best_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"best\.ckpt"):
        source_of(tmp_path, [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a run directory"):
        source_of(tmp_path / "empty", [])


def test_a_run_that_was_evaluated_as_it_came_is_built_from_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    (tmp_path / "run.json").write_text(json.dumps({"stages": [{"stage": "test", "exit": "finished"}]}))
    assert source_of(tmp_path, []) == source_of(tmp_path / "config.yaml", [])
    # A training that left no best checkpoint is another matter.
    (tmp_path / "run.json").write_text(json.dumps({"stages": [{"stage": "fit", "exit": "unfinished"}]}))
    with pytest.raises(UserError, match=r"best\.ckpt"):
        source_of(tmp_path, [])
