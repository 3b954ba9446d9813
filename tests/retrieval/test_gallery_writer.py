"""Changes are whole: after a kill before any commit, doing it again gives the gallery of an undisturbed writer."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from retrieval.gallery import Gallery
from retrieval.schema import CAPTIONS
from retrieval.store import LanceStore
from tests.retrieval.gallery_processes import BATCH, add_batch
from tests.retrieval.small_gallery import caption_rows, identity, image_rows, small_gallery, small_rows, vectors
from vitrail.errors import UserError

ROOT = Path(__file__).parents[2]


def content(gallery: Gallery) -> tuple[pa.Table, pa.Table]:
    """Everything in the gallery's two tables, in order."""
    captions = LanceStore.open(gallery.uri, CAPTIONS)
    assert captions is not None
    said = captions.scan(["id", "image", "caption", "vector"]).drop_columns(["_rowid"])
    return gallery.table(["id", "content", "caption", "text", "run", "vector"]), said


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    gallery = small_gallery(tmp_path_factory.mktemp("undisturbed") / "g")
    add_batch(gallery)
    return gallery


def check_what_a_kill_left(uri: str) -> None:
    """The gallery opens, every image is found, and captions belong to images."""
    left = Gallery.open(uri)
    ids = set(left.table(["id"]).column("id").to_pylist())
    assert {f"p{row}" for row in range(12)} <= ids <= {f"p{row}" for row in range(12)} | set(BATCH)
    assert {hit.id for hit in left.nearest(vectors(1), 20)[0]} == ids
    assert {hit.image for hit in left.nearest_captions(vectors(1), 100)[0]} <= ids


COMMITS = 4
"""Removing the replaced image's captions, adding the new ones, replacing an image, adding images."""


@pytest.mark.parametrize("number", range(COMMITS))
def test_a_writer_that_stops_before_any_commit_can_be_finished(
    undisturbed: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    gallery = small_gallery(tmp_path / "g")
    commit = LanceStore._commit
    commits = []

    def stopped(store: LanceStore, change: Callable[[], object]) -> None:
        commits.append(change)
        if len(commits) > number:
            raise KeyboardInterrupt
        commit(store, change)

    with monkeypatch.context() as patched:
        patched.setattr(LanceStore, "_commit", stopped)
        with pytest.raises(KeyboardInterrupt):
            add_batch(gallery)
    assert len(commits) == number + 1
    check_what_a_kill_left(gallery.uri)
    add_batch(Gallery.open(gallery.uri))
    for found, expected in zip(content(Gallery.open(gallery.uri)), content(undisturbed), strict=True):
        assert found.equals(expected)


def test_a_writer_that_is_killed_between_captions_and_images_can_be_finished(
    undisturbed: Gallery, tmp_path: Path
) -> None:
    gallery = small_gallery(tmp_path / "g")
    command = [sys.executable, "-m", "tests.retrieval.gallery_processes", "2", gallery.uri]
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=120).returncode == -signal.SIGKILL
    assert Gallery.open(gallery.uri).n_captions() == undisturbed.n_captions()
    assert len(Gallery.open(gallery.uri)) == 12
    check_what_a_kill_left(gallery.uri)
    add_batch(Gallery.open(gallery.uri))
    for found, expected in zip(content(Gallery.open(gallery.uri)), content(undisturbed), strict=True):
        assert found.equals(expected)


def test_the_next_writer_removes_captions_that_a_kill_left_without_a_image(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    captions = LanceStore.open(gallery.uri, CAPTIONS)
    assert captions is not None
    captions.append(caption_rows(identity(), [("never", "an orphan")], vectors(1)))
    gallery = Gallery.open(gallery.uri)
    assert gallery.n_captions() == 25
    assert "an orphan" not in {hit.caption for hit in gallery.nearest_captions(vectors(1), 100)[0]}
    with gallery.writing():
        pass
    assert gallery.n_captions() == Gallery.open(gallery.uri).n_captions() == 24


def test_replacing_and_removing_takes_captions_along(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    images, captions = small_rows(identity())
    with gallery.writing() as writer:
        writer.remove(["p0", "p1"])
        writer.add(images.slice(2, 1), captions.slice(4, 1))
        writer.add(images.slice(3, 1))  # its captions stay
        writer.add(images.slice(4, 1), captions.slice(0, 0))
    said = LanceStore.open(gallery.uri, CAPTIONS)
    assert said is not None
    owners = said.scan(["image"]).column("image").to_pylist()
    assert {name: owners.count(name) for name in ("p0", "p1", "p2", "p3", "p4", "p5")} == {
        "p0": 0, "p1": 0, "p2": 1, "p3": 2, "p4": 0, "p5": 2,
    }  # fmt: skip
    order = [*(f"p{row}" for row in range(5, 12)), "p2", "p3", "p4"]
    assert gallery.table(["id"]).column("id").to_pylist() == order


def test_what_is_known_is_told_without_what_is_large(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    with gallery.writing() as writer:
        known = writer.known()
    assert {"id", "content", "label_colour", "confidence_class"} <= set(known.column_names)
    assert not {"vector", "thumbnail"} & set(known.column_names)
    assert known.num_rows == 12


@pytest.mark.parametrize("broken", [np.nan, 0.0, 2.0])
def test_a_vector_that_is_not_of_unit_length_is_refused(tmp_path: Path, broken: float) -> None:
    gallery = small_gallery(tmp_path / "g")
    matrix = vectors(3)
    matrix[1] *= broken
    with pytest.raises(UserError, match="image 'b': its vector has the length"), gallery.writing() as writer:
        writer.add(image_rows(identity(), ["a", "b", "c"], matrix))
    assert len(Gallery.open(gallery.uri)) == 12


def test_rows_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    good = image_rows(identity(), ["a", "b"], vectors(2))
    with gallery.writing() as writer:
        with pytest.raises(ValueError, match="an id is there twice"):
            writer.add(image_rows(identity(), ["a", "a"], vectors(2)))
        with pytest.raises(ValueError, match="'caption'"):
            writer.add(good.drop_columns(["caption"]))
        with pytest.raises(ValueError, match="of 'elsewhere'"):
            writer.add(good, caption_rows(identity(), [("elsewhere", "x")], vectors(1)))
        with pytest.raises(UserError, match="no image 'nobody'"):
            writer.remove(["p0", "nobody"])
    assert len(Gallery.open(gallery.uri)) == 12
    silent = small_gallery(tmp_path / "silent", encodes_text=False)
    with silent.writing() as writer, pytest.raises(ValueError, match="encodes no texts"):
        writer.add(image_rows(silent.identity, ["a"], vectors(1)), caption_rows(identity(), [("a", "x")], vectors(1)))
