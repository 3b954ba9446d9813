from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

from evaluation.commands import predict
from tests.support.runs import data_of, products_run
from vitrail.files import read_csv
from vitrail.programs import main
from vitrail.runs import Run


@pytest.fixture(scope="module")
def run() -> Path:
    return products_run()


@pytest.fixture
def photos(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The run's own test images, copied."""
    data = data_of(run)
    monkeypatch.chdir(tmp_path)
    names = []
    for row in data.split_indices("test").tolist():
        name = f"photos/{row:03d}{Path(data.table.source(row)).suffix}"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(data.table.source(row), tmp_path / name)
        names.append(name)
    return names


def test_predictions_are_those_of_the_test_stage(run: Path, photos: list[str]) -> None:
    assert (
        main("vitrail", ["predict", str(run), "photos", "--to", "out.parquet", "--top", "2", "--batch-size", "4"]) == 0
    )

    found = pd.read_parquet("out.parquet")
    known = Run(run).predictions("test")
    assert known is not None
    assert found["image"].tolist() == photos
    for task, classes in known.tasks.items():
        probabilities = known.probabilities(task, Run(run).temperatures[task])
        assert found[task].tolist() == [classes[row.argmax()] for row in probabilities]
        assert found[f"{task}_confidence"].to_numpy() == pytest.approx(probabilities.max(axis=1), abs=1e-5)
        assert found[f"{task}_2"].tolist() == [classes[row.argsort()[-2]] for row in probabilities]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_every_format_has_the_same_rows_and_an_unreadable_image_is_one_with_its_reason(
    run: Path, photos: list[str], suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("broken.jpg").write_bytes(b"no image")

    assert main("vitrail", ["predict", str(run), "broken.jpg", *photos[:2], "--to", f"out.{suffix}"]) == 0

    path = Path(f"out.{suffix}")
    found = read_csv(path) if suffix == "csv" else pd.read_json(path, lines=suffix == "jsonl")
    assert found["image"].tolist() == ["broken.jpg", *photos[:2]]
    assert "not an image" in found["error"][0]
    assert found["error"][1:].isna().all()
    assert found["class"].isna().tolist() == [True, False, False]
    assert capsys.readouterr().out == f"out.{suffix}: 3 images, 1 of them unreadable\n"
    if suffix == "jsonl":
        assert json.loads(path.read_text().splitlines()[1])["image"] == photos[0]


def test_a_table_is_printed(run: Path, photos: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("vitrail", ["predict", str(run), photos[0], "--top", "2"]) == 0

    printed = capsys.readouterr().out
    [prediction] = Run(run).predict(photos[0])
    assert photos[0] in printed
    assert ", ".join(f"{label} {value:.1%}" for label, value in prediction.top_k(2)) in printed
    assert "not calibrated" not in printed


def test_an_interrupted_command_goes_on_where_it_was(
    run: Path, photos: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predict, "PART", 3)
    command = ["predict", str(run), "photos", "--to", "out.parquet"]
    predicted = Run.iter_predictions
    calls: list[int] = []

    def counted(self: Run, *args: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predicted(self, *args, **options)

    monkeypatch.setattr(Run, "iter_predictions", counted)
    assert main("vitrail", command) == 130
    assert not Path("out.parquet").exists()

    assert main("vitrail", command) == 0

    parts = -(-len(photos) // 3)
    assert f"going on: 2 of {parts} parts are done" in capsys.readouterr().err
    assert len(calls) == 3 + parts - 2
    resumed = pd.read_parquet("out.parquet")
    assert main("vitrail", ["predict", str(run), "photos", "--to", "whole.parquet"]) == 0
    pd.testing.assert_frame_equal(resumed, pd.read_parquet("whole.parquet"))
    assert sorted(path.name for path in Path().iterdir()) == ["out.parquet", "photos", "whole.parquet"]


def test_parts_of_other_images_are_made_again(run: Path, photos: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parts = Path(".out.csv.parts")
    parts.mkdir()
    (parts / "plan.json").write_text("of something else")

    assert main("vitrail", ["predict", str(run), photos[0], "--to", "out.csv"]) == 0

    assert "is of other images or another model" in capsys.readouterr().err


def test_changed_images_and_another_export_are_predicted_again(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text("{}")
    image = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(image)
    parts = tmp_path / "parts"
    job = predict.Job(tmp_path, (str(image),), "auto", 1, 32, None, "cpu", parts)

    def done_before() -> bool:
        predict._begin(job, Run(tmp_path), job.find())
        kept = (parts / "000000.parquet").exists()
        (parts / "000000.parquet").touch()
        return kept

    assert not done_before()
    assert done_before()
    Image.new("RGB", (9, 9), "red").save(image)
    assert not done_before()
    (tmp_path / "export.json").write_text('{"weights": 1}')
    assert not done_before()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_several_processes_predict_the_same(
    run: Path, photos: list[str], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "fork" and torch.accelerator.is_available():
        pytest.skip("a process that has used an accelerator may not be forked")
    # The command spawns them; a fork need not import everything again.
    context = multiprocessing.get_context(method)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    many = [photos[number % len(photos)] for number in range(predict.PART + 10)]
    Path("many.txt").write_text("\n".join(["image", *dict.fromkeys(many)]))

    assert main("vitrail", ["predict", str(run), *many, "--to", "two.parquet", "--processes", "2"]) == 0

    assert main("vitrail", ["predict", str(run), *many, "--to", "one.parquet"]) == 0
    pd.testing.assert_frame_equal(pd.read_parquet("two.parquet"), pd.read_parquet("one.parquet"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["absent.jpg"], "absent.jpg: no such file"),
        (["photos", "--to", "out.xlsx"], "--to out.xlsx: must end with one of .parquet"),
        (["photos", "--top", "0"], "--top: must be at least 1; got 0"),
        (["photos", "--max-pixels", "0"], "--max-pixels: must be at least 1; got 0"),
        (["photos", "--device", "cuda:99"], "--device cuda:99: cannot be used here"),
    ],
)
def test_mistakes_are_one_line(
    run: Path, photos: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("vitrail", ["predict", str(run), *options]) == 2

    assert message in capsys.readouterr().err


def test_operating_points_have_a_column(
    run: Path, photos: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "pointed")
    assert main("vitrail", ["calibrate", "pointed", "--operating-point", "coverage>=.5", "--task", "class"]) == 0
    capsys.readouterr()
    assert main("vitrail", ["predict", "pointed", "photos", "--to", "out.csv"]) == 0
    found = read_csv(Path("out.csv")).fillna("")
    [threshold] = Run("pointed").operating_points["class"].thresholds.values()
    # The confidence of one image is the threshold, and in a batch of other images it may be rounded another way.
    sure = found[(found["class_confidence"] - threshold).abs() > 1e-5]
    assert len(sure)
    expected = sure["class"].where(sure["class_confidence"] >= threshold, "")
    assert sure["class_decision"].tolist() == expected.tolist()
    assert "colour_decision" not in found
    assert main("vitrail", ["predict", "pointed", photos[0]]) == 0
    assert "at the operating point" in " ".join(capsys.readouterr().out.split())
