"""Exact search finds what a comparison with every vector finds; no approximate score is further off than its margin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from retrieval.search import exact
from retrieval.search.exact import Coarse, ExactIndex, Scan, coarse_copy, coarse_queries, integer_products, largest_norm

needs_integers = pytest.mark.skipif(not integer_products(), reason="no integer dot products here")

SCANS = [
    "float",
    pytest.param("integer", marks=needs_integers),
    "device",
    "device, passing by",
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu:0"
"""Without a GPU the same steps, with the processor's memory in its place."""


@pytest.fixture(params=SCANS)
def scan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How rows are scanned; in blocks so small that there are many."""
    monkeypatch.setattr(exact, "_SAMPLE", 40)
    monkeypatch.setattr(exact, "_CELLS", 600)
    monkeypatch.setattr(exact, "_QUERIES", 5)
    monkeypatch.setattr(exact, "_BLOCK", 64)
    if request.param == "device, passing by":
        monkeypatch.setattr(exact, "_fits", lambda *_: False)
    return str(request.param)


def index_of(matrix: NDArray[np.float32], scan: str) -> ExactIndex:
    device = DEVICE if scan.startswith("device") else "cpu"
    return ExactIndex(matrix, device, coarse_copy(matrix) if scan == "integer" else None)


def by_hand(
    matrix: NDArray[np.float32], queries: NDArray[np.float32], k: int, allowed: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """All scores, sorted stably."""
    rows = np.arange(len(matrix)) if allowed is None else np.unique(allowed)
    scores = (queries.astype(np.float64) @ matrix[rows].astype(np.float64).T).astype(np.float32)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return rows[best], np.take_along_axis(scores, best, axis=1)


def unit(rows: NDArray[np.float64]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def kinds(kind: str, n: int, dim: int) -> NDArray[np.float32]:
    """Vectors that are hard in different ways."""
    random = np.random.default_rng(0)
    normal = random.standard_normal((n, dim))
    if kind == "normal":
        return unit(normal)
    if kind == "narrow cone":  # as CLIP's: a large common part
        return unit(0.05 * normal + random.standard_normal(dim))
    if kind == "heavy tails":
        return unit(np.abs(normal) ** 4)
    if kind == "one large dimension":
        normal[:, 0] *= 1000
        return unit(normal)
    return (100 * normal).astype(np.float32)  # of no unit length


@pytest.mark.parametrize("kind", ["normal", "narrow cone", "heavy tails", "one large dimension", "long"])
@pytest.mark.parametrize(("dim", "k"), [(1, 3), (7, 1), (33, 10), (64, 700)])
def test_finds_what_a_comparison_with_every_vector_finds(scan: str, kind: str, dim: int, k: int) -> None:
    matrix = kinds(kind, 1000, dim)
    queries = np.concatenate([matrix[:6], kinds("normal", 6, dim)])
    found = index_of(matrix, scan).search(queries, k)
    rows, scores = by_hand(matrix, queries, k)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.scores, scores)
    assert found.rows.dtype == np.int64
    assert found.scores.dtype == np.float32


def test_equal_scores_stand_in_the_order_of_the_rows(scan: str) -> None:
    distinct = kinds("normal", 30, 16)
    matrix = distinct[np.random.default_rng(1).integers(0, 30, 900)]  # some thirty times each, in all blocks
    found = index_of(matrix, scan).search(distinct, 45)
    np.testing.assert_array_equal(found.rows, by_hand(matrix, distinct, 45)[0])


def test_ties_everywhere_give_the_first_rows(scan: str) -> None:
    """Of a model that maps everything to one point, and of a query of zeros."""
    one_point = np.repeat(kinds("normal", 1, 24), 300, axis=0)
    found = index_of(one_point, scan).search(kinds("normal", 4, 24), 7)
    np.testing.assert_array_equal(found.rows, np.tile(np.arange(7), (4, 1)))
    found = index_of(kinds("normal", 100, 8), scan).search(np.zeros((1, 8), np.float32), 3)
    np.testing.assert_array_equal(found.rows, [[0, 1, 2]])
    np.testing.assert_array_equal(found.scores, [[0, 0, 0]])


def test_a_query_is_answered_alike_alone_and_among_others(scan: str) -> None:
    matrix, queries = kinds("narrow cone", 800, 40), kinds("narrow cone", 12, 40)
    index = index_of(matrix, scan)
    together = index.search(queries, 10)
    for number in range(len(queries)):
        alone = index.search(queries[number : number + 1], 10)
        np.testing.assert_array_equal(alone.rows[0], together.rows[number])
        np.testing.assert_array_equal(alone.scores[0], together.scores[number])


@pytest.mark.parametrize("share", [0.005, 0.5, 0.99])
def test_only_allowed_rows_are_found(scan: str, share: float) -> None:
    matrix, queries = kinds("normal", 1000, 20), kinds("normal", 6, 20)
    allowed = np.random.default_rng(2).permutation(1000)[: int(1000 * share)]
    found = index_of(matrix, scan).search(queries, 8, np.concatenate([allowed, allowed[:3]]))
    rows, scores = by_hand(matrix, queries, 8, allowed)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.scores, scores)


def test_fewer_are_found_where_there_are_fewer(scan: str) -> None:
    matrix, queries = kinds("normal", 12, 5), kinds("normal", 3, 5)
    index = index_of(matrix, scan)
    np.testing.assert_array_equal(index.search(queries, 100).rows, by_hand(matrix, queries, 12)[0])
    assert index.search(queries, 100, np.array([3, 4])).rows.shape == (3, 2)
    assert index.search(queries, 100, np.array([], np.int64)).rows.shape == (3, 0)
    assert index.search(queries, 0).scores.shape == (3, 0)
    assert index.search(queries[:0], 4).rows.shape == (0, 4)
    empty = index_of(np.zeros((0, 5), np.float32), scan)
    assert empty.search(queries, 10).rows.shape == (3, 0)


def test_files_and_views_are_searched_without_a_copy(scan: str, tmp_path: Path) -> None:
    matrix = kinds("normal", 500, 6)
    np.save(tmp_path / "vectors.npy", matrix)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    index = index_of(mapped, scan)
    wide = np.asfortranarray(kinds("normal", 10, 6))[::2]
    np.testing.assert_array_equal(index.search(wide, 4).rows, by_hand(matrix, wide, 4)[0])
    assert index._parts[0].matrix is mapped


@pytest.mark.parametrize("allowed", [None, np.arange(3, 260, 2), np.array([1, 251])])
@pytest.mark.parametrize("k", [1, 30, 400])
def test_joined_indexes_find_what_one_of_all_rows_finds(scan: str, k: int, allowed: NDArray[np.int64] | None) -> None:
    matrix, queries = kinds("normal", 260, 6), kinds("normal", 12, 6)
    matrix[[5, 203, 259]] = matrix[77]  # equal scores across parts
    parts = [matrix[:200], matrix[200:200], matrix[200:250], matrix[250:]]
    found = ExactIndex.joined([index_of(part, scan) for part in parts]).search(queries, k, allowed)
    rows, scores = by_hand(matrix, queries, k, allowed)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_array_equal(found.scores, scores)


def test_blocks_of_the_usual_size_give_the_same() -> None:
    matrix, queries = kinds("narrow cone", 20_000, 16), kinds("narrow cone", 150, 16)
    rows, _ = by_hand(matrix, queries, 10)
    for copied in (None, coarse_copy(matrix)):
        found = ExactIndex(matrix, coarse=copied).search(queries, 10)
        np.testing.assert_array_equal(found.rows, rows)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(broken: float) -> None:
    matrix, queries = kinds("normal", 20, 4), kinds("normal", 2, 4)
    index = ExactIndex(matrix.copy())
    queries[1, 2] = broken
    with pytest.raises(ValueError, match="queries: hold numbers that are not finite"):
        index.search(queries, 3)
    matrix[13, 1] = broken
    with pytest.raises(ValueError, match="vectors: row 13 holds numbers that are not finite"):
        ExactIndex(matrix)


def test_what_does_not_fit_is_refused() -> None:
    matrix = kinds("normal", 20, 4)
    index = ExactIndex(matrix)
    with pytest.raises(ValueError, match=r"queries: are \(2, 3\), must be \(Q, 4\)"):
        index.search(np.zeros((2, 3), np.float32), 3)
    with pytest.raises(ValueError, match=r"k: is -1"):
        index.search(matrix, -1)
    for strange in (-1, 20):
        with pytest.raises(ValueError, match="allowed: rows must be from 0 to 19"):
            index.search(matrix, 3, np.array([2, strange]))
    with pytest.raises(ValueError, match="must be float32"):
        ExactIndex(matrix.astype(np.float64))
    with pytest.raises(ValueError, match="coarse copy"):
        ExactIndex(matrix, coarse=coarse_copy(matrix[:5]))


def scores_and_margin(copy: Coarse, queries: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the copy says, in integers, and how far it may be off."""
    asked = coarse_queries(copy, queries.astype(np.float64))
    products = asked.columns.numpy().T.astype(np.int64) @ copy.codes.astype(np.int64).T
    return asked.offset[:, None] + asked.factor[:, None] * products, asked.margin


