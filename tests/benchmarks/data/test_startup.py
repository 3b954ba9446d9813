from __future__ import annotations

import pytest

from benchmarks.data import startup


def test_commands_stand_beside_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "COMMANDS", {startup.PEER: ["-c", "pass"], "other": ["-c", "import json"]})
    times = startup.measure(2)
    # One round more than asked for warms the disk and is left out.
    assert {name: len(seconds) for name, seconds in times.items()} == {startup.PEER: 2, "other": 2}
    (row,) = startup.rows_of({startup.PEER: [4.0, 8.0], "other": [5.0, 8.0]})
    assert (row.contender, row.peer) == ("other", startup.PEER)
    assert (row.low, row.high) == pytest.approx((1.0, 1.25))
