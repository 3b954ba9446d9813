"""The scan's promise: what it says of a row is never further off than its margin."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from retrieval.search.exact import Scan, coarse_copy, integer_products, longest
from tests.retrieval.search.test_exact import DEVICE, kinds

needs_integers = pytest.mark.skipif(not integer_products(), reason="no integer dot products here")


@pytest.fixture(params=["highest", "medium"])
def _precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a training may have told torch about products in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize("kind", ["normal", "narrow cone", "heavy tails", "long"])
@pytest.mark.parametrize("how", ["float", "device", pytest.param("integer", marks=needs_integers)])
@pytest.mark.parametrize("rows", [slice(10, 90), np.array([3, 4, 99])])
def test_no_score_is_further_off_than_the_margin(kind: str, how: str, rows: slice) -> None:
    matrix, queries = kinds(kind, 100, 50), kinds("normal", 9, 50).astype(np.float64)
    coarse = coarse_copy(matrix) if how == "integer" else None
    scan = Scan(matrix, longest(matrix), DEVICE if how == "device" else "cpu", coarse)
    asked = scan.ask(queries)
    scanned = scan.scores(rows, asked, scan.buffer(200, 9)).cpu().numpy()
    off = np.abs(asked.offset + asked.factor * scanned - matrix[rows].astype(np.float64) @ queries.T)
    assert off.shape == (len(matrix[rows]), 9)
    assert (off <= asked.margin).all()


def test_float32_on_a_processor_leaves_little_to_doubt() -> None:
    matrix = kinds("normal", 10, 512)
    scan = Scan(matrix, longest(matrix), "cpu", None)
    assert scan.ask(matrix.astype(np.float64)).margin.max() < 1e-4


@needs_integers
def test_the_largest_codes_do_not_overflow() -> None:
    """Products of bytes in pairs of 16 bits would: 127 · 127 · 2 = 32,258 is the largest pair, of 4,096 dimensions."""
    matrix = np.repeat(np.array([[1.0], [-1.0]], np.float32), 4096, axis=1)
    scan = Scan(matrix, 64.0, "cpu", coarse_copy(matrix))
    scanned = scan.scores(slice(0, 2), asked := scan.ask(np.ones((1, 4096))), scan.buffer(2, 1))
    assert scanned.tolist() == [[127 * 127 * 4096], [-127 * 127 * 4096]]
    np.testing.assert_allclose(asked.offset + asked.factor * scanned.numpy(), [[4096], [-4096]], rtol=1e-6)
