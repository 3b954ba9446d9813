"""Tests of what is served by which name, and of what is loaded only once.

Tests of what the demo finds among the runs, and of what it starts where it finds nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.server import build_blocks
from app.state.startup import demo_runs, finished_run, load
from retrieval.fill import MARK
from vitrail.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, quickstart_run: Path) -> Path:
    """Two runs that are called the same, one of them not indexed yet."""
    folder = tmp_path_factory.mktemp("loading")
    for place in ("one", "two"):
        ignored = shutil.ignore_patterns("gallery" if place == "two" else "")
        shutil.copytree(quickstart_run, folder / place / "shop" / "a", ignore=ignored)
    return folder


def test_runs_bring_their_galleries_and_a_second_start_only_opens_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [folder / "one" / "shop" / "a", folder / "two" / "shop" / "a"]
    context = load([*paths, paths[0]], [])
    assert list(context.runs) == list(context.galleries) == ["a", "shop/a"]
    assert [len(gallery) for gallery in context.galleries.values()] == [300, 300]
    assert context.gallery("shop/a").run is context.run("shop/a")
    said = capsys.readouterr().err
    assert "shop/a: indexing its images" in said
    assert "gallery of 300 images is open" in said
    marks = [(path / "gallery" / MARK).stat().st_mtime_ns for path in paths]
    load(paths, [])
    assert "indexing" not in capsys.readouterr().err
    assert marks == [(path / "gallery" / MARK).stat().st_mtime_ns for path in paths]


def test_a_gallery_alone_brings_the_run_that_made_it(quickstart_run: Path) -> None:
    context = load([], [str(quickstart_run / "gallery")])
    (run,) = context.runs.values()
    (gallery,) = context.galleries.values()
    assert gallery.run is run
    assert gallery.run_name == run.name


def test_a_run_whose_images_are_gone_is_served_without_a_gallery(
    quickstart_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise UserError("data/shop: there is no such folder")

    monkeypatch.setattr("app.state.startup.indexed_gallery", gone)
    context = load([quickstart_run], [])
    assert len(context.runs) == 1
    assert not context.galleries
    assert "served without a gallery: data/shop: there is no such folder" in capsys.readouterr().err
    assert build_blocks(context).fns


def made(
    root: Path, time: str, *, name: str = "quickstart", ended: str = "finished", best: bool = True, age: int
) -> Path:
    """A run directory as a training leaves it."""
    run = root / name / time
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"stages": [{"stage": "fit", "exit": ended}]}))
    if best:
        (run / "checkpoints" / "best.ckpt").write_bytes(b"weights")
    os.utime(run, (1e9 - age, 1e9 - age))
    return run


def test_the_newest_run_that_ended_well_is_taken(tmp_path: Path) -> None:
    assert finished_run(tmp_path, "quickstart") is None
    made(tmp_path, "old", age=9)
    newest = made(tmp_path, "newest", age=5)
    made(tmp_path, "interrupted", ended="unfinished", age=3)
    made(tmp_path, "without", best=False, age=2)
    made(tmp_path, "other", name="quickstart_pairs", age=1)
    (tmp_path / "quickstart" / "empty").mkdir()
    assert finished_run(tmp_path, "quickstart") == newest


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would be started; each leaves what it makes, but of the experiment ``broken`` there is no run."""
    seen: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        if command[3] == "validate":
            (Path(command[5]).parents[1] / "predictions").mkdir()
            (Path(command[5]).parents[1] / "predictions" / "val.parquet").touch()
            return subprocess.CompletedProcess(command, 0)
        if command[3] == "calibrate":
            (Path(command[4]) / "checkpoints" / "calibration.json").touch()
            return subprocess.CompletedProcess(command, 0)
        config, runs = Path(command[command.index("--config") + 1]), Path(command[command.index("--runs") + 1])
        if config.stem != "broken":
            made(runs, "20260101-000000", name=config.stem, age=0)
        return subprocess.CompletedProcess(command, 2 if config.stem == "broken" else 0)

    monkeypatch.setattr("subprocess.run", run)
    return seen


def test_only_what_is_missing_is_trained_and_a_second_start_trains_nothing(
    tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    there = made(tmp_path, "there", age=0)
    runs = demo_runs(tmp_path)
    assert runs == [there, tmp_path / "quickstart_pairs" / "20260101-000000"]
    stages = [command[3] for command in started]
    assert stages == ["fit", "validate", "calibrate", "validate", "calibrate"]
    command = started[0]
    assert command[:4] == [sys.executable, "-m", "experiments", "fit"]
    assert Path(command[5]).is_file()
    assert "training it once" in capsys.readouterr().err
    assert demo_runs(tmp_path) == runs
    assert len(started) == 5


def test_confidences_that_cannot_be_calibrated_are_no_reason_not_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = made(tmp_path, "there", age=0)
    seen: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command[3])
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr("subprocess.run", run)
    assert demo_runs(tmp_path, ["quickstart"]) == [there]
    assert seen == ["validate"]


def test_a_training_that_failed_is_said(tmp_path: Path, started: list[list[str]]) -> None:
    with pytest.raises(UserError, match="training broken ended with exit code 2"):
        demo_runs(tmp_path, ["broken"])
    assert len(started) == 1
