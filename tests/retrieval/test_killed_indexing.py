"""Indexing that is killed at any stage leaves a gallery that opens, and finishing it makes the undisturbed one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retrieval.gallery import Gallery
from retrieval.search.vectors import VectorFile, open_vectors
from tests.retrieval.killed_indexing import CHUNK, COUNT, STAGES
from tests.support.forks import run_program
from tests.support.galleries import SIDE, rows_of, write_photos
from tests.support.models import write_clip
from vitrail.errors import UserError

COMMITTED = {
    "before_the_first_image": {0},
    "while_encoding": {CHUNK, 2 * CHUNK},
    "between_captions_and_images": {CHUNK},
    "while_tidying": {COUNT},
    "while_the_matrix_is_written": {COUNT},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    write_photos(folder / "data", COUNT)
    write_clip(folder / "clip", image_size=SIDE)
    (folder / "run").mkdir()
    run_program("tests.retrieval.killed_indexing", str(folder), environment={"VITRAIL_CACHE": str(folder / "cache")})
    return folder


def vectors_in(gallery: Path, table: str) -> VectorFile:
    """What the file of vectors that searches read holds, each byte compared with its checksum."""
    [path] = gallery.glob(f"{table}.*.vectors")
    opened = open_vectors(path)
    assert opened is not None
    opened.check_all()
    return opened


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_kill_leaves_opens(folder: Path, stage: str) -> None:
    left = folder / f"{stage}-killed"
    if stage not in COMMITTED:
        with pytest.raises(UserError, match="no gallery"):
            Gallery.open(str(left))
        return
    gallery = Gallery.open(str(left))
    assert len(gallery) in COMMITTED[stage]
    whole = rows_of(folder / "undisturbed").slice(0, len(gallery))
    assert rows_of(left).equals(whole)
    if len(gallery):
        query = np.array(whole.column("vector").to_pylist()[3:4], np.float32)
        assert gallery.nearest(query, 1)[0][0].id == "photo 3"


@pytest.mark.parametrize("stage", STAGES)
def test_finishing_makes_the_undisturbed_gallery(folder: Path, stage: str) -> None:
    assert len(rows_of(folder / "undisturbed")) == COUNT
    for table, rows in (("images", COUNT), ("captions", 2 * COUNT)):
        finished, undisturbed = rows_of(folder / stage, table), rows_of(folder / "undisturbed", table)
        assert finished.num_rows == rows
        assert finished.equals(undisturbed)


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_half_written_is_left(folder: Path, stage: str) -> None:
    made = {path.name.split(".")[0] for path in (folder / stage).glob("*.vectors")}
    assert made == {"images", "captions"}
    assert not list((folder / stage).glob(".*.part.*"))
    found = Gallery.open(str(folder / stage))
    again = Gallery.open(str(folder / "undisturbed"))
    for table in ("images", "captions"):
        mine, theirs = vectors_in(folder / stage, table), vectors_in(folder / "undisturbed", table)
        np.testing.assert_array_equal(mine.matrix, theirs.matrix)
        np.testing.assert_array_equal(mine.coarse.codes, theirs.coarse.codes)
        np.testing.assert_array_equal(mine.coarse.scale, theirs.coarse.scale)
        stored = np.array(rows_of(folder / stage, table).column("vector").to_pylist(), np.float32)
        np.testing.assert_array_equal(mine.matrix, stored)
    query = np.array(rows_of(folder / stage).column("vector").to_pylist()[:3], np.float32)
    assert found.nearest(query, 5) == again.nearest(query, 5)
    assert found.nearest_captions(query, 5) == again.nearest_captions(query, 5)
