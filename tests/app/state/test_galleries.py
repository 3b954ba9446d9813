"""Tests of a gallery as it is served, and of filling that of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from app.state.galleries import ServedGallery, gallery_name, indexed_gallery, opened_gallery
from app.state.runs import ServedRun
from retrieval.fill import MARK, is_complete
from retrieval.gallery import Gallery
from tests.support.galleries import COLOURS, MeaningRun, identity, image_rows, served_small, small_gallery, vectors
from vitrail.errors import UserError


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedGallery:
    return served_small(tmp_path_factory.mktemp("served") / "small", run=MeaningRun("perfect"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ServedGallery:
    """A file, one that is gone but was kept small, one that is gone for good, and an image that never was a file."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "there.png").write_bytes(b"image")
    made_by = identity()
    gallery = Gallery.create(str(folder / "gallery"), made_by)
    with gallery.writing() as writer:
        paths = [str(folder / "there.png"), str(folder / "gone.png"), str(folder / "gone too.png"), ""]
        names = ["there", "gone", "lost", "../drawn"]
        writer.add(image_rows(made_by, names, vectors(4), path=paths, thumbnail=[None, b"small", None, b"drawn"]))
    return ServedGallery(folder / "gallery", "files", data_roots=[folder])


def test_everything_but_vectors_is_in_memory(served: ServedGallery, tmp_path: Path) -> None:
    assert len(served) == 12
    assert served.run_name == "perfect"
    assert "vector" not in served.metadata.column_names
    row = served.row("p3")
    assert (row["label_class"], row["predicted_class"], row["split"]) == ("bag", "sneakers", "test")
    assert [found["id"] for found in served.rows(["p7", "p0", "p7"])] == ["p7", "p0", "p7"]


def test_filters_by_what_the_model_says_else_by_labels(served: ServedGallery, tmp_path: Path) -> None:
    assert list(served.choices) == ["class", "colour", "material", "split"]
    assert served.choices["split"] == ["test", "train", "val"]
    assert served.choices["colour"] == COLOURS
    # The model takes image 7, which is blue, for black.
    assert 7 in served.fitting({"colour": ["black"]}).tolist()
    labelled = served_small(tmp_path / "g", predicts={"class": ["bag", "sneakers", "tableware_water_bottle"]})
    assert 7 not in labelled.fitting({"colour": ["black"]}).tolist()
    assert labelled.fitting({"colour": ["black"]}).tolist() == [0, 1, 4, 5, 8, 9]


def test_unknown_values_fit_no_filter(served: ServedGallery, tmp_path: Path) -> None:
    labelled = served_small(tmp_path / "g", predicts={})
    wanted = labelled.fitting({"material": labelled.choices["material"]})
    assert wanted.tolist() == list(range(11))  # the last image's material is not known
    assert labelled.fitting({}).tolist() == list(range(12))
    assert labelled.fitting({"material": []}).tolist() == list(range(12))


@pytest.mark.parametrize("name", ["p99", "", "../../etc/passwd", "p0' OR '1'='1", "x" * 10_000])
def test_only_its_own_images(served: ServedGallery, name: str) -> None:
    for ask in (served.place, served.row, served.image, served.image_path, served.thumbnail):
        with pytest.raises(UserError, match="there is no image") as caught:
            ask(name)
        assert len(str(caught.value)) < 300


def test_an_image_is_its_file_or_what_was_kept_of_it(files: ServedGallery) -> None:
    there = files.image("there")
    assert isinstance(there, Path)
    assert there.read_bytes() == b"image"
    assert files.image("gone") == b"small"
    assert files.image("../drawn") == b"drawn"
    with pytest.raises(UserError, match="is gone"):
        files.image("lost")
    with pytest.raises(UserError, match="no file of its own"):
        files.image_path("../drawn")


def test_no_gallery(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no gallery"):
        ServedGallery(tmp_path / "nothing", "nothing")


def test_an_empty_gallery(tmp_path: Path) -> None:
    Gallery.create(str(tmp_path / "g"), identity())
    served = ServedGallery(tmp_path / "g", "empty")
    assert len(served) == 0
    assert served.choices == {}
    np.testing.assert_array_equal(served.fitting({}), [])


def test_galleries_of_the_same_images(served: ServedGallery, files: ServedGallery, tmp_path: Path) -> None:
    small_gallery(tmp_path / "g", encodes_text=False)
    assert served.shares_images(ServedGallery(tmp_path / "g", "again"))
    assert not served.shares_images(files)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("/data/galleries/holiday", "holiday"),
        ("/runs/quickstart/20260101-000000/gallery", "quickstart"),
        ("s3://bucket/shop/", "shop"),
        ("s3://bucket/shop/gallery", "shop"),
    ],
)
def test_names(address: str, name: str) -> None:
    assert gallery_name(address, []) == name
    second = gallery_name(address, [name])
    third = gallery_name(address, [name, second])
    assert len({name, second, third}) == 3
    assert all(other.startswith(name) or other.endswith(f"/{name}") for other in (second, third))


