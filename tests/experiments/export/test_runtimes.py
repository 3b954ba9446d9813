"""OpenVINO, ExecuTorch, Core ML, and ONNX in 16 bits."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from experiments.__main__ import main
from experiments.export import add_arguments
from experiments.export.parity import Form, Parity, parity_table
from experiments.export.predict_onnx import Model, PredictError
from experiments.export.runtimes import (
    COREML_UNMEASURED,
    alone,
    bf16_runner,
    rows_of,
    write_onnx_bf16,
    write_onnx_fp16,
    write_openvino,
)
from experiments.export.weights import KEY
from tests.experiments.conftest import error_line
from tests.experiments.export.test_graphs import ready_classifier, ready_pair
from tests.support.runs import flowers_run, kinds_run, products_onnx, products_run
from vitrail.errors import UserError
from vitrail.runs import Run


def images(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def openvino_folder(tmp_path: Path) -> Path:
    """The products' classifier in OpenVINO's format."""
    pytest.importorskip("openvino")
    found = {entry.key: entry.value for entry in onnx.load(products_onnx() / "model.onnx").metadata_props}
    write_openvino(products_onnx() / "model.onnx", tmp_path / "model.xml", {KEY: found[KEY]}, fp16=False)
    return tmp_path


def test_predict_takes_openvinos_files_as_it_takes_onnx(openvino_folder: Path) -> None:
    own, other = Model(products_onnx(), threads=1), Model(openvino_folder, threads=1)
    assert other.metadata == own.metadata
    for count in (1, 3):
        expected, found = own(images(count)), other(images(count))
        assert list(found) == list(expected)
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, atol=1e-4)


def test_changed_weights_of_openvino_are_refused(openvino_folder: Path) -> None:
    (openvino_folder / "export.json").write_text(json.dumps({"sha256": {"model.bin": "0" * 64}}))
    with pytest.raises(PredictError, match=r"model\.bin: is not the file that was exported"):
        Model(openvino_folder)


def test_onnx_in_float16_is_half_as_large_and_takes_and_gives_the_same_types(tmp_path: Path) -> None:
    write_onnx_fp16(products_onnx() / "model.onnx", tmp_path / "model.onnx")
    before, after = ((folder / "model.onnx").stat().st_size for folder in (products_onnx(), tmp_path))
    assert after < 0.6 * before
    own, other = Model(products_onnx(), threads=1), Model(tmp_path, threads=1)
    assert other.metadata == own.metadata
    expected, found = own(images(4)), other(images(4))
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        assert 0 < np.abs(found[name] - values).max() < 0.02 * max(1, np.abs(values).max())


def test_onnx_runtime_without_bfloat16_kernels_is_reported_with_the_fix(tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "add", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "a.onnx")
    with pytest.raises(UserError, match=r"no bfloat16 kernels for this network here .* choose --format onnx_fp16"):
        bf16_runner(tmp_path / "a.onnx")


@pytest.mark.slow
def test_a_network_in_bfloat16_is_written_as_such(tmp_path: Path) -> None:
    from experiments.export.graphs import towers_of

    [tower] = towers_of(ready_classifier())
    write_onnx_bf16(tower, tmp_path / "model.onnx", {})
    weights = [one.data_type for one in onnx.load(tmp_path / "model.onnx").graph.initializer if len(one.dims) == 4]
    assert weights
    assert set(weights) == {TensorProto.BFLOAT16}


def test_rows_are_batches_of_one_and_texts_are_padded_to_their_full_length(tmp_path: Path) -> None:
    from experiments.export.graphs import towers_of

    image, text = towers_of(ready_pair(tmp_path))
    assert [row["image"].shape[0] for row in rows_of({"image": images(3)}, image)] == [1, 1, 1]
    ids = np.array([[5, 6, 7]])
    [row] = rows_of({"input_ids": ids, "attention_mask": np.ones_like(ids)}, text)
    length = alone(text).inputs["input_ids"].shape[1]
    assert length == 20
    assert row["input_ids"].tolist() == [[5, 6, 7, *[text.pad_id] * 17]]
    assert row["attention_mask"].tolist() == [[1, 1, 1, *[0] * 17]]


def test_a_form_that_was_not_measured_is_shown_as_such() -> None:
    rows = [Parity("class", 50, 0.98, 0.001, 4.0), Parity("image_embedding", 50, math.nan, 0.001, 1.0)]
    table = parity_table([Form("PyTorch", 100, rows, {}), Form("coreml, float32", 120, [], {}, COREML_UNMEASURED)])
    assert table.rows[0][2] == "0.980 [0.895, 0.996] of 50"
    assert table.rows[1] == ["coreml, float32", "0.00 MB, 1.20", "not measured", "not measured"]


def test_what_cannot_be_combined_or_is_not_installed_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "nowhere", "--format", "openvino", "--quantize", "int8"]) == 2
    assert "openvino is not written in eight bits" in error_line(capsys)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", "nowhere", "--format", "executorch", "coreml_fp16"]) == 2
    assert error_line(capsys).endswith(
        "needs executorch, coremltools; install with `pip install 'vitrail[coreml,executorch]'`"
    )


def test_every_format_is_an_option() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    kinds = ["onnx_fp16", "onnx_bf16", "openvino", "openvino_fp16", "executorch", "coreml", "coreml_fp16"]
    assert parser.parse_args(["run", "--format", *kinds]).format == kinds


FORMATS = ("onnx_fp16", "openvino", "openvino_fp16", "executorch", "coreml", "coreml_fp16")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["products", "flowers", "kinds"])
def test_every_kind_of_model_is_exported_and_compared(kind: str, tmp_path: Path) -> None:
    """A classifier of two tasks, a dual encoder with adapters, and tasks of every kind."""
    for library in ("openvino", "executorch", "coremltools"):
        pytest.importorskip(library)
    run = {"products": products_run, "flowers": flowers_run, "kinds": kinds_run}[kind]()
    assert main(["export", str(run), "--format", *FORMATS, "--to", str(tmp_path)]) == 0
    for name in FORMATS:
        summary = json.loads((tmp_path / name / "export.json").read_text())
        _, form = summary["measured"]["forms"]
        assert all((tmp_path / name / file).is_file() for file in summary["files"])
        if name.startswith("coreml") and sys.platform != "darwin":
            assert form["unmeasured"] == COREML_UNMEASURED
            assert form["parity"] == []
            continue
        assert form["unmeasured"] == ""
        choices = [row["agreement"] for row in form["parity"] if row["agreement"] is not None]
        assert choices
        assert min(choices) >= (0.98 if name.endswith("fp16") else 1)


@pytest.mark.slow
def test_core_ml_programs_have_the_models_names_and_metadata(tmp_path: Path) -> None:
    coremltools = pytest.importorskip("coremltools")
    assert main(["export", str(products_run()), "--format", "coreml", "--to", str(tmp_path)]) == 0
    description = coremltools.models.MLModel(str(tmp_path / "coreml" / "model.mlpackage"), skip_model_load=True)
    spec = description.get_spec().description
    assert [one.name for one in spec.input] == ["image"]
    assert list(spec.input[0].type.multiArrayType.shape) == [1, 3, 32, 32]
    assert [one.name for one in spec.output] == ["logits_class", "logits_colour", "image_embedding"]
    assert json.loads(spec.metadata.userDefined[KEY])["tasks"] == Model(products_onnx()).metadata["tasks"]


@pytest.mark.slow
def test_beyond_the_tolerance_of_the_precision_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(products_run(), tmp_path / "run", ignore=shutil.ignore_patterns(Run.EXPORTS)))
    monkeypatch.setattr("experiments.export.exporter.TOLERANCE", {"fp16": 1e-9})
    capsys.readouterr()
    assert main(["export", str(run), "--format", "onnx_fp16"]) == 2
    assert "onnx, fp16 does not reproduce the model" in error_line(capsys)
    assert not (run / Run.EXPORTS).exists()
