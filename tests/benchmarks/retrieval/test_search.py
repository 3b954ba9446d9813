from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.retrieval import search
from benchmarks.retrieval.search import (
    CONTENDERS,
    OURS,
    OURS_WITH_NAMES,
    QUERIES,
    TOP_K,
    matrix_of,
    rows_file,
)

N, DIM = 300, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    search.make_gallery(folder, N, DIM)
    return folder


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("at_once", [1, 100])
@pytest.mark.parametrize("name", list(CONTENDERS))
def test_every_contender_finds_the_best_rows(folder: Path, name: str, at_once: int) -> None:
    queries = np.load(folder / QUERIES)[:at_once]
    matrix = matrix_of(folder / "gallery")
    found = CONTENDERS[name](folder / "gallery")(queries)
    best = np.argsort(-(queries @ matrix.T), axis=1)[:, :TOP_K]
    np.testing.assert_array_equal(np.sort(found, axis=1), np.sort(best, axis=1))


def test_the_gallery_holds_unit_vectors_and_nothing_twice(folder: Path) -> None:
    matrix = matrix_of(folder / "gallery")
    assert matrix.shape == (N, DIM)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-6)
    assert len(np.unique(matrix, axis=0)) == N
    with pytest.raises(RuntimeError, match="0 files of vectors"):
        matrix_of(folder / "nowhere")


@pytest.mark.slow
def test_contenders_take_turns_in_processes_of_their_own(folder: Path) -> None:
    names = [OURS, "NumPy, product and argpartition"]
    seconds = search.search_times(folder, names, 1, 2)
    assert {name: len(found) for name, found in seconds.items()} == dict.fromkeys(names, 2)
    assert all(one > 0 for found in seconds.values() for one in found)


def test_a_contender_that_finds_other_rows_is_named(tmp_path: Path) -> None:
    rows = np.arange(1000 * TOP_K).reshape(1000, TOP_K)
    for name, found in ((OURS, rows), ("FAISS IndexFlatIP", rows[:, ::-1])):
        np.save(rows_file(tmp_path, name, 1), found)
    search._check_same_rows(tmp_path, [OURS, "FAISS IndexFlatIP"], 1)  # in another order
    np.save(rows_file(tmp_path, "FAISS IndexFlatIP", 1), np.where(rows < 200, -1, rows))
    with pytest.raises(RuntimeError, match=r"FAISS IndexFlatIP finds 0\.9800 of the rows that Vitrail finds"):
        search._check_same_rows(tmp_path, [OURS, "FAISS IndexFlatIP"], 1)


def test_opening_is_measured_until_the_first_result(folder: Path) -> None:
    assert search.open_and_search(str(folder)) > 0
    search.forget(folder / "gallery")  # nothing is lost
    assert search.open_and_search(str(folder)) > 0


def test_ours_is_compared_with_every_other() -> None:
    seconds = {OURS: [0.1, 0.2], OURS_WITH_NAMES: [0.1, 0.3], "FAISS IndexFlatIP": [0.2, 0.2]}
    with_names, faiss = search.search_rows(1000, 8, 100, seconds)
    assert (with_names.peer, with_names.promise) == (OURS_WITH_NAMES, "")
    assert (faiss.benchmark, faiss.promise, faiss.kept) == ("top 10 of 1,000 × 8, 100 queries", "≥ 1", True)
    assert (faiss.low, faiss.high) == pytest.approx((1, 2))