@pytest.mark.parametrize("kind", ["normal", "narrow cone", "heavy tails", "one large dimension", "long"])
def test_no_score_is_further_off_than_the_margin(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_BLOCK", 300)
    matrix, queries = kinds(kind, 1000, 48), kinds("normal", 50, 48)
    queries[::2] = matrix[:25]
    said, margin = scores_and_margin(coarse_copy(matrix), queries)
    true = queries.astype(np.float64) @ matrix.astype(np.float64).T
    off = np.abs(said - true).max(axis=1)
    assert (off <= margin).all()
    # And it says something: with unit vectors that share nothing, a few hundredths.
    if kind == "normal":
        assert margin.max() < 0.05


def test_the_worst_query_meets_the_margin_but_does_not_pass_it() -> None:
    """Along what rounding left of a row, the error is as large as it can be."""
    matrix = kinds("normal", 400, 16)
    copy = coarse_copy(matrix)
    left = matrix - copy.centre - copy.scale * copy.codes
    worst = left[np.linalg.norm(left, axis=1).argmax()][None]
    queries = (worst / np.linalg.norm(worst)).astype(np.float32)
    said, margin = scores_and_margin(copy, queries)
    off = np.abs(said - queries.astype(np.float64) @ matrix.astype(np.float64).T).max()
    assert 0.9 * copy.residual < off <= margin[0]


@pytest.mark.parametrize("matrix", [np.zeros((0, 4)), np.zeros((3, 4)), np.ones((3, 4)), np.full((1, 4), 1e-30)])
def test_vectors_without_spread_have_a_copy(matrix: NDArray[np.float64]) -> None:
    vectors = matrix.astype(np.float32)
    copy = coarse_copy(vectors)
    assert copy.codes.shape == vectors.shape
    said, margin = scores_and_margin(copy, np.ones((1, 4), np.float32))
    assert (np.abs(said - vectors.sum(axis=1)) <= margin[:, None] + 1e-12).all()
    assert np.isfinite(margin).all()


@pytest.fixture(params=["highest", "medium"])
def _precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Precision that a training may have set for products in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize("kind", ["normal", "narrow cone", "heavy tails", "long"])
@pytest.mark.parametrize("how", ["float", "device", pytest.param("integer", marks=needs_integers)])
@pytest.mark.parametrize("rows", [slice(10, 90), np.array([3, 4, 99])])
def test_no_scan_is_further_off_than_its_margin(kind: str, how: str, rows: slice) -> None:
    matrix, queries = kinds(kind, 100, 50), kinds("normal", 9, 50).astype(np.float64)
    coarse = coarse_copy(matrix) if how == "integer" else None
    scan = Scan(matrix, largest_norm(matrix), DEVICE if how == "device" else "cpu", coarse)
    asked = scan.queries(queries)
    scanned = scan.scores(rows, asked, scan.buffer(200, 9)).cpu().numpy()
    off = np.abs(asked.offset + asked.factor * scanned - matrix[rows].astype(np.float64) @ queries.T)
    assert off.shape == (len(matrix[rows]), 9)
    assert (off <= asked.margin).all()


def test_float32_on_a_processor_leaves_little_to_doubt() -> None:
    matrix = kinds("normal", 10, 512)
    scan = Scan(matrix, largest_norm(matrix), "cpu", None)
    assert scan.queries(matrix.astype(np.float64)).margin.max() < 1e-4


@needs_integers
def test_the_largest_codes_do_not_overflow() -> None:
    """Products of bytes in pairs of 16 bits would: 127 · 127 · 2 = 32,258 is the largest pair, of 4,096 dimensions."""
    matrix = np.repeat(np.array([[1.0], [-1.0]], np.float32), 4096, axis=1)
    scan = Scan(matrix, 64.0, "cpu", coarse_copy(matrix))
    scanned = scan.scores(slice(0, 2), asked := scan.queries(np.ones((1, 4096))), scan.buffer(2, 1))
    assert scanned.tolist() == [[127 * 127 * 4096], [-127 * 127 * 4096]]
    np.testing.assert_allclose(asked.offset + asked.factor * scanned.numpy(), [[4096], [-4096]], rtol=1e-6)
