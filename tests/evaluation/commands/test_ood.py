from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from tests.support.data import write_csv
from tests.support.runs import data_of, flowers_run, kinds_run, products_run
from vitrail.ood import METHODS, read_detector, write_detector
from vitrail.programs import main
from vitrail.runs import Run

OOD = "checkpoints/ood.safetensors"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    trained = products_run()
    return Path(shutil.copytree(trained, tmp_path / "runs" / trained.parent.name / trained.name))


def write_noise(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_all_methods_are_compared_and_one_is_kept(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = write_noise(Path("noise"))

    assert main("vitrail", ["ood", str(run), "--ood", str(noise), "--markdown"]) == 0

    printed = capsys.readouterr().out
    for method in set(METHODS) - {"mcm"}:
        assert f"| noise | 6 | {method} |" in printed
    assert "Kept for predict: knn" in printed
    rows = json.loads((run / "reports" / "ood.json").read_text())
    assert [row["method"] for row in rows] == [one for one in METHODS if one != "mcm"]
    detector = read_detector(run / OOD)
    assert (detector.method, detector.rate) == ("knn", 0.95)
    assert rows[4]["threshold"] == pytest.approx(detector.threshold)


def test_nothing_is_chosen_on_the_other_images(run: Path) -> None:
    assert main("vitrail", ["ood", str(run)]) == 0
    alone = (run / OOD).read_bytes()

    assert main("vitrail", ["ood", str(run), "--ood", str(write_noise(Path("noise")))]) == 0

    assert (run / OOD).read_bytes() == alone


def test_the_threshold_keeps_its_share_of_validation_and_predict_marks_the_others(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("vitrail", ["ood", str(run), "--method", "mahalanobis", "--rate", "0.8"]) == 0

    data = data_of(run)
    opened = Run(run)
    found = opened.predict([data.read_image(row) for row in data.split_indices("val").tolist()])
    assert 0.8 <= np.mean([one.unknown is False for one in found]) < 1
    noise = write_noise(Path("noise"))
    assert main("vitrail", ["predict", str(run), str(noise), "--to", "found.csv"]) == 0
    frame = pd.read_csv("found.csv")
    assert list(frame.columns[-2:]) == ["unknown", "error"]
    assert frame["unknown"].tolist() == [one.unknown for one in opened.predict(str(noise))]
    # What so small a run makes of noise differs; above its highest score nothing is known.
    assert opened.detector is not None
    write_detector(run / OOD, replace(opened.detector, threshold=1e6))
    assert all(one.unknown for one in Run(run).predict(str(noise)))
    assert main("vitrail", ["predict", str(run), str(noise)]) == 0
    assert "unknown (most like" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.parametrize("make", [kinds_run, flowers_run])
def test_tasks_of_every_kind_and_class_prompts(make: Callable[[], Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(make(), tmp_path / "run"))
    model = Run(run).model

    for task in model.tasks:
        assert main("vitrail", ["ood", str(run), "--task", task]) == 0
        detector = read_detector(run / OOD)
        assert detector.task == task
        assert detector.method == ("mcm" if make is flowers_run else "knn")
        if make is flowers_run:
            assert float(detector.arrays["scale"]) == pytest.approx(float(model.objective.logit_scale()[0]))
        data = data_of(run)
        rows = data.split_indices("val").tolist()
        unknown = [bool(one.unknown) for one in Run(run).predict([data.read_image(row) for row in rows])]
        assert np.mean(unknown) <= 0.05 + 1e-9


def test_rows_of_a_table_as_classes_that_were_held_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_of(run)
    rows = [["image", "label", "group"], *([data.table.source(row), str(row % 2), str(row)] for row in range(8))]
    write_csv(Path("held_out.csv"), rows)

    command = ["ood", str(run), "--method", "energy", "--ood", "held_out.csv", "--ood-rows", "label=1", "--markdown"]
    assert main("vitrail", command) == 0

    assert "| held_out (1) | 4 | energy |" in capsys.readouterr().out


def test_a_detector_of_another_checkpoint_marks_nothing_and_is_reported(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("vitrail", ["ood", str(run), "--method", "energy"]) == 0
    checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    torch.save({**checkpoint, "epoch": 99}, run / "checkpoints/best.ckpt")

    opened = Run(run)
    image = data_of(run).read_image(0)

    assert opened.predict(image)[0].unknown is None
    assert any("ood.safetensors: belongs to another checkpoint" in problem for problem in opened.missing)
    assert "ood.safetensors: belongs to another checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "1"], "--rate: must be between 0 and 1; got 1.0"),
        (["--task", "shape"], "--task shape: "),
        (["--method", "mcm"], "--method mcm: is not for this model; it has the outputs for msp, "),
        (["--ood", "no/where"], "--ood no/where: no such folder or file"),
        (["--limit", "-1"], "--limit: must be at least 1, or left out; got -1"),
        (["--ood", "noise", "--ood-rows", "label=1"], "--ood-rows: are rows of a table, and none is in --ood"),
    ],
)
def test_mistakes(run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("vitrail", ["ood", str(run), *arguments]) == 2

    assert message in capsys.readouterr().err
