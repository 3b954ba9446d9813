from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from experiments.__main__ import main
from experiments.export.graphs import graph_of, program_runner, towers_of, write_onnx, write_torch_export
from experiments.export.quantize import calibration_images, quantize_onnx, quantize_program, quantize_weights
from experiments.export.weights import read_weights, write_weights
from lightning_modules.base import VisionTask
from lightning_modules.checkpoint import load_task
from retrieval.search.exact import integer_products
from tests.experiments.export.test_graphs import ready_pair
from tests.support.runs import data_of, exported, products_onnx, products_run
from vitrail.errors import UserError


@pytest.fixture(scope="module")
def task() -> VisionTask:
    return load_task(products_run() / "checkpoints" / "best.ckpt")


@pytest.fixture(scope="module")
def eight_bits() -> Path:
    """The classifier in eight bits by ONNX Runtime, timed.

    On processors without VNNI, ONNX Runtime's sums of products of bytes saturate, so that agreement is lower there.
    """
    return exported(
        products_run(), "onnx", "--quantize", "int8", "--min-agreement", "0.6", "--repeats", "2", "--batch-sizes", "2"
    )


def test_onnx_in_eight_bits_is_smaller_and_compared_with_the_model(eight_bits: Path) -> None:
    summary = json.loads((eight_bits / "export.json").read_text())
    own, plain, rounded = summary["measured"]["forms"]
    assert [form["name"] for form in (own, plain, rounded)] == ["PyTorch", "onnx, float32", "onnx, int8 (ONNX Runtime)"]
    assert rounded["size"] < 0.7 * plain["size"]
    assert rounded["size"] == (eight_bits / "model.onnx").stat().st_size
    choices = [row for row in rounded["parity"] if row["agreement"] is not None]
    assert {row["what"] for row in choices} == {"class", "colour"}
    assert all(row["agreement"] >= (0.8 if integer_products() else 0.6) and row["difference"] > 0 for row in choices)
    # Interleaved: as many rounds for each, ratios to the model itself.
    assert [len(form["costs"]["2"]["seconds"]) for form in (own, plain, rounded)] == [2, 2, 2]
    assert own["costs"]["2"]["ratios"] == [1.0, 1.0]
    model = onnx.load(eight_bits / "model.onnx")
    weights = {one.name for one in model.graph.initializer if one.data_type == onnx.TensorProto.INT8}
    assert len(weights) > 5
    assert json.loads({one.key: one.value for one in model.metadata_props}["vitrail"])["tasks"] == summary["tasks"]
    assert not [path for path in eight_bits.iterdir() if path.name.startswith(".")]


def test_too_little_agreement_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # The plain file is as it was exported before, which has to be now: what exports is replaced below.
    products_onnx()
    monkeypatch.setattr("experiments.export.exporter.Exporter._write", _copy_export)
    # As if rounding had left nothing of the heads' weights.
    monkeypatch.setattr("experiments.export.exporter.Exporter._write_quantised", _write_constant)
    arguments = [str(products_run()), "--quantize", "int8", "--repeats", "0", "--to", str(products_run() / "other")]
    capsys.readouterr()
    assert main(["export", *arguments]) == 2
    assert "int8 (ONNX Runtime) does not reproduce the model" in capsys.readouterr().err
    assert not (products_run() / "other").exists()


def _copy_export(self: object, kind: str, folder: Path) -> None:
    shutil.copyfile(products_onnx() / "model.onnx", folder / "model.onnx")


def _write_constant(self: object, kind: str, plain: Path, folder: Path) -> None:
    model = onnx.load(plain / "model.onnx")
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and len(weight.dims) == 2:
            zeros = np.zeros(list(weight.dims), np.float32)
            weight.CopyFrom(onnx.numpy_helper.from_array(zeros, weight.name))
    onnx.save(model, folder / "model.onnx")


@pytest.mark.slow
def test_torchao_makes_eight_bit_graphs_for_any_batch(task: VisionTask, tmp_path: Path) -> None:
    [tower] = towers_of(task)
    program = graph_of(tower)
    calibration = calibration_images(data_of(products_run()))
    rounded = quantize_program(program, tower, calibration)
    assert any(value.dtype == torch.int8 for value in rounded.state_dict.values())
    write_torch_export(program, tmp_path / "plain.pt2", {})
    write_torch_export(rounded, tmp_path / "rounded.pt2", {})
    run = program_runner(tmp_path / "rounded.pt2", tower)
    images = np.concatenate(calibration)[:5]
    with torch.no_grad():
        own = task(torch.from_numpy(images))
    found = run({"image": images})
    assert set(found) == {"logits_class", "logits_colour", "image_embedding"}
    for name in ("class", "colour"):
        gap = np.abs(found[f"logits_{name}"] - own[name].numpy()).max()
        assert 0 < gap < 0.25 * own[name].abs().max()


