from __future__ import annotations

import pytest

from benchmarks.training.gradient_cache import CASES, pairs, rows_of


def test_cached_gradients_stand_beside_one_chunk_and_all_embeddings() -> None:
    chunk, cached, at_once = CASES
    found = {
        chunk: [{"memory": 99.5, "seconds": 1.0}],
        cached: [{"memory": 125.0, "seconds": 12.0}],
        at_once: [{"memory": 500.0, "seconds": 10.0}],
    }
    # 256 pairs have two embeddings of 256 float32 each: half a megabyte.
    least, memory, seconds = rows_of(found, 256)
    assert (least.ratio, memory.ratio, seconds.ratio) == pytest.approx((1.25, 0.25, 1.2))
    assert memory.kept


def test_the_pairs_are_a_batch() -> None:
    batch = pairs(3)
    assert batch["image"].shape[0] == len(batch["caption"]) == len(batch["sample_id"]) == 3
