"""The coarse copy's promise: no score is further off than its margin."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval.search import exact as coarse
from retrieval.search.exact import Coarse, coarse_copy, coarse_queries
from tests.retrieval.search.test_exact import kinds


def scores_and_margin(copy: Coarse, queries: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the copy says, in integers, and how far it may be off."""
    asked = coarse_queries(copy, queries.astype(np.float64))
    products = asked.codes.astype(np.int64) @ copy.codes.astype(np.int64).T
    return asked.offset[:, None] + asked.factor[:, None] * products, asked.margin


@pytest.mark.parametrize("kind", ["normal", "narrow cone", "heavy tails", "one large dimension", "long"])
def test_no_score_is_further_off_than_the_margin(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coarse, "_BLOCK", 300)
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
