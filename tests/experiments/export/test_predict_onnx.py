from __future__ import annotations

import io
import json
import math
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from app.state.context import Limits
from app.state.exports import ServedExport
from datamodules.loading.decode import read_image
from datamodules.loading.transforms import eval_transform
from evaluation.commands.ood import OodOutputs, fit_detector
from experiments.export import predict_onnx
from experiments.export.predict_onnx import (
    Model,
    PredictError,
    _text,
    answers,
    familiarity,
    main,
    prepared,
    read_arrays,
    write_rows,
)
from experiments.export.weights import metadata_of
from lightning_modules.checkpoint import load_task
from tests.support.runs import (
    data_of,
    exported,
    flowers_onnx,
    flowers_run,
    kinds_onnx,
    kinds_run,
    products_onnx,
    products_run,
)
from vitrail.errors import UserError
from vitrail.files import read_csv
from vitrail.ood import METHODS, Detector, scores_of, write_detector
from vitrail.predictions import OperatingPoint, read_predictions
from vitrail.programs import main as vitrail
from vitrail.runs import Run
from vitrail.types import TaskKind

ALONE = """
import runpy, sys
sys.argv = ["predict.py", *sys.argv[2:]]
sys.path[:] = [path for path in sys.path if path != ""]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
ours = ("torch", "lightning", "transformers", "experiments", "datamodules", "lightning_modules", "evaluation")
assert not [name for name in ours if name in sys.modules], "not alone"
"""


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(products_onnx(), threads=1)


