from __future__ import annotations

import pytest

from benchmarks.training import allocator


def test_memory_kept_is_compared_with_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        False: iter([{"clock": 9.0, "system": 4.0}, {"clock": 10.0, "system": 5.0}]),
        True: iter([{"clock": 6.0, "system": 1.0}, {"clock": 6.0, "system": 1.0}]),
    }
    monkeypatch.setattr(allocator, "in_new_process", lambda target, kept, steps: next(found[kept]))
    clock, system = allocator.run(2)
    assert (clock.contender, clock.peer) == (allocator.KEPT, allocator.DEFAULT)
    assert (clock.low, clock.high) == pytest.approx((0.6, 6 / 9))
    assert system.ratio == pytest.approx(0.225)
