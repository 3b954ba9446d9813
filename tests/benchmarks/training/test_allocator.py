from __future__ import annotations

import pytest

from benchmarks.training.allocator import CASES, rows_of


def test_memory_kept_stands_beside_the_default() -> None:
    default, kept = CASES
    found = {
        default: [{"clock": 9.0, "user": 8.0, "system": 4.0}, {"clock": 10.0, "user": 8.0, "system": 5.0}],
        kept: [{"clock": 6.0, "user": 8.0, "system": 1.0}, {"clock": 6.0, "user": 8.0, "system": 1.0}],
    }
    clock, system = rows_of(found, 4)
    assert (clock.contender, clock.peer) == (kept, default)
    assert (clock.low, clock.high) == pytest.approx((0.6, 6 / 9))
    assert system.ratio == pytest.approx(0.225)