def test_the_copy_next_to_the_model_needs_no_torch_and_predicts_as_the_run(tmp_path: Path) -> None:
    data = data_of(products_run())
    predictions = read_predictions(products_run() / "predictions" / "test.parquet")
    paths = [str(data.table.source(row)) for row in predictions.sample_id]
    script = str(products_onnx() / "predict.py")
    command = [sys.executable, "-c", ALONE.format(script=script), "predict", *paths, "--top", "3", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    answers = json.loads(done.stdout)
    temperatures = json.loads((products_run() / "checkpoints" / "calibration.json").read_text())["temperatures"]
    probabilities = predictions.probabilities("class", temperatures["class"])
    for answer, row, path in zip(answers, probabilities, paths, strict=True):
        assert answer["image"] == path
        found = {one["label"]: one["probability"] for one in answer["class"]}
        assert list(found.values()) == sorted(found.values(), reverse=True)
        for name, value in zip(predictions.tasks["class"], row, strict=True):
            # Pillow and torch round a few pixels of a resized image differently.
            assert found[name] == pytest.approx(value, abs=0.02)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("fraction", [0.8, 1.0])
@pytest.mark.parametrize("how", [{}, {"crop_rounding": "down"}, {"resize": "squash"}, {"resize": "pad"}], ids=str)
@pytest.mark.parametrize("size", [(50, 31), (31, 50), (200, 123), (32, 32), (40, 40), (7, 90)])
def test_pixels_are_those_of_the_evaluation_transform(
    tmp_path: Path, model: Model, size: tuple[int, int], interpolation: str, fraction: float, how: dict[str, str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    options = {"size": 32, "crop_fraction": fraction, "interpolation": interpolation, **how}
    own = eval_transform(options)(read_image(tmp_path / "image.png")).numpy()  # type: ignore[arg-type]  # as JSON
    with Image.open(tmp_path / "image.png") as image:
        found = prepared(image, options)
    assert found.shape == own.shape
    assert np.abs(found.astype(int) - own.astype(int)).max() <= 1


def drawn_image(mode: str) -> bytes:
    """A smooth image in a colour mode, as file content."""
    x, y = np.meshgrid(np.arange(40), np.arange(40))
    rgb = Image.fromarray(np.stack([x * 6, y * 6, 255 - x * 6], axis=-1).astype(np.uint8))
    buffer = io.BytesIO()
    if mode == "turned":
        exif = Image.Exif()
        exif[274] = 6
        rgb.save(buffer, format="PNG", exif=exif)
    elif mode == "I;16":
        Image.fromarray((x * 1600).astype(np.uint16)).save(buffer, format="PNG")
    elif mode == "RGBA":
        rgba = rgb.convert("RGBA")
        rgba.putalpha(Image.fromarray((y * 6).astype(np.uint8)))
        rgba.save(buffer, format="PNG")
    else:
        rgb.convert(mode).save(buffer, format="TIFF" if mode == "CMYK" else "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "LA", "RGBA", "I;16", "turned"])
def test_files_are_read_as_in_training(tmp_path: Path, model: Model, mode: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(drawn_image(mode))
    own = eval_transform({"size": 32, "crop_fraction": 0.8, "interpolation": "bicubic"})(read_image(path)).numpy()
    assert np.abs(model.read(path).astype(int) - own.astype(int)).max() <= 1


def deep(kind: str) -> bytes:
    """A smooth image of 12 bits a channel, as file content."""
    values = np.add.outer(np.arange(40), np.arange(40)).astype(np.uint16) * 52
    if kind == "float":
        image = Image.fromarray(values.astype(np.float32))
    elif kind == "32 bits":
        image = Image.fromarray(values.astype(np.int32))
    else:
        image = Image.fromarray(values.astype(">u2") if kind == "big-endian" else values)
    buffer = io.BytesIO()
    options = {"tiffinfo": {262: 0}} if kind == "white is zero" else {}
    image.save(buffer, format="PNG" if kind == "PNG" else "TIFF", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian", "32 bits", "float", "white is zero"])
def test_deep_images_are_read_in_the_range_of_training(tmp_path: Path, model: Model, kind: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(deep(kind))
    with pytest.raises(PredictError, match="of unknown range; save it with 8 bits"):
        model.read(path)
    for chosen in ([0, 4095], [100, 3000]):
        options = {"size": 32, "crop_fraction": 0.8, "interpolation": "bicubic", "value_range": chosen}
        taught = Model(products_onnx(), threads=1)
        taught.metadata = {**model.metadata, "image": options}
        own = eval_transform(options)(read_image(path, value_range=chosen)).numpy()  # type: ignore[arg-type]  # as JSON
        assert np.abs(taught.read(path).astype(int) - own.astype(int)).max() <= 1


def test_the_same_files_are_refused_and_strips_cost_as_little(tmp_path: Path, model: Model) -> None:
    Image.init()
    Image.new("RGB", (20, 20)).save(tmp_path / "eps", format="EPS")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "eps").read_bytes())
    with pytest.raises(PredictError, match="not an image in a known format"):
        model.read(tmp_path / "a.jpg")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.png").write_bytes(bytes(content))
    with pytest.raises(PredictError, match="wrong checksum"):
        model.read(tmp_path / "a.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1, 80_000, 3), dtype=np.uint8)).save(tmp_path / "b.png")
    own = eval_transform(model.metadata["image"])(read_image(tmp_path / "b.png")).numpy()
    assert np.abs(model.read(tmp_path / "b.png").astype(int) - own.astype(int)).max() <= 1


def color(value_bits: int, transparency: bytes = b"", kept: int = 40) -> bytes:
    """A PNG with 16 bits a channel of color, which Pillow cannot write, as file content."""
    ramp = np.add.outer(np.arange(40), np.arange(40)) * ((2**value_bits - 1) // 78)
    rows = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=-1).astype(">u2")
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows[:kept]))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)), (b"tRNS", transparency), (b"IDAT", body)]
    written = [(kind, data) for kind, data in [*chunks, (b"IEND", b"")] if data or kind == b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in written
    )


def test_the_limit_of_pixels_can_be_changed(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), (200, 0, 0)).save(tmp_path / "a.png")
    assert Model(products_onnx(), threads=1, max_pixels=600).read(tmp_path / "a.png").shape == (3, 32, 32)
    with pytest.raises(PredictError, match=r"a\.png: .*more than 599 pixels, the limit; raise it with --max-pixels"):
        Model(products_onnx(), threads=1, max_pixels=599).read(tmp_path / "a.png")