def test_a_gallery_on_s3_is_served_with_its_run(bucket: str) -> None:
    small_gallery(f"{bucket}/shop", run="")
    lines: list[str] = []
    opened = opened_gallery(f"{bucket}/shop", [], [], lines.append)
    assert (len(opened), opened.name) == (12, "shop")
    assert opened.thumbnail("p1") == ServedGallery(f"{bucket}/shop", "again").thumbnail("p1")
    assert lines == ["shop: its run is not recorded; texts and uploads cannot be searched for; name its run with --run"]


@pytest.fixture(scope="module")
def run(quickstart_run: Path, tmp_path_factory: pytest.TempPathFactory) -> ServedRun:
    """The quickstart's run without its gallery."""
    copy = tmp_path_factory.mktemp("indexing") / "run"
    shutil.copytree(quickstart_run, copy, ignore=shutil.ignore_patterns("gallery", "wandb"))
    return ServedRun(copy, "copied", "cpu")


@pytest.fixture(scope="module")
def indexed(run: ServedRun) -> list[str]:
    """Fills the gallery; the lines that are reported."""
    lines: list[str] = []
    assert len(indexed_gallery(run, lines.append)) == 300
    return lines


def test_the_first_start_fills_and_the_second_only_opens(run: ServedRun, indexed: list[str]) -> None:
    assert indexed == ["copied: indexing its images for the search, once"]
    folder = run.path / "gallery"
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    lines: list[str] = []
    gallery = indexed_gallery(run, lines.append)
    assert (lines, len(gallery), gallery.name, gallery.run_name) == ([], 300, "copied", "copied")
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == before


def test_what_a_kill_left_is_completed(run: ServedRun, indexed: list[str], tmp_path: Path) -> None:
    copy = ServedRun(shutil.copytree(run.path, tmp_path / "run"), "killed", "cpu")
    folder = copy.path / "gallery"
    gallery = Gallery.open(str(folder))
    lost = gallery.table(["id"]).column("id").to_pylist()[:7]
    with gallery.writing() as writer:
        writer.remove(lost)
    assert not is_complete(folder, copy.weights)
    lines: list[str] = []
    assert len(indexed_gallery(copy, lines.append)) == 300
    assert len(lines) == 1
    assert is_complete(folder, copy.weights)


@pytest.mark.parametrize("mark", ["", "[]", "null", '{"weights": 1}', "no JSON", '{"weights": "x", "images": "many"}'])
def test_a_damaged_mark_is_none(run: ServedRun, indexed: list[str], tmp_path: Path, mark: str) -> None:
    folder = shutil.copytree(run.path / "gallery", tmp_path / "g")
    assert is_complete(folder, run.weights)
    assert not is_complete(folder, "other")
    (folder / MARK).write_text(mark)
    assert not is_complete(folder, run.weights)


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
    lines: list[str] = []
    gallery = indexed_gallery(ServedRun(copy, "moved", "cpu"), lines.append)
    assert len(gallery) == 300
    assert lines[-1].startswith("moved: its gallery may lack images and is served as it is, because ")
    assert not (copy / "gallery" / MARK).exists()


def test_a_gallery_by_its_address_finds_its_run(run: ServedRun, indexed: list[str], tmp_path: Path) -> None:
    lines: list[str] = []
    address = str(run.path / "gallery")
    with_run = opened_gallery(address, [run], [], lines.append)
    assert with_run.run is run
    loaded = opened_gallery(address, [], ["taken"], lines.append)
    assert loaded.run is not None
    assert loaded.run.weights == run.weights
    assert lines == []


def test_a_gallery_whose_run_is_gone(tmp_path: Path) -> None:
    lines: list[str] = []
    for name, changes in (("unknown", {"run": ""}), ("gone", {"run": str(tmp_path / "nowhere")})):
        Gallery.create(str(tmp_path / name), identity(**changes))
        assert opened_gallery(str(tmp_path / name), [], [], lines.append).run is None
    assert lines[0].startswith("unknown: its run is not recorded; texts and uploads cannot be searched for")
    assert lines[1].startswith("gone: its run cannot be loaded (")


def test_the_mark_names_what_is_there(run: ServedRun, indexed: list[str]) -> None:
    mark = json.loads((run.path / "gallery" / MARK).read_text())
    assert mark == {"weights": run.weights, "images": 300}
