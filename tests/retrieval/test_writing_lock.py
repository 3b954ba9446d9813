"""One writer at a time, and a killed one blocks nobody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.schema import UserError
from retrieval.gallery import Gallery
from tests.retrieval.small_gallery import small_gallery, vectors

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