@pytest.mark.parametrize("value_range", ["auto", "dtype", [0, 65535]], ids=str)
def test_color_of_16_bits_is_read_as_in_training(tmp_path: Path, model: Model, value_range: Any) -> None:
    taught = Model(products_onnx(), threads=1)
    options = {"size": 32, "crop_fraction": 0.8, "interpolation": "bicubic", "value_range": value_range}
    taught.metadata = {**model.metadata, "image": options}
    (tmp_path / "deep").write_bytes(color(16))
    own = eval_transform(options)(read_image(tmp_path / "deep", value_range=value_range)).numpy()  # type: ignore[arg-type]
    assert np.ptp(own) > 100
    assert np.abs(taught.read(tmp_path / "deep").astype(int) - own.astype(int)).max() <= 1
    (tmp_path / "half").write_bytes(color(16, kept=20))
    with pytest.raises(PredictError, match="damaged: has 4820 of 9640 bytes"):
        taught.read(tmp_path / "half")
    (tmp_path / "clear").write_bytes(color(16, b"\0\0\0\0\0\0"))
    for read in (taught.read, lambda path: read_image(path, value_range=value_range)):
        with pytest.raises(ValueError, match="16 bits a channel with a transparent color"):
            read(tmp_path / "clear")


def test_color_of_16_bits_that_uses_fewer_is_refused_rather_than_read_black(tmp_path: Path, model: Model) -> None:
    (tmp_path / "dark").write_bytes(color(12))
    with pytest.raises(PredictError, match="of unknown range; save it with 8 bits"):
        model.read(tmp_path / "dark")
    taught = Model(products_onnx(), threads=1)
    taught.metadata = {**model.metadata, "image": {**model.metadata["image"], "value_range": [0, 4095]}}
    with pytest.raises(PredictError, match="16 bits a channel in color of which fewer are used"):
        taught.read(tmp_path / "dark")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_damaged_jpeg_is_refused_where_training_refuses_it(
    tmp_path: Path, model: Model, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format="JPEG", quality=90)
    whole, refused = buffer.getvalue(), []
    middle = len(whole) // 2
    files = {"whole": whole, "cut": whole[:middle], "trailing": whole + b"more"}
    files["overwritten"] = whole[:middle] + b"\xff\xd9" + whole[middle + 2 :]  # the end of the image in its middle
    for name, content in files.items():
        path = tmp_path / f"{name}.jpg"
        path.write_bytes(content)
        refusals = []
        for read in (model.read, read_image):
            try:
                read(path)
            except ValueError as error:
                refusals.append(str(error))
        assert len(refusals) in (0, 2), (name, refusals)
        refused += [name] if refusals else []
    assert refused == ["cut", "overwritten"]
    # Without simplejpeg, which is no requirement, what Pillow reads is read.
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert model.read(tmp_path / "whole.jpg").shape == (3, 32, 32)
    with pytest.raises(PredictError, match="truncated"):
        model.read(tmp_path / "cut.jpg")


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_a_folder_is_written_as_vitrail_predict_writes_it(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = data_of(products_run())
    Path("photos/deep").mkdir(parents=True)
    for row in data.split_indices("test").tolist()[:3]:
        shutil.copy(data.table.source(row), f"photos/deep/={row}.png")
    Path("photos/broken.png").write_bytes(b"no image")
    Path("photos/notes.txt").write_text("no image either")

    arguments = ["photos", "--top", "2", "--to", f"alone.{suffix}", "--model", str(products_onnx())]
    capsys.readouterr()  # what training and export printed
    assert main(arguments) == 0
    assert vitrail("vitrail", ["predict", str(products_run()), "photos", "--top", "2", "--to", f"ours.{suffix}"]) == 0

    alone, ours = (
        read_csv(Path(f"{name}.csv")) if suffix == "csv" else pd.read_json(f"{name}.{suffix}", lines=suffix == "jsonl")
        for name in ("alone", "ours")
    )
    assert capsys.readouterr().out.splitlines()[0] == f"alone.{suffix}: 4 images, 1 of them unreadable"
    assert alone["image"].tolist() == ours["image"].tolist()
    assert {*alone.columns} == {*ours.columns}
    assert alone["class"].tolist()[1:] == ours["class"].tolist()[1:]
    assert alone["class_confidence"].tolist()[1:] == pytest.approx(ours["class_confidence"].tolist()[1:], abs=0.02)
    assert alone["error"].notna().tolist() == [True, False, False, False]
    assert sorted(path.name for path in Path().iterdir()) == sorted([f"alone.{suffix}", f"ours.{suffix}", "photos"])


def test_texts_are_compared_as_by_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    task = load_task(flowers_run() / "checkpoints" / "best.ckpt")
    path = data_of(flowers_run()).table.source(0)
    texts = ["a photo of a rose", "x", "two dogs play in the snow " * 9]
    arguments = [str(path), "--model", str(flowers_onnx()), "--json"]
    capsys.readouterr()  # what the export printed
    assert main([*arguments, *(part for text in texts for part in ("--text", text))]) == 0
    [answer] = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        image = eval_transform({"size": 32, "crop_fraction": 1.0, "interpolation": "bicubic"})(read_image(str(path)))
        own = (task.encode_image(image[None]) @ task.encode_text(texts).T)[0]  # type: ignore[operator]
    assert [one["text"] for one in answer["texts"]] == texts
    assert [one["cosine"] for one in answer["texts"]] == pytest.approx(own.tolist(), abs=0.01)


def test_a_model_of_images_and_texts_without_classes_asks_for_texts(tmp_path: Path) -> None:
    model = Model(flowers_onnx())
    model.metadata = {**model.metadata, "tasks": {}}
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    photos = [str(tmp_path / "photo.png")]
    with pytest.raises(PredictError, match=r"^--text: .* give one or more texts"):
        answers(model, photos, [], 1)
    with pytest.raises(PredictError, match="no classes to write"):
        write_rows(model, photos, tmp_path / "out.csv", 1)
    [answer] = answers(model, photos, ["a rose"], 1)
    assert [one["text"] for one in answer["texts"]] == ["a rose"]


def test_a_task_that_is_called_like_a_column_has_a_column_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.__new__(Model)  # without a graph
    model.metadata = {"tasks": {"error": ["chip", "crack"]}}
    answer = {"image": "a.jpg", "error": [{"label": "chip", "probability": 0.75}]}
    monkeypatch.setattr(predict_onnx, "answers", lambda *_: [answer])
    [row] = predict_onnx.rows(model, ["a.jpg"], 1)
    assert row == {
        "image": "a.jpg", "attribute error": "chip", "attribute error_confidence": 0.75, "error": None
    }  # fmt: skip


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.jpg").write_text("no image")
    for name in ("damaged", "of others"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / "model.onnx").write_bytes((products_onnx() / "model.onnx").read_bytes()[:5000])
    other = onnx.load(products_onnx() / "model.onnx")
    del other.metadata_props[:]
    onnx.save(other, tmp_path / "of others" / "model.onnx")
    for arguments, said in (
        ([str(tmp_path / "no.jpg"), "--model", str(products_onnx())], "no.jpg"),
        ([str(tmp_path / "none.jpg"), "--model", str(products_onnx())], "no such file"),
        (["x.jpg", "--model", str(tmp_path)], "no model.onnx"),
        (["x.jpg", "--model", str(tmp_path / "damaged")], "cannot be loaded"),
        (["x.jpg", "--model", str(tmp_path / "of others")], "was not exported"),
        (["x.jpg", "--model", str(products_onnx()), "--text", "a"], "reads no texts"),
    ):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1


def test_answers_are_readable(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(data_of(products_run()).table.source(0))
    assert main([path, "--model", str(products_onnx()), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == path
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["class", "colour"]
    assert lines[1].count("(0.") + lines[1].count("(1.") == 2


def test_equal_classes_are_no_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(data_of(products_run()).table.source(0))
    own, others = Model.__call__, [1.0]

    def made(self: Model, images: np.ndarray[Any, Any]) -> dict[str, Any]:
        outputs = own(self, images)
        outputs["logits_class"][:] = np.float32(1)
        outputs["logits_colour"][:] = np.float32(others[0])
        outputs["logits_colour"][0, 1] = 2
        return outputs

    monkeypatch.setattr(Model, "__call__", made)
    for others[0], colours in ((1.0, 2), (np.nan, 1)):
        assert main([path, "--model", str(products_onnx()), "--top", "2", "--json"]) == 0
        [answer] = json.loads(capsys.readouterr().out)
        [said] = answer["class"]
        assert said["label"] is None
        assert 0 < said["probability"] < 1
        assert len(answer["colour"]) == colours
        assert (answer["colour"][0]["label"] is None) == (colours == 1)
        assert main([path, "--model", str(products_onnx())]) == 0
        assert capsys.readouterr().out.count("(no prediction)") == (1 if colours == 2 else 2)
    assert answer["colour"] == [{"label": None, "probability": None}]


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(self: Model, path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "read", stop)
    assert main(["x.jpg", "--model", str(products_onnx())]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    # Also while the program is still being loaded, when nothing could catch an exception.
    script = str(products_onnx() / "predict.py")
    code = f"""
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Press:
    def find_spec(self, name, *_):
        if name == "onnxruntime":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Press())
sys.argv = ["predict.py", "x.jpg"]
runpy.run_path({script!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_weights_missing_renamed_reshaped_added_or_changed_are_refused(tmp_path: Path) -> None:
    """In one line: the file is not the one that was exported, whether or not ONNX Runtime would take it."""
    shutil.copytree(products_onnx(), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.onnx"
    Model(tmp_path, threads=1)  # intact

    def change(kind: str) -> None:
        graph = onnx.load(products_onnx() / "model.onnx")
        weights = graph.graph.initializer
        weight = next(one for one in weights if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) == 1)
        values = onnx.numpy_helper.to_array(weight)
        if kind == "missing":
            weights.remove(weight)
        elif kind == "renamed":
            weight.name += "x"
        elif kind == "added":
            weights.append(onnx.numpy_helper.from_array(values, "nonsense"))
        else:
            # A vector of length one is broadcast: nothing would fail.
            changed = values[:1] if kind == "reshaped" else values + 1
            weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
        onnx.save(graph, path)

    for kind in ("missing", "renamed", "reshaped", "added", "changed"):
        change(kind)
        with pytest.raises(PredictError, match="is not the file that was exported") as refusal:
            Model(tmp_path, threads=1)
        assert "\n" not in str(refusal.value)
    (tmp_path / "export.json").write_text("{")
    with pytest.raises(PredictError, match=r"export\.json: cannot be read"):
        Model(tmp_path, threads=1)


@pytest.fixture(scope="module")
def wares(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Images of the run's size, so that nothing is scaled."""
    root = tmp_path_factory.mktemp("wares")
    data = data_of(kinds_run())
    for row in range(8):
        pixels = data.dataset("test")[row]["image"].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / f"{row}.png")
    return sorted(map(str, root.iterdir()))


def test_tasks_of_every_kind_are_predicted_as_by_the_run(wares: list[str]) -> None:
    own_model, run = Model(kinds_onnx(), threads=1), Run(kinds_run())
    outputs = own_model(np.stack([own_model.read(path) for path in wares]))
    shares, values = own_model.probabilities(outputs), own_model.values(outputs)
    own = list(run.predict(wares))
    assert set(shares) | set(values) == set(own[0].tasks)
    assert own[0].tasks["class"].calibrated
    for place, one in enumerate(own):
        for task, prediction in one.tasks.items():
            if prediction.kind == "regression":
                numbers, spreads = values[task]
                assert spreads is not None
                assert numbers[place] == pytest.approx(prediction.value, rel=1e-5)
                assert spreads[place] == pytest.approx(prediction.deviation, rel=1e-5)
            else:
                np.testing.assert_allclose(shares[task][place], prediction.probabilities, atol=1e-5)
    assert own[0].tasks["tags"].calibrated
    np.testing.assert_allclose(own_model.thresholds("tags"), own[0].tasks["tags"].thresholds, rtol=1e-12)
    assert not np.allclose(own_model.thresholds("tags"), own_model.metadata["thresholds"]["tags"], atol=0.01)


def test_a_constant_deviation_stands_in_for_one_that_is_not_predicted() -> None:
    own_model = Model(kinds_onnx(), threads=1)
    own_model.metadata = {"tasks": {"price": []}, "kinds": {"price": "regression"}}
    outputs = {"logits_price": np.array([[3.0], [4.0]], np.float32)}
    assert own_model.values(outputs)["price"][1] is None
    own_model.metadata["calibration"] = {"deviations": {"price": 2.5}}
    numbers, spreads = own_model.values(outputs)["price"]
    assert spreads is not None
    assert (numbers.tolist(), spreads.tolist()) == ([3.0, 4.0], [2.5, 2.5])


def test_an_export_of_weights_is_calibrated_as_its_run(wares: list[str]) -> None:
    exported_weights = Run(exported(kinds_run(), "safetensors"))
    for one, own in zip(exported_weights.predict(wares), Run(kinds_run()).predict(wares), strict=True):
        np.testing.assert_allclose(one.tasks["tags"].probabilities, own.tasks["tags"].probabilities, atol=1e-5)
        assert one.tasks["tags"].calibrated
        assert one.tasks["price"].deviation == pytest.approx(own.tasks["price"].deviation, rel=1e-5)


def test_rows_of_every_kind_are_those_of_predict(wares: list[str], tmp_path: Path) -> None:
    arguments = [*wares, "--model", str(kinds_onnx())]
    assert main([*arguments, "--to", str(tmp_path / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    some = 0
    for row, one in zip(rows, Run(kinds_run()).predict(wares), strict=True):
        expected = one.row()
        assert list(row) == list(expected)
        for name, value in expected.items():
            assert row[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name
        some += bool(row["tags"])
    assert some


def test_every_kind_as_text_and_json(wares: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [wares[0], "--model", str(kinds_onnx())]
    assert main([*arguments, "--json"]) == 0
    [answer] = json.loads(capsys.readouterr().out)
    assert set(answer["price"]) == {"value", "deviation"}
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"  price: {answer['price']['value']:.6g} ± {answer['price']['deviation']:.2g}" in lines
    tags = ", ".join(f"{one['label']} ({one['probability']:.2f})" for one in answer["tags"]) or "(no prediction)"
    assert f"  tags: {tags}" in lines


@pytest.mark.parametrize("method", ["msp", "max_logit", "energy", "mcm"])
@pytest.mark.parametrize("kind", ["single_label", "multi_label"])
def test_unknown_images_are_those_of_the_detector(kind: TaskKind, method: str) -> None:
    data = data_of(products_run())
    paths = [str(data.table.source(row)) for row in range(8)]
    model = Model(products_onnx(), threads=1)
    logits = np.concatenate([model(model.read(path)[None])["logits_class"] for path in paths])
    detector = Detector(method, "class", kind, 0.0, 0.5, {"scale": np.array(7, np.float32)})
    detector = replace(detector, threshold=float(np.median(detector.scores(logits, None))))
    metadata = {**model.metadata, "ood": json.loads(json.dumps({**vars(detector), "arrays": {"scale": 7.0}}))}
    outputs = {"logits_class": logits}
    assert model.unknown(outputs) is None

    model.metadata = metadata

    found = model.unknown(outputs)
    assert found is not None
    assert np.array_equal(found, detector.scores(logits, None) < detector.threshold)
    assert found.sum() == 4


@pytest.mark.parametrize("positive", [False, True])
def test_operating_points_decide_as_in_the_run(positive: bool, wares: list[str], tmp_path: Path) -> None:
    run = Path(shutil.copytree(kinds_run(), tmp_path / "run", ignore=shutil.ignore_patterns("export")))
    classes = Run(kinds_run()).predictions("test").tasks["class"]  # type: ignore[union-attr]  # it was tested
    predicted = list(Run(run).predict(wares))
    # Thresholds that some images reach and others do not.
    shares = np.array([one.tasks["class"].probabilities for one in predicted])
    middle = float(np.median(shares[:, 0] if positive else shares.max(axis=1))) + 1e-4
    tags = np.median([one.tasks["tags"].probabilities for one in predicted], axis=0) + 1e-4
    names = list(predicted[0].tasks["tags"].classes)
    points = {
        "class": {"goal": "coverage>=0.5", "thresholds": {str(classes[0]) if positive else "": middle}},
        "tags": {"goal": "fpr<=.05", "thresholds": dict(zip(names[:2], tags[:2].tolist(), strict=True))},
    }
    path = run / Run.CALIBRATION
    path.write_text(json.dumps({**json.loads(path.read_text()), "operating_points": points}))
    own = list(Run(run).predict(wares))
    assert len({one.tasks["class"].decision for one in own}) > 1
    model = Model(kinds_onnx(), threads=1)
    assert model.decisions(model(np.stack([model.read(one) for one in wares]))) == {}

    metadata = json.loads(json.dumps(metadata_of(Run(run).model, Run(run), "best")))
    assert metadata["operating_points"] == points
    assert metadata_of(Run(run).model, Run(run), "last")["operating_points"] == {}
    model.metadata = metadata

    found = answers(model, wares, [], 1)
    for answer, one in zip(found, own, strict=True):
        assert answer["decisions"] == {task: one.tasks[task].decision for task in ("class", "tags")}
    write_rows(model, wares, tmp_path / "found.jsonl", 1)
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [list(one.row()) for one in own]
    assert [row["class_decision"] for row in rows] == [one.tasks["class"].decision for one in own]
    assert f"class, at the operating point: {own[0].tasks['class'].decision or '(nothing)'}" in _text(found[:1])


def test_an_export_decides_at_the_operating_points_of_its_run(tmp_path: Path) -> None:
    points = {"class": {"goal": "recall>=.9", "thresholds": {"bag": 0.25}}}
    (tmp_path / Run.EXPORT).write_text(json.dumps({"operating_points": points}))
    assert Run(tmp_path).operating_points == {"class": OperatingPoint("recall>=.9", {"bag": 0.25})}
    (tmp_path / Run.EXPORT).write_text("{}")
    assert Run(tmp_path).operating_points == {}


def test_unknown_images_are_marked_in_texts_and_tables(tmp_path: Path) -> None:
    data = data_of(products_run())
    paths = [str(data.table.source(row)) for row in range(4)]
    model = Model(products_onnx(), threads=1)
    detector = {"method": "max_logit", "task": "class", "kind": "single_label", "arrays": {}, "threshold": math.inf}
    model.metadata = {**model.metadata, "ood": detector}

    found = answers(model, paths, [], 1)
    write_rows(model, [*paths, "none.png"], tmp_path / "found.csv", 1)

    assert [one["unknown"] for one in found] == [True] * 4
    assert _text(found).count("unknown: unlike the images") == 4
    frame = pd.read_csv(tmp_path / "found.csv")
    assert list(frame.columns[-2:]) == ["unknown", "error"]
    assert frame["unknown"][:4].all()


def test_weights_alone_recognise_unknown_images_as_their_run(tmp_path: Path) -> None:
    run = Path(shutil.copytree(flowers_run(), tmp_path / "run"))
    data = data_of(run)
    paths = [str(data.table.source(row)) for row in range(8)]
    assert vitrail("vitrail", ["ood", str(run), "--method", "mcm", "--rate", "0.5"]) == 0

    found = Run(exported(run, "safetensors")).predict(paths)

    assert [one.unknown for one in found] == [one.unknown for one in Run(run).predict(paths)]
    assert {one.unknown for one in found} == {True, False}


@pytest.mark.parametrize("kind", ["single_label", "multi_label"])
@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_vitrail(method: str, kind: TaskKind, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(40, 6)).astype(np.float32), rng.normal(size=(9, 6)).astype(np.float32) * 3
    head = rng.normal(size=(6, 3)).astype(np.float32)
    fitted = fit_detector(method, OodOutputs(train @ head, train, np.arange(40).astype(object), np.arange(40) % 3))
    path = tmp_path / "ood.safetensors"
    write_detector(path, Detector(method, "class", kind, 0.0, 0.95, fitted))

    found = familiarity(method, test @ head, test, read_arrays(path), kind)

    wanted = scores_of(method, test @ head, test, fitted, kind)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert np.ptp(wanted) > 1e-3


def test_arrays_that_are_not_those_of_a_detector_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"bank": np.ones((2, 3))}, tmp_path / "double")
    with pytest.raises(ValueError, match="bank is F64, not F32"):
        read_arrays(tmp_path / "double")
    save_file({"bank": np.ones((2, 3), np.float32)}, tmp_path / "bank")
    assert read_arrays(tmp_path / "bank")["bank"].shape == (2, 3)
    monkeypatch.setattr("experiments.export.predict_onnx.MAX_DETECTOR", 20)
    with pytest.raises(ValueError, match="at most 20 are read"):
        read_arrays(tmp_path / "bank")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["knn", "mahalanobis", "vim"])
def test_detectors_by_features_travel_with_the_export(
    method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(products_run(), tmp_path / "run", ignore=shutil.ignore_patterns("export")))
    data = data_of(run)
    rows = [row for split in ("val", "test") for row in data.split_indices(split).tolist()]
    paths = [str(data.table.source(row)) for row in rows]
    assert vitrail("vitrail", ["ood", str(run), "--method", method, "--rate", "0.5"]) == 0

    folder = exported(run, "onnx")

    assert f"{folder / 'ood.safetensors'}: " in capfd.readouterr().out
    assert f"unknown ({method})" in (folder / "export.json").read_text()
    own = [bool(one.unknown) for one in Run(run).predict(paths)]
    assert 0.1 < np.mean(own) < 0.9
    command = [sys.executable, "-c", ALONE.format(script=str(folder / "predict.py")), "predict", *paths, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    found = [one["unknown"] for one in json.loads(done.stdout)]
    # Pillow and torch round a few pixels of a resized image differently, and one image is at the threshold.
    assert np.mean(np.array(found) == own) > 0.85
    served = ServedExport(folder, threads=1)
    images = [served.read(Path(path).read_bytes(), path, Limits()) for path in paths]
    assert [one.unknown for one in served.predict(images)] == found
    (folder / "ood.safetensors").write_bytes(b"changed")
    with pytest.raises(PredictError, match=r"ood.safetensors: is not the file that was exported"):
        answers(Model(folder, threads=1), paths[:1], [], 1)
    monkeypatch.setattr("experiments.export.weights.MAX_DETECTOR", 20)
    with pytest.raises(UserError, match="MB that an export may have"):
        metadata_of(Run(run).model, Run(run), "best")
