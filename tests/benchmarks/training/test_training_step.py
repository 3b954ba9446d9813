from __future__ import annotations

import pytest

from benchmarks.training.step import measure, rows_of


def test_ours_stands_beside_every_other() -> None:
    rates = {"Vitrail": [9.9, 5.0], "hand-written loop": [10.0, 5.0], "transformers.Trainer": [9.0, 5.5]}
    by_hand, trainer = rows_of("classification", rates)
    assert (by_hand.peer, by_hand.promise, by_hand.kept) == ("hand-written loop", "≥ 0.98", True)
    assert (by_hand.low, by_hand.high) == pytest.approx((0.99, 1.0))
    assert (trainer.peer, trainer.promise) == ("transformers.Trainer", "> 1")
    assert (trainer.low, trainer.high) == pytest.approx((5 / 5.5, 1.1))


@pytest.mark.slow
def test_the_loops_take_turns() -> None:
    rates = measure("contrastive", ["Vitrail", "transformers.Trainer"], turns=2, chunk=1)
    assert {name: len(found) for name, found in rates.items()} == {"Vitrail": 2, "transformers.Trainer": 2}
    assert all(rate > 0 for found in rates.values() for rate in found)
