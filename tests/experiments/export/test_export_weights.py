from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from experiments.export.weights import metadata_in, read_weights, write_weights
from lightning_modules.base import VisionTask
from lightning_modules.checkpoint import load_task
from tests.experiments.exports import flowers_run, products_run
from vitrail.errors import UserError

METADATA: dict[str, Any] = {"version": 1, "name": "shop"}


@pytest.mark.parametrize("kind", ["classifier", "dual encoder with adapters"])
def test_a_task_comes_back_with_all_that_its_checkpoint_has(kind: str, tmp_path: Path) -> None:
    run = products_run() if kind == "classifier" else flowers_run()
    task = load_task(run / "checkpoints" / "best.ckpt")
    write_weights(task, tmp_path / "model.safetensors", METADATA)
    found = read_weights(tmp_path)
    assert type(found) is type(task)
    assert found.weights_digest() == task.weights_digest()
    assert found.input_options == task.input_options
    assert not found.training
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, other = task.image_features(image), found.image_features(image)
        assert torch.equal(own, other)
        if kind != "classifier":
            texts = ["a photo of a rose", "x"]
            assert torch.equal(found.encode_text(texts), task.encode_text(texts))  # type: ignore[operator]
    assert metadata_in(tmp_path / "model.safetensors") == METADATA


def test_what_is_no_export_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read_weights(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"half a file")
    with pytest.raises(UserError, match="no whole safetensors file"):
        read_weights(tmp_path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="no exported model"):
        read_weights(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"vitrail": json.dumps({"version": 99})})
    with pytest.raises(UserError, match="format 99"):
        read_weights(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"vitrail": json.dumps(METADATA), "vitrail.checkpoint": "{}"})
    with pytest.raises(UserError, match="does not say how its model is built"):
        read_weights(path)


def test_only_our_tasks_are_built(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint = {"hyper_parameters": {"_class_path": "subprocess.Popen", "args": ["true"]}}
    strings = {"vitrail": json.dumps(METADATA), "vitrail.checkpoint": json.dumps(checkpoint)}
    save_file({"x": torch.zeros(1)}, path, metadata=strings)
    with pytest.raises(UserError, match="none of the tasks"):
        read_weights(path)


def test_the_header_holds_no_more_than_text(tmp_path: Path) -> None:
    task: VisionTask = load_task(products_run() / "checkpoints" / "best.ckpt")
    write_weights(task, tmp_path / "model.safetensors", METADATA)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        checkpoint = json.loads(file.metadata()["vitrail.checkpoint"])
    assert checkpoint["hyper_parameters"]["_class_path"] == "lightning_modules.classification.MultiTaskClassifier"
    assert "epoch_sums" not in checkpoint
