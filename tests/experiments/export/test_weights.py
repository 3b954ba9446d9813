from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from experiments.export.weights import (
    as_strings,
    from_strings,
    groups_of,
    metadata_of,
    read_weights,
    write_summary,
    write_tokenizer,
    write_weights,
)
from lightning_modules.base import VisionTask
from lightning_modules.checkpoint import load_task
from lightning_modules.dual_encoder import DualEncoder
from lightning_modules.options import TowerOptions
from tests.support.models import tiny_classifier, write_bert, write_whole_model
from tests.support.runs import flowers_run, products_run
from vitrail.errors import UserError
from vitrail.runs import Run

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
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert from_strings(file.metadata(), "x") == METADATA


@pytest.mark.parametrize("kind", ["clip", "siglip2", "two towers"])
def test_the_image_tower_is_read_without_the_rest_of_the_file(kind: str, tmp_path: Path) -> None:
    towers: dict[str, Any] = {"image": "test_efficientnet", "image_pretrained": False, "embed_dim": 16}
    if kind == "two towers":
        towers |= {"text": str(write_bert(tmp_path / "bert"))}
    else:
        towers = {"model": str(write_whole_model(tmp_path / "model", kind))}
    task = DualEncoder(TowerOptions(**towers), image_size=32).eval()
    task.load_pretrained()
    task.towers.tokenizer = task.towers.train_tokenizer(["a photo"])
    write_weights(task, tmp_path / "model.safetensors", {**METADATA, "groups": groups_of(task)})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        groups = from_strings(file.metadata(), "x")["groups"]
        names = {part: [one for one in file.keys() if one.startswith(tuple(groups[part]))] for part in groups}  # noqa: SIM118
        image = {name: file.get_tensor(name) for name in names["image"]}
    assert not set(names["image"]) & set(names["text"])
    torch.manual_seed(1)
    other = DualEncoder(TowerOptions(**towers), image_size=32, pretrained=False).eval()
    other.load_state_dict(image, strict=False)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(other.encode_image(pixels), task.encode_image(pixels))
    rest = {"objective.temperature.log_scale", "objective.temperature.bias"}
    rest |= {f"towers.model.{name}" for name in ("logit_scale", "logit_bias")}
    assert set(task.state_dict()) - {*names["image"], *names["text"]} <= rest


def test_the_groups_of_a_classifier_are_its_encoder() -> None:
    assert groups_of(tiny_classifier()) == {"image": ["encoder."]}


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read_weights(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"half a file")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        read_weights(tmp_path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not an exported model"):
        read_weights(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"vitrail": json.dumps({"version": 99})})
    with pytest.raises(UserError, match="format 99"):
        read_weights(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"vitrail": json.dumps(METADATA), "vitrail.checkpoint": "{}"})
    with pytest.raises(UserError, match="does not describe how its model is built"):
        read_weights(path)


def test_only_our_tasks_are_built(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint = {"hyper_parameters": {"_class_path": "subprocess.Popen", "args": ["true"]}}
    strings = {"vitrail": json.dumps(METADATA), "vitrail.checkpoint": json.dumps(checkpoint)}
    save_file({"x": torch.zeros(1)}, path, metadata=strings)
    with pytest.raises(UserError, match="must be one of the tasks"):
        read_weights(path)


def test_the_header_holds_no_more_than_text(tmp_path: Path) -> None:
    task: VisionTask = load_task(products_run() / "checkpoints" / "best.ckpt")
    write_weights(task, tmp_path / "model.safetensors", METADATA)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        checkpoint = json.loads(file.metadata()["vitrail.checkpoint"])
    assert checkpoint["hyper_parameters"]["_class_path"] == "lightning_modules.classification.MultiTaskClassifier"
    assert "epoch_sums" not in checkpoint


def test_a_dual_encoders_text_rules_are_there(tmp_path: Path) -> None:
    task = load_task(flowers_run() / "checkpoints" / "best.ckpt")
    found = metadata_of(task, Run(flowers_run()), "best")
    assert isinstance(task, DualEncoder)
    assert task.towers.tokenizer is not None
    assert found["text"]["max_length"] == task.towers.tokenizer.state["max_length"]
    assert found["text"]["pad_token"] == "<end>"
    assert len(found["text"]["class_prompts"]) == len(found["tasks"]["class"])
    assert from_strings(as_strings(found), "x") == found
    write_tokenizer(task, tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_a_classifier_reads_no_texts(tmp_path: Path) -> None:
    task = load_task(products_run() / "checkpoints" / "best.ckpt")
    found = metadata_of(task, Run(products_run()), "best")
    assert found["text"] is None
    assert set(found["temperatures"]) == set(found["tasks"]) == {"class", "colour"}
    assert found["run"] == "/".join(products_run().parts[-2:])
    write_tokenizer(task, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("strings", [{}, {"vitrail": "no JSON"}, {"vitrail": "[]"}, {"vitrail": "{}"}])
def test_metadata_of_others_are_refused(strings: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"file\.onnx: is not an exported model"):
        from_strings(strings, "file.onnx")


def test_what_is_no_number_is_null_in_the_summary(tmp_path: Path) -> None:
    write_summary(tmp_path, {"agreement": float("nan"), "name": "Übung"})
    assert json.loads((tmp_path / "export.json").read_text(encoding="utf-8")) == {"agreement": None, "name": "Übung"}
