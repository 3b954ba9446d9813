from __future__ import annotations

import pytest

from benchmarks.retrieval import object_store


@pytest.mark.slow  # two processes that import all that a search needs, in addition to the server
def test_index_and_exact_search_are_compared_on_a_real_object_store() -> None:
    pytest.importorskip("moto", reason="moto is not installed")
    recall, opened, rates = object_store.run(1, images=2000, dim=16)
    assert recall.benchmark == "2,000 × 16 on S3, recall@10"
    # Two thousand vectors are few cells, of which a search looks into all.
    assert 0.95 <= recall.ratio <= 1
    assert "worst of 100 queries" in recall.note
    assert opened.ratio > 0
    assert rates.unit == "searches/s"
