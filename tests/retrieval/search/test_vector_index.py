"""The approximate index finds nearly what exact search finds, and what is not in it yet too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval import gallery as gallery_module
from retrieval.gallery import Gallery
from retrieval.schema import IMAGES
from retrieval.search.vectors import IndexReport, exact_neighbours
from retrieval.store import LanceStore
from tests.retrieval.small_gallery import identity, image_rows, small_gallery, vectors
from vitrail.errors import UserError

DIM, IMAGES_OF_A_KIND, KINDS = 32, 60, 50
MADE_BY = identity(dim=DIM, encodes_text=False)


def clustered(seed: int = 0) -> NDArray[np.float32]:
    """Vectors that lie in heaps, as those of images do; float32 ``(KINDS * IMAGES_OF_A_KIND, DIM)``."""
    draws = np.random.default_rng(seed)
    centres = np.repeat(draws.standard_normal((KINDS, DIM)), IMAGES_OF_A_KIND, axis=0)
    matrix = centres + 0.5 * draws.standard_normal(centres.shape)
    return np.asarray(matrix / np.linalg.norm(matrix, axis=1, keepdims=True), np.float32)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gallery, IndexReport]:
    gallery = Gallery.create(str(tmp_path_factory.mktemp("index") / "g"), MADE_BY)
    matrix = clustered()
    names = [f"p{row}" for row in range(len(matrix))]
    splits = ["test" if row % 10 == 0 else "train" for row in range(len(matrix))]
    with gallery.writing() as writer:
        writer.add(image_rows(MADE_BY, names, matrix, split=splits))
    file = next(Path(gallery.uri).glob("images.*.vectors"))
    report = gallery.build_index(sample=100)
    # Building the index changes no row, so the matrix is kept.
    assert not file.exists()
    assert len(list(Path(gallery.uri).glob("images.*.vectors"))) == 1
    return gallery, report


def brute_force(matrix: NDArray[np.float32], queries: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    return np.argsort(-(queries.astype(np.float64) @ matrix.T.astype(np.float64)), axis=1, kind="stable")[:, :k]


def recall(found: list[set[str]], expected: NDArray[np.int64]) -> float:
    shares = [len(near & {f"p{row}" for row in rows}) / len(rows) for near, rows in zip(found, expected, strict=True)]
    return float(np.mean(shares))


def test_the_recall_that_is_told_is_that_of_brute_force(indexed: tuple[Gallery, IndexReport]) -> None:
    gallery, report = indexed
    matrix = clustered()
    # The same choice of stored vectors; each finds itself first, which does not count.
    chosen = np.sort(np.random.default_rng(0).choice(len(matrix), 100, replace=False))
    expected = brute_force(matrix, matrix[chosen], 11)
    assert expected[:, 0].tolist() == chosen.tolist()
    hits = gallery.nearest(matrix[chosen], 11, exact=False)
    assert [near[0].id for near in hits] == [f"p{row}" for row in chosen]
    measured = recall([{hit.id for hit in near[1:]} for near in hits], expected[:, 1:])
    assert (report.rows, report.queries, report.k) == (len(matrix), 100, 10)
    assert report.recall == pytest.approx(measured)
    assert report.worst <= report.recall
    assert report.recall > 0.9


def test_scores_of_the_index_are_cosines(indexed: tuple[Gallery, IndexReport]) -> None:
    gallery, _ = indexed
    query = clustered(seed=1)[:1]
    [hits] = gallery.nearest(query, 5, exact=False)
    for hit in hits:
        assert hit.score == pytest.approx(float(gallery.vectors([hit.id])[0] @ query[0]), abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_a_filter_holds_before_the_best_are_chosen(indexed: tuple[Gallery, IndexReport]) -> None:
    gallery, _ = indexed
    matrix = clustered()
    queries = clustered(seed=1)[::100]
    tests = np.arange(0, len(matrix), 10)
    expected = tests[brute_force(matrix[tests], queries, 10)]
    hits = gallery.nearest(queries, 10, "split = 'test'", exact=False)
    assert [len(near) for near in hits] == [10] * len(queries)
    assert all(int(hit.id[1:]) % 10 == 0 for near in hits for hit in near)
    assert recall([{hit.id for hit in near} for near in hits], expected) > 0.9


def test_past_the_limit_the_index_answers_and_new_images_are_found_too(
    indexed: tuple[Gallery, IndexReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    shutil.copytree(indexed[0].uri, tmp_path / "g")
    gallery = Gallery.open(str(tmp_path / "g"))
    monkeypatch.setattr(gallery_module, "EXACT_LIMIT", 1000)
    queries = clustered(seed=1)[::500]
    assert gallery.nearest(queries, 5) == gallery.nearest(queries, 5, exact=False)
    with gallery.writing() as writer:
        writer.add(image_rows(MADE_BY, ["new"], queries[:1]))
        writer.remove([gallery.nearest(queries[1:2], 1)[0][0].id])
        # Before it is tidied the index does not have it.
        assert gallery.nearest(queries[:1], 1)[0][0].id == "new"
    for found in (gallery, Gallery.open(gallery.uri)):
        assert found.nearest(queries[:1], 1)[0][0].id == "new"
        assert found.nearest(queries[:1], 1)[0][0].score == pytest.approx(1, abs=1e-5)
        assert found.nearest(queries, 5) == found.nearest(queries, 5, exact=False)
        # The index may miss the nearest one, the exact search does not.
        [exact], [by_index] = found.nearest(queries[1:2], 5, exact=True), found.nearest(queries[1:2], 5)
        assert all(one.score >= other.score - 1e-5 for one, other in zip(exact, by_index, strict=True))
    # No matrix is made of what the index answers for, except where exact search was asked for.
    assert len(list((tmp_path / "g").glob("images.*.vectors"))) == 2


def test_exact_neighbours_are_found_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrieval.store.BATCH_ROWS", 7)
    gallery = small_gallery(tmp_path / "g")
    store = LanceStore.open(gallery.uri, IMAGES)
    assert store is not None
    matrix = gallery.vectors([f"p{row}" for row in range(12)])
    assert len(list(store.vectors())) > 1
    rows = store.scan(["id"]).column("_rowid").to_numpy()
    assert np.array_equal(
        exact_neighbours(store, vectors(5, seed=2), 9), rows[brute_force(matrix, vectors(5, seed=2), 9)]
    )


def test_too_small_a_gallery_is_told(tmp_path: Path) -> None:
    gallery = small_gallery(tmp_path / "g")
    with pytest.raises(UserError, match=r"has 12 images; an index needs 1,000"):
        gallery.build_index()
    assert not gallery.has_index()
