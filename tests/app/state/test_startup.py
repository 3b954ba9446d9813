"""Tests of what is served by which name, and of what is loaded only once.

Tests of what the demo finds among the runs, and of what it starts where it finds nothing.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.server import Growing, build_blocks
from app.state.context import AppContext, Pending
from app.state.startup import (
    _DATA,
    _OPTIONS,
    CLASSIFIER,
    DUAL_ENCODER,
    complete_demo,
    demo_runs,
    finished_run,
    lacks_something,
    load,
)
from datamodules.wares import Wares
from retrieval.fill import MARK
from vitrail.errors import UserError
from vitrail.programs import packaged_config


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


class _Process:
    """A command that was started; it leaves what it makes, but a run that is called ``broken`` fails."""

    def __init__(self, command: list[str], seen: list[list[str]]) -> None:
        seen.append(command)
        self.returncode, self.stdout = 0, ["Seed set to 42\n", "epoch 3/9: train/loss 1\n"]
        given = dict(one.split("=", 1) for one in command if one.startswith("--") and "=" in one)
        if command[3] == "validate":
            (Path(command[5]).parents[1] / "predictions").mkdir()
            (Path(command[5]).parents[1] / "predictions" / "val.parquet").touch()
        elif command[3] == "calibrate":
            (Path(command[4]) / "checkpoints" / "calibration.json").touch()
        elif given["--trainer.max_epochs"] == "0":
            self.returncode = 2
        else:
            runs, name = (command[command.index(option) + 1] for option in ("--runs", "--name"))
            made(Path(runs), "20260101-000000", name=name, age=0)

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def terminate(self) -> None:
        pass


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would be started."""
    seen: list[list[str]] = []
    monkeypatch.setattr("subprocess.Popen", lambda command, **_: _Process(command, seen))
    monkeypatch.setattr("subprocess.run", lambda command, **_: _Process(command, seen))
    return seen


def test_the_classifier_comes_first_and_the_rest_while_it_is_served(
    tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    classifier, dual_encoder = (tmp_path / name / "20260101-000000" for name in (CLASSIFIER, DUAL_ENCODER))
    assert demo_runs(tmp_path) == [classifier]
    assert [command[:4] for command in started] == [[sys.executable, "-m", "experiments", "fit"]]
    assert Path(started[0][5]).is_file()
    assert "training it once" in capsys.readouterr().err
    assert lacks_something(tmp_path)
    lines: list[str] = []
    complete_demo(tmp_path, lines.append)
    assert [command[3] for command in started[1:]] == ["validate", "calibrate", "fit", "validate", "calibrate"]
    assert f"--model.init_args.towers.image_pretrained={classifier / 'checkpoints' / 'best.ckpt'}" in started[3]
    assert lines == ["calibrating confidences", "epoch 3/9", "calibrating confidences"]
    assert demo_runs(tmp_path) == [classifier, dual_encoder]
    assert not lacks_something(tmp_path)
    assert len(started) == 6


def test_confidences_that_cannot_be_calibrated_are_no_reason_not_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (CLASSIFIER, DUAL_ENCODER):
        made(tmp_path, "there", name=name, age=0)
    seen: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command[3])
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr("subprocess.run", run)
    complete_demo(tmp_path, lambda line: None)
    assert seen == ["validate", "validate"]


def test_a_training_that_failed_is_reported(
    tmp_path: Path, started: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_OPTIONS, CLASSIFIER, ("quickstart", {"trainer.max_epochs": "0"}))
    with pytest.raises(UserError, match="training demo_classifier ended with exit code 2"):
        demo_runs(tmp_path)
    assert len(started) == 1


@pytest.mark.parametrize("name", _OPTIONS)
def test_settings_of_the_demo_are_keys_of_its_experiments(name: str) -> None:
    experiment, settings = _OPTIONS[name]
    values = yaml.safe_load(Path(packaged_config(experiment)).read_text(encoding="utf-8"))
    for key in settings:
        assert key.partition(".")[0] in {*values, "report", "test_best", "features"}, key
    assert set(_DATA) <= set(inspect.signature(Wares).parameters)


def test_what_is_completed_takes_the_place_of_what_was_served() -> None:
    begun: list[str] = []

    def site(name: str) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "lifespan":
                begun.append((await receive())["type"])
                await send({"type": "lifespan.startup.complete"})
                await receive()
            else:
                begun.append(name)

        return app

    def complete(report: Callable[[str], None]) -> AppContext:
        report("epoch 1/2")
        assert pending.line == "epoch 1/2"
        return AppContext({}, {})

    pending = Pending(complete)
    app = Growing(site("first"))

    async def asked() -> None:
        await app({"type": "http"}, None, None)  # type: ignore[arg-type]
        app.grow(AppContext({}, {}, pending=pending), lambda context: site("second" if context.pending is None else ""))
        assert pending.line == "epoch 1/2"
        await app({"type": "http"}, None, None)  # type: ignore[arg-type]
        await app({"type": "http"}, None, None)  # type: ignore[arg-type]

    asyncio.run(asked())
    assert begun == ["first", "lifespan.startup", "second", "second"]
    assert pending.line == ""


def test_a_completion_that_fails_is_shown_and_the_page_stays() -> None:
    def complete(report: Callable[[str], None]) -> AppContext:
        raise UserError("disk full")

    pending = Pending(complete)
    Growing(build_blocks).grow(AppContext({}, {}, pending=pending), lambda context: pytest.fail("built"))  # type: ignore[arg-type]
    assert pending.line == "failed; the reason is in the terminal"
