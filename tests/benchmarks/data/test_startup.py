from __future__ import annotations

import pytest

from benchmarks.data import startup


def test_commands_are_compared_with_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "COMMANDS", {startup.PEER: ["-c", "pass"], "other": ["-c", "import json"]})
    # One round more than asked for warms the disk and is left out.
    seconds = {"pass": iter([99.0, 4.0, 8.0]), "import json": iter([1.0, 5.0, 8.0])}
    monkeypatch.setattr(startup, "seconds", lambda arguments: next(seconds[arguments[1]]))
    (row,) = startup.run(2)
    assert (row.contender, row.peer) == ("other", startup.PEER)
    assert (row.low, row.high) == pytest.approx((1.0, 1.25))


def test_a_process_is_timed() -> None:
    assert startup.seconds(["-c", "pass"]) > 0
