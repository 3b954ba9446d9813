from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from app.state.galleries import MARK, indexed_gallery, is_whole, opened_gallery
from app.state.runs import ServedRun
from retrieval.gallery import Gallery
from tests.retrieval.small_gallery import identity
from vitrail.errors import UserError


@pytest.fixture(scope="module")
def run(quickstart_run: Path, tmp_path_factory: pytest.TempPathFactory) -> ServedRun:
    """The quickstart's run without its gallery."""
    copy = tmp_path_factory.mktemp("indexing") / "run"
    shutil.copytree(quickstart_run, copy, ignore=shutil.ignore_patterns("gallery", "wandb"))
    return ServedRun(copy, "copied", "cpu")


@pytest.fixture(scope="module")
def indexed(run: ServedRun) -> list[str]:
    """Fills the gallery; what was told."""
    told: list[str] = []
    assert len(indexed_gallery(run, told.append)) == 300
    return told


def test_the_first_start_fills_and_the_second_only_opens(run: ServedRun, indexed: list[str]) -> None:
    assert indexed == ["copied: indexing its images for the search, once"]
    folder = run.path / "gallery"
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    told: list[str] = []
    gallery = indexed_gallery(run, told.append)
    assert (told, len(gallery), gallery.name, gallery.run_name) == ([], 300, "copied", "copied")
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == before


def test_what_a_kill_left_is_completed(run: ServedRun, indexed: list[str], tmp_path: Path) -> None:
    copy = ServedRun(shutil.copytree(run.path, tmp_path / "run"), "killed", "cpu")
    folder = copy.path / "gallery"
    gallery = Gallery.open(str(folder))
    lost = gallery.table(["id"]).column("id").to_pylist()[:7]
    with gallery.writing() as writer:
        writer.remove(lost)
    assert not is_whole(folder, copy.weights)
    told: list[str] = []
    assert len(indexed_gallery(copy, told.append)) == 300
    assert len(told) == 1
    assert is_whole(folder, copy.weights)


@pytest.mark.parametrize("mark", ["", "[]", "null", '{"weights": 1}', "no JSON", '{"weights": "x", "images": "many"}'])
def test_a_damaged_mark_is_none(run: ServedRun, indexed: list[str], tmp_path: Path, mark: str) -> None:
    folder = shutil.copytree(run.path / "gallery", tmp_path / "g")
    assert is_whole(folder, run.weights)
    assert not is_whole(folder, "other")
    (folder / MARK).write_text(mark)
    assert not is_whole(folder, run.weights)


def test_a_gallery_of_other_weights_is_not_touched(run: ServedRun, tmp_path: Path) -> None:
    copy = shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns("gallery"))
    Gallery.create(str(copy / "gallery"), identity())
    with pytest.raises(UserError, match="vectors of two models do not compare"):
        indexed_gallery(ServedRun(copy, "other", "cpu"), print)
    assert Gallery.open(str(copy / "gallery")).identity == identity()


def test_a_copied_run_whose_data_stayed_behind(run: ServedRun, indexed: list[str], tmp_path: Path) -> None:
    copy = shutil.copytree(run.path, tmp_path / "run")
    (copy / "gallery" / MARK).unlink()
    (copy / "config.yaml").write_text(
        f"data: {{class_path: datamodules.Products, init_args: {{root: {tmp_path / 'no'}}}}}"
    )
    told: list[str] = []
    gallery = indexed_gallery(ServedRun(copy, "moved", "cpu"), told.append)
    assert len(gallery) == 300
    assert told[-1].startswith("moved: its gallery may lack images and is served as it is, because ")
    assert not (copy / "gallery" / MARK).exists()


def test_a_gallery_by_its_address_finds_its_run(run: ServedRun, indexed: list[str], tmp_path: Path) -> None:
    told: list[str] = []
    address = str(run.path / "gallery")
    with_run = opened_gallery(address, [run], [], told.append)
    assert with_run.run is run
    loaded = opened_gallery(address, [], ["taken"], told.append)
    assert loaded.run is not None
    assert loaded.run.weights == run.weights
    assert told == []


def test_a_gallery_whose_run_is_gone(tmp_path: Path) -> None:
    told: list[str] = []
    for name, changes in (("unknown", {"run": ""}), ("gone", {"run": str(tmp_path / "nowhere")})):
        Gallery.create(str(tmp_path / name), identity(**changes))
        assert opened_gallery(str(tmp_path / name), [], [], told.append).run is None
    assert told[0].startswith("unknown: does not say which run made it; texts and images from outside cannot")
    assert told[1].startswith("gone: its run cannot be loaded (")


def test_the_mark_names_what_is_there(run: ServedRun, indexed: list[str]) -> None:
    mark = json.loads((run.path / "gallery" / MARK).read_text())
    assert mark == {"weights": run.weights, "images": 300}
