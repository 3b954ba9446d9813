from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from retrieval.gallery import FilteredRows, Gallery
from retrieval.search.searcher import Query, Searcher
from retrieval.store import ROW_ID, Store, open_store
from tests.retrieval.small_gallery import CLASSES, meaning_vector, small_gallery
from vitrail.errors import UserError

CONDITIONS = [f"`predicted_class` = '{name}'" for name in CLASSES] + [
    f"`confidence_colour` > {0.4 + 0.05 * row:.2f}" for row in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery whose rows are not in the order of their row ids: the first was written anew."""
    folder = tmp_path_factory.mktemp("filtered") / "g"
    gallery = small_gallery(folder)
    with gallery.writing() as writer:
        rows = gallery.rows(["p0"], [*writer.known().column_names, "vector", "thumbnail"])
        writer.add(rows)
    return folder


@pytest.fixture
def store(folder: Path) -> Store:
    store = open_store(str(folder), "images")
    assert store is not None
    return store


def test_rows_and_places_are_those_of_a_scan(store: Store) -> None:
    rows = FilteredRows(store)
    ids = store.scan(["id"]).column("id").to_pylist()
    for condition in CONDITIONS:
        found = store.scan(["id"], condition)
        assert rows.row_ids(condition).tolist() == found.column(ROW_ID).to_pylist()
        assert [ids[place] for place in rows.places(condition).tolist()] == found.column("id").to_pylist()
    assert rows.places("").tolist() == list(range(12))


def test_the_last_filters_are_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, scan = FilteredRows(store), store.scan
    scans: list[str] = []

    def counted(columns: Sequence[str], where: str = "") -> pa.Table:
        scans.append(where)
        return scan(columns, where)

    monkeypatch.setattr(store, "scan", counted)
    for condition in (*CONDITIONS[:3], *CONDITIONS[:3]):
        rows.row_ids(condition)
    assert scans == CONDITIONS[:3]
    for condition in CONDITIONS:
        rows.row_ids(condition)
    rows.row_ids(CONDITIONS[0])
    assert scans.count(CONDITIONS[0]) == 2  # pushed out by the others, and looked up again


def test_a_new_revision_is_looked_up_anew(folder: Path, tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    assert len(gallery.places("class = 'bag'")) == 3
    with gallery.writing() as writer:
        writer.remove(["p0"])
    assert len(gallery.places("class = 'bag'")) == 2


def test_from_many_threads(store: Store) -> None:
    rows = FilteredRows(store)
    expected = [store.scan(["id"], condition).num_rows for condition in CONDITIONS]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: len(rows.row_ids(CONDITIONS[number % len(CONDITIONS)])), range(200)))
    assert found == [expected[number % len(CONDITIONS)] for number in range(200)]


@pytest.mark.parametrize("ranker", ["clip", "tfidf", "hybrid"])
def test_places_filter_as_the_filter_itself(folder: Path, ranker: str) -> None:
    gallery = Gallery.open(str(folder))
    where = "colour = 'black'"
    query = [Query(like="p5")]
    by_filter = Searcher(gallery).rank_all(query, 12, ranker, where)  # type: ignore[arg-type]
    by_places = Searcher(gallery).rank_all(query, 12, ranker, gallery.places(where))  # type: ignore[arg-type]
    assert by_places == by_filter
    assert len(by_places[0].hits) > 3


def test_nearest_among_no_places(folder: Path) -> None:
    gallery = Gallery.open(str(folder))
    vector = meaning_vector("bag")[None]
    assert gallery.nearest(vector, 3, np.zeros(0, np.int64)) == [[]]
    assert [hit.id for hit in gallery.nearest(vector, 3, np.array([5, 2]))[0]] == ["p3", "p6"]
    with pytest.raises(UserError, match="filter"):
        gallery.places("colour = ")
