from __future__ import annotations

from typing import Any

import pytest

from benchmarks.training import gradient_cache


def test_cached_gradients_are_compared_with_one_chunk_and_all_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        gradient_cache.CHUNK: {"memory": 99.5, "seconds": 1.0},
        gradient_cache.CACHED: {"memory": 125.0, "seconds": 12.0},
        gradient_cache.AT_ONCE: {"memory": 500.0, "seconds": 10.0},
    }

    def measured(target: str, case: str, *sizes: object, environment: Any) -> dict[str, float]:
        return found[case]

    monkeypatch.setattr(gradient_cache, "in_new_process", measured)
    # 256 pairs have two embeddings of 256 float32 each: half a megabyte.
    least, very_large, memory, seconds = gradient_cache.run(1)
    # 4096 pairs take eight megabytes.
    assert very_large.ratio == pytest.approx(125 / (99.5 + 8))
    assert (least.ratio, memory.ratio, seconds.ratio) == pytest.approx((1.25, 0.25, 1.2))
    assert memory.kept