@pytest.mark.slow  # exports another model
def test_texts_are_quantised_dynamically(tmp_path: Path) -> None:
    pair = ready_pair(tmp_path)
    tower = towers_of(pair)[1]
    rounded = quantize_program(graph_of(tower), tower, [])
    for texts in (["a rose"], ["a photo of a tulip.", "x", "a longer text than the others"]):
        tokens = pair.towers.tokenizer(texts)
        with torch.no_grad():
            [found] = rounded.module()(tokens["input_ids"], tokens["attention_mask"])
            own = pair.encode_text(texts)
        assert float((found * own).sum(dim=1).min()) > 0.98
        assert float((found - own).abs().max()) > 0


TEXT_TOWERS: dict[str, dict[str, Any]] = {
    # Bidirectional with and without an offset of positions, an embedding narrower than the layers, relative positions.
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "distilbert": {"dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "electra": {"embedding_size": 16},
    "mpnet": {"pad_token_id": 1},
}
"""Each 24 wide, so that a projection to another length is not square."""


def _text_towers(folder: Path, kind: str) -> dict[str, Any]:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    values = {"model_type": kind, "vocab_size": 400, "max_position_embeddings": 40, **sizes, **TEXT_TOWERS[kind]}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    towers = {"image": "test_resnet", "image_pretrained": False, "text": str(folder), "text_pretrained": False}
    return {"towers": {**towers, "embed_dim": 10, "pooling": "mean"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["clip", *(pytest.param(kind, marks=pytest.mark.slow) for kind in TEXT_TOWERS)],
)
def test_onnx_runtime_quantises_texts_that_are_projected_to_another_length(kind: str, tmp_path: Path) -> None:
    pair = ready_pair(tmp_path, **({} if kind == "clip" else _text_towers(tmp_path, kind)))
    tower = towers_of(pair)[1]
    write_onnx(graph_of(tower), tower, tmp_path / "plain.onnx", {"vitrail": "kept"})
    quantize_onnx(tmp_path / "plain.onnx", tmp_path / "rounded.onnx", tower, [])
    made = onnx.load(tmp_path / "rounded.onnx")
    assert {one.key: one.value for one in made.metadata_props} == {"vitrail": "kept"}
    matrices = sum(one.data_type == onnx.TensorProto.INT8 for one in made.graph.initializer)
    # Six matrices in each of the two layers, and at least one that projects.
    assert matrices >= 13
    session = onnxruntime.InferenceSession(str(tmp_path / "rounded.onnx"))
    for texts in (["a rose"], ["a photo of a tulip.", "x", "a longer text than the others"]):
        tokens = {name: values.numpy() for name, values in pair.towers.tokenizer(texts).items()}
        [found] = session.run(None, tokens)
        with torch.no_grad():
            own = pair.encode_text(texts).numpy()
        assert (found * own).sum(axis=1).min() > (0.98 if integer_products() else 0.95)
        assert np.abs(found - own).max() > 0


def test_weights_of_linear_layers_come_back_from_safetensors(task: VisionTask, tmp_path: Path) -> None:
    rounded = copy.deepcopy(task)
    quantize_weights(rounded)
    write_weights(rounded, tmp_path / "model.safetensors", {"version": 1})
    found = read_weights(tmp_path)
    images = torch.from_numpy(np.concatenate(calibration_images(data_of(products_run())))[:4])
    with torch.no_grad():
        own, other, before = rounded(images), found(images), task(images)
    for name in ("class", "colour"):
        torch.testing.assert_close(other[name], own[name], atol=0, rtol=0)
        assert not torch.equal(own[name], before[name])


def test_calibration_takes_training_images_from_everywhere() -> None:
    data = data_of(products_run())
    rows = data.split_indices("train")
    some = calibration_images(data, 4)
    assert sum(len(batch) for batch in some) == 4
    expected = data.rows_dataloader(rows[[0, 9, 17, 26]])
    assert np.array_equal(np.concatenate(some), np.concatenate([batch["image"].numpy() for batch in expected]))


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(UserError, match="no linear layers"):
        quantize_weights(cast("VisionTask", nn.Sequential(nn.Conv2d(3, 4, 1))))


@pytest.mark.slow
def test_compiled_graphs_output_the_same(task: VisionTask, tmp_path: Path) -> None:
    """What is timed is compiled; that takes minutes."""
    [tower] = towers_of(task)
    program = graph_of(tower)
    images = calibration_images(data_of(products_run()))
    forms = {"plain": program, "rounded": quantize_program(program, tower, images)}
    for name, one in forms.items():
        path = tmp_path / f"{name}.pt2"
        write_torch_export(one, path, {})
        inputs = {"image": np.concatenate(images)[:3]}
        own = program_runner(path, tower)(inputs)
        compiled = program_runner(path, tower, compiled=True)(inputs)
        for output, values in own.items():
            # Eight-bit kernels may round a value that lies between two steps to the other one.
            np.testing.assert_allclose(compiled[output], values, atol=0.05 * np.abs(values).max())
