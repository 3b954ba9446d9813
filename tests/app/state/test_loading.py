"""Tests of what is served by which name, and of what is loaded only once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from app.server import build_blocks
from app.state.galleries import MARK
from app.state.startup import load
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
    assert list(context.runs) == list(context.galleries) == ["shop/a", "shop/a (2)"]
    assert [len(gallery) for gallery in context.galleries.values()] == [300, 300]
    assert context.gallery("shop/a (2)").run is context.run("shop/a (2)")
    said = capsys.readouterr().err
    assert "shop/a (2): indexing its images" in said
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
