"""Commands in processes of their own."""

from __future__ import annotations

import threading
from pathlib import Path

from experiments.launch.results import run_process


def test_a_process_ends_when_asked_to(tmp_path: Path) -> None:
    stop, beats = threading.Event(), []

    def beat() -> None:
        beats.append(True)
        stop.set()

    assert (
        run_process(["timeit", "-n1", "-r1", "import time; time.sleep(60)"], tmp_path / "a.log", stop, beat=beat) != 0
    )
    assert beats == [True]
    assert run_process(["calendar", "2026", "1"], tmp_path / "b.log", threading.Event(), tmp_path / "b.out") == 0
    assert "January 2026" in (tmp_path / "b.out").read_text()
    assert (tmp_path / "b.log").read_text() == ""
