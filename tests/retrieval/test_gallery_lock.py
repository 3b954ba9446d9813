"""One writer of a gallery at a time; a killed one blocks no other."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from retrieval.gallery import Gallery, _write_lock
from tests.support.galleries import identity, small_gallery, vectors
from tests.support.processes import read_only
from vitrail.errors import UserError

ROOT = Path(__file__).parents[2]


def test_a_second_writer_is_refused_while_reading_goes_on_and_until_the_first_is_killed(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    command = [sys.executable, "-m", "tests.retrieval.gallery_processes", "holding", gallery.uri]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "writing\n"
        with pytest.raises(UserError, match=f"process {other.pid} is writing to this gallery; wait"), gallery.writing():
            pass
        assert len(Gallery.open(gallery.uri).nearest(vectors(1), 20)[0]) == 12
        other.kill()
        other.wait(timeout=60)
    with gallery.writing() as writer:
        writer.remove(["p0"])
    assert len(Gallery.open(gallery.uri)) == 11


def test_a_second_object_of_the_same_process_is_refused_too(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    other = Gallery.open(gallery.uri)
    with gallery.writing():
        with pytest.raises(UserError, match="is writing to this gallery"), other.writing():
            pass
        with pytest.raises(UserError, match="is writing to this gallery"):
            other.build_index()
    with gallery.writing() as writer:
        writer.remove(["p0"])
    with other.writing() as writer:  # on top of what was written meanwhile
        writer.remove(["p1"])
    assert len(other) == len(Gallery.open(gallery.uri)) == 10


def test_of_two_that_make_a_gallery_at_once_the_loser_is_told(tmp_path: Path) -> None:
    uri = str(tmp_path / "new")
    (tmp_path / "new").mkdir()
    with _write_lock(uri), pytest.raises(UserError, match=r"process \d+ is writing to this gallery; wait"):
        Gallery.open_or_create(uri, identity())
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".writing.lock"]
    first = Gallery.open_or_create(uri, identity())
    with first.writing(), pytest.raises(UserError, match=r"is writing to this gallery"), _second(uri).writing():
        pass


def _second(uri: str) -> Gallery:
    return Gallery.open_or_create(uri, identity())


def test_one_that_comes_while_the_gallery_is_made_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "new")
    made: list[Gallery] = []

    @contextmanager
    def after_the_other(place: str) -> Iterator[None]:
        # Between looking and locking, somebody else has made it and is done.
        monkeypatch.undo()
        made.append(Gallery.create(place, identity()))
        with _write_lock(place):
            yield

    monkeypatch.setattr("retrieval.gallery._write_lock", after_the_other)
    assert Gallery.open_or_create(uri, identity())._images.revision == made[0]._images.revision


def test_a_gallery_in_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    with read_only(tmp_path), pytest.raises(UserError, match=r"gallery: cannot be written \(Permission denied\)"):
        Gallery.open_or_create(str(tmp_path / "gallery"), identity())
