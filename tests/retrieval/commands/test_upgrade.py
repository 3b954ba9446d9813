"""Galleries of version 0.1, whose tables and columns had other names."""

from __future__ import annotations

from pathlib import Path

import lancedb
import pytest

from retrieval.__main__ import main
from retrieval.gallery import Gallery
from retrieval.search.searcher import Query, Searcher
from tests.support.galleries import identity, small_gallery, small_rows
from vitrail.errors import UserError


@pytest.fixture
def former(tmp_path: Path) -> Path:
    """A gallery with the names of version 0.1."""
    folder = tmp_path / "gallery"
    small_gallery(folder)
    table = lancedb.connect(str(folder)).open_table("captions")
    table.alter_columns({"path": "image", "rename": "picture"})
    (folder / "images.lance").rename(folder / "pictures.lance")
    (folder / "pictures.made-v1.vectors").write_bytes(b"a copy")
    return folder


def test_it_is_refused_with_the_command_that_upgrades_it(former: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hint = f"python -m retrieval upgrade --gallery {former}"
    with pytest.raises(UserError, match=hint):
        Gallery.open(str(former))
    with pytest.raises(UserError, match=hint):
        Gallery.open_or_create(str(former), identity())
    assert main(["search", "--gallery", str(former), "--like", "a"]) == 2
    assert hint in capsys.readouterr().err


def test_an_upgraded_gallery_is_searched_and_filled_as_before(
    former: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["upgrade", "--gallery", str(former)]) == 0
    assert "upgraded, 12 images" in capsys.readouterr().out
    assert main(["upgrade", "--gallery", str(former)]) == 0
    assert "is up to date, 12 images" in capsys.readouterr().out
    upgraded, made_now = Gallery.open(str(former)), small_gallery(tmp_path / "now")
    query = Query(like=small_rows(identity())[0].column("id")[0].as_py())
    assert Searcher(upgraded).search(query, 5).hits == Searcher(made_now).search(query, 5).hits
    with upgraded.writing() as writer, made_now.writing() as now:
        assert writer.known_captions().equals(now.known_captions())
    assert not list(former.glob("pictures*"))
