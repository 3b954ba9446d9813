from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch

from experiments.__main__ import main
from experiments.export import graphs as export_graphs
from experiments.export.weights import read_weights
from lightning_modules.checkpoint import load_task
from tests.experiments.conftest import error_line
from tests.support.runs import exported, flowers_onnx, products_onnx, products_run
from vitrail.predictions import read_predictions


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run to be changed, without exports."""
    leave_out = shutil.ignore_patterns("export")
    return Path(shutil.copytree(products_run(), tmp_path / "shop" / "20260101-100000", ignore=leave_out))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that the command ends with."""
    capsys.readouterr()
    assert main(["export", *(str(argument) for argument in arguments)]) == 2
    return error_line(capsys)


def test_an_export_decides_as_the_model_on_every_test_image() -> None:
    folder = products_onnx()
    summary = json.loads((folder / "export.json").read_text())
    own, form = summary["measured"]["forms"]
    predictions = read_predictions(products_run() / "predictions" / "test.parquet")
    rows = {row["what"]: row for row in form["parity"]}
    for task in ("class", "colour"):
        assert rows[task]["agreement"] == 1.0
        assert rows[task]["n"] == len(predictions)
        assert rows[task]["difference"] < 1e-4
        # Both accuracies are those of the run's own predictions.
        known = predictions.targets[task] >= 0
        right = (predictions.predicted(task) == predictions.targets[task])[known].mean()
        assert rows[task]["accuracy"] == pytest.approx([right, right])
    assert summary["tasks"] == {task: list(names) for task, names in predictions.tasks.items()}
    assert own["name"] == "PyTorch"


def test_the_file_alone_describes_the_model() -> None:
    model = onnx.load(products_onnx() / "model.onnx")
    onnx.checker.check_model(model)
    found = json.loads({entry.key: entry.value for entry in model.metadata_props}["vitrail"])
    task = load_task(products_run() / "checkpoints" / "best.ckpt")
    assert {"size": 32, "crop_fraction": 0.8, "interpolation": "bicubic"}.items() <= found["image"].items()
    assert found["weights"] == task.weights_digest()
    calibration = json.loads((products_run() / "checkpoints" / "calibration.json").read_text())
    assert found["temperatures"] == calibration["temperatures"]
    [image] = model.graph.input
    shape = [one.dim_param or one.dim_value for one in image.type.tensor_type.shape.dim]
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert shape == ["batch", 3, 32, 32]
    # No names of this machine's folders, which exporters leave in stack traces.
    assert str(Path(__file__).parents[2]).encode() not in (products_onnx() / "model.onnx").read_bytes()


@pytest.mark.slow
def test_a_dual_encoder_has_a_file_for_each_tower() -> None:
    folder = flowers_onnx()
    assert {path.name for path in folder.iterdir()} == {
        *("image.onnx", "text.onnx", "tokenizer.json", "predict.py", "export.json", "README.md")
    }
    _, form = json.loads((folder / "export.json").read_text())["measured"]["forms"]
    rows = {row["what"].split(" of ")[0]: row for row in form["parity"]}
    assert set(rows) == {"class", "image_embedding", "text_embedding", "nearest text"}
    assert rows["class"]["agreement"] == rows["nearest text"]["agreement"] == 1.0
    assert max(row["difference"] for row in rows.values()) < 1e-3


def test_torch_export_has_dynamic_batches_and_other_formats_stay(run: Path) -> None:
    other = run / "export" / "onnx"
    other.mkdir(parents=True)
    (other / "export.json").write_text("{}")
    folder = exported(run, "torch_export")
    assert (other / "export.json").read_text() == "{}"
    extra = {"vitrail": ""}
    program = torch.export.load(folder / "model.pt2", extra_files=extra)
    found = json.loads(extra["vitrail"])
    assert found["outputs"] == ["logits_class", "logits_colour", "image_embedding"]
    task = load_task(run / "checkpoints" / "best.ckpt")
    image = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = program.module()(image)[0]
        torch.testing.assert_close(logits, task(image)["class"])


def test_without_parity_nothing_is_left(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Swapped(export_graphs._Classifier):
        """Images mirrored upside down, as a mistake in preprocessing would have them."""

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return super().forward(image.flip(1))

    monkeypatch.setattr(export_graphs, "_Classifier", Swapped)
    line = refused(capsys, run, "--format", "torch_export")
    assert "does not reproduce the model" in line
    assert "nothing was written" in line
    assert not (run / "export").exists()


def test_an_older_export_is_replaced_only_by_a_good_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = exported(run, "safetensors")
    before = read_weights(folder).weights_digest()
    (folder / "mine.txt").write_text("of an older version")
    monkeypatch.setattr("experiments.export.exporter.TOLERANCE", {"": -1.0})
    refused(capsys, run, "--format", "safetensors")
    assert (folder / "mine.txt").exists()
    monkeypatch.undo()
    exported(run, "safetensors")
    assert not (folder / "mine.txt").exists()
    assert read_weights(folder).weights_digest() == before
    assert [path.name for path in (run / "export").iterdir()] == ["safetensors"]


def test_a_folder_that_is_no_export_is_left_alone(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "to" / "safetensors").mkdir(parents=True)
    (tmp_path / "to" / "safetensors" / "thesis.txt").write_text("years of work")
    line = refused(capsys, run, "--format", "safetensors", "--to", tmp_path / "to")
    assert "not an export" in line
    assert (tmp_path / "to" / "safetensors" / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["safetensors"]


def test_what_is_missing_is_reported_in_one_line(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "nowhere" in refused(capsys, tmp_path / "nowhere")
    assert "it has best, last" in refused(capsys, run, "--checkpoint", "other")
    assert "--min-agreement" in refused(capsys, run, "--min-agreement", "2")
    assert "labels.csv" in refused(capsys, run, "--data-root", tmp_path / "moved")
    (run / "config.yaml").unlink()
    assert "config.yaml" in refused(capsys, run)


def test_a_missing_library_is_reported_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'vitrail[export]'" in refused(capsys, "nowhere")


def test_the_temperatures_of_another_checkpoint_are_left_out(run: Path) -> None:
    shutil.copyfile(run / "checkpoints" / "last.ckpt", run / "checkpoints" / "other.ckpt")
    folder = exported(run, "safetensors", "--checkpoint", "other")
    assert json.loads((folder / "export.json").read_text())["temperatures"] == {}
