"""The matrix of a table can be lost, cut, stale or homeless; answers stay the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval import store as lance_store
from retrieval.gallery import Gallery
from retrieval.search import vectors as vector_rows
from retrieval.search.vectors import write_vectors
from tests.retrieval.small_gallery import identity, image_rows, small_gallery, vectors
from vitrail.errors import UserError

QUERIES = vectors(4, seed=9)


def files(gallery: Gallery) -> list[Path]:
    return sorted(Path(gallery.uri).glob("*.vectors"))


def test_a_lost_or_cut_matrix_is_made_again(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    expected = gallery.nearest(QUERIES, 20, "split = 'test'")
    [captions, images] = files(gallery)
    assert captions.name.startswith("captions.")
    whole = images.read_bytes()
    for content in (None, b"", whole[:-100], b"foreign" + whole[7:]):
        images.unlink()
        if content is not None:
            images.write_bytes(content)
        assert Gallery.open(gallery.uri).nearest(QUERIES, 20, "split = 'test'") == expected
        assert images.read_bytes() == whole
    assert files(gallery) == [captions, images]


@pytest.mark.parametrize("integers", [True, False])
def test_a_damaged_matrix_never_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, integers: bool
) -> None:
    """With its body zeroed, with noise in it and with single bytes changed, of images and captions."""
    monkeypatch.setattr("retrieval.search.exact.integer_products", lambda: integers)
    monkeypatch.setattr(vector_rows, "integer_products", lambda: integers)
    gallery = small_gallery(tmp_path / "g")
    expected = gallery.nearest(QUERIES, 20), gallery.nearest_captions(QUERIES, 5)
    random = np.random.default_rng(0)
    for path in files(gallery):
        whole = path.read_bytes()
        body = len(whole) - 64
        damaged = [whole[:64] + bytes(body), whole[:64] + random.bytes(body), random.bytes(len(whole))]
        for place in random.integers(64, len(whole), 20).tolist():
            damaged.append(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        for content in damaged:
            path.write_bytes(content)
            capsys.readouterr()
            again = Gallery.open(gallery.uri)
            assert (again.nearest(QUERIES, 20), again.nearest_captions(QUERIES, 5)) == expected
            assert path.read_bytes() == whole
            told = capsys.readouterr().err
            assert told.count("\n") == 1
            assert path.name in told
            assert "made again from the gallery's table" in told


def test_damage_that_is_found_by_the_search_that_looks_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval.search.vectors._CHECKED", 64)  # so small a gallery has one block else
    gallery = small_gallery(tmp_path / "g")
    expected = gallery.nearest(QUERIES, 20)
    opened = Gallery.open(gallery.uri)
    opened.nearest(QUERIES[:1], 1, "split = 'none'")  # opens the matrix and looks at no vector
    [_, images] = files(gallery)
    content = bytearray(images.read_bytes())
    content[64:96] = bytes(32)
    with images.open("r+b") as file:  # in place: a mapped file shows it
        file.write(content)
    assert opened.nearest(QUERIES, 20) == expected


def test_a_matrix_of_a_former_revision_never_answers(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    [_, former] = files(gallery)
    kept = former.read_bytes()
    with gallery.writing() as writer:
        writer.remove(["p0"])
        writer.add(image_rows(identity(), ["new"], vectors(1)))
    expected = gallery.nearest(QUERIES, 20)
    former.write_bytes(kept)
    [_, current] = [file for file in files(gallery) if file != former]
    current.unlink()
    assert Gallery.open(gallery.uri).nearest(QUERIES, 20) == expected
    assert {hit.id for hit in expected[0]} == {*(f"p{row}" for row in range(1, 12)), "new"}
    with gallery.writing():
        pass
    assert not former.exists()


def test_a_gallery_that_was_made_anew_in_the_same_place_has_a_matrix_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vector_rows, "_folders", lambda _: [tmp_path / "cache"])
    for seed in (1, 2):
        shutil.rmtree(tmp_path / "g", ignore_errors=True)
        gallery = Gallery.create(str(tmp_path / "g"), identity())
        with gallery.writing() as writer:
            writer.add(image_rows(identity(), ["a", "b"], vectors(2, seed=seed)))
        [hits] = Gallery.open(gallery.uri).nearest(vectors(2, seed=seed)[[1]], 1)
        assert hits[0].id == "b"
        assert hits[0].score == pytest.approx(1, abs=1e-6)


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write everywhere")
def test_a_folder_that_cannot_be_written_is_searched_by_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = small_gallery(tmp_path / "g")
    expected = gallery.nearest(QUERIES, 20)
    for file in files(gallery):
        file.unlink()
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "g").chmod(0o555)
    try:
        assert Gallery.open(gallery.uri).nearest(QUERIES, 20) == expected
    finally:
        (tmp_path / "g").chmod(0o755)
    assert files(gallery) == []
    assert len(list((tmp_path / "cache").rglob("*.vectors"))) == 1


def test_where_the_folder_refuses_the_cache_serves_and_where_both_refuse_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = small_gallery(tmp_path / "g")
    expected = gallery.nearest(QUERIES, 20)
    for file in files(gallery):
        file.unlink()
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    refusing = {tmp_path / "g"}

    def refused(path: Path, *arguments: object) -> None:
        if any(folder in path.parents for folder in refusing):
            raise PermissionError(13, "Permission denied", str(path))
        write_vectors(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(vector_rows, "write_vectors", refused)
    assert Gallery.open(gallery.uri).nearest(QUERIES, 20) == expected
    assert files(gallery) == []
    kept = list((tmp_path / "cache").rglob("*.vectors"))
    assert len(kept) == 1
    assert Gallery.open(gallery.uri).nearest(QUERIES, 20) == expected
    kept[0].unlink()
    refusing.add(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"set \$VITRAIL_CACHE"):
        Gallery.open(gallery.uri).nearest(QUERIES, 20)


@pytest.mark.parametrize("value", [0.0, 0.5, float("nan"), float("inf")])
def test_a_table_with_damaged_vectors_answers_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """LanceDB keeps no checksums; every vector was of unit length when it was written."""
    gallery = small_gallery(tmp_path / "g")
    for file in files(gallery):
        file.unlink()
    read = lance_store.LanceStore.vectors

    def damaged(store: lance_store.LanceStore) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint64]]]:
        for some, row_ids in read(store):
            broken = some.copy()
            broken[3] = value
            yield broken, row_ids

    monkeypatch.setattr(lance_store.LanceStore, "vectors", damaged)
    with pytest.raises(UserError, match=r"table 'images': 1 of 12 vectors read are not of unit length.*damaged"):
        Gallery.open(gallery.uri).nearest(QUERIES, 3)
    assert files(gallery) == []
