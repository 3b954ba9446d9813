from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness.processes import Paced, steps_for

LOOP = """
import argparse, os, sys, time
from benchmarks.harness.processes import Pacer
parser = argparse.ArgumentParser()
for name in ("--steps", "--warm-up", "--chunk", "--times"):
    parser.add_argument(name, type=int)
options = parser.parse_args()
pacer = Pacer(options.warm_up, options.chunk, sys.stdin, os.fdopen(options.times, "w"))
collate = pacer.pace(lambda batch: print(batch, file=sys.stderr, flush=True))
for step in range(options.steps):
    collate(step)
    if step == 99:
        sys.exit("a step has failed")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "paced_loop.py").write_text(LOOP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "paced_loop"


def paced(module: str, log: Path, steps: int) -> Paced:
    return Paced(module, ["--steps", str(steps), "--warm-up", "3", "--chunk", "2"], log)


def test_a_loop_does_so_many_steps_in_a_turn_and_none_between_turns(module: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    loop = paced(module, log, steps_for(3, 2, 2))
    try:
        loop.wait_until_warm()
        # The batch that ends a turn is fetched by the next one.
        assert log.read_text().split() == ["0", "1", "2"]
        assert loop.turn() > 0
        assert log.read_text().split() == ["0", "1", "2", "3", "4"]
        loop.turn()
        assert log.read_text().split() == ["0", "1", "2", "3", "4", "5", "6"]
        loop.finish()
        assert log.read_text().split()[-1] == "7"
    finally:
        loop.stop()


def test_a_loop_that_fails_says_why(module: str, tmp_path: Path) -> None:
    loop = paced(module, tmp_path / "log", 200)
    try:
        loop.wait_until_warm()
        for _ in range(48):  # 3 steps, then 2 a turn
            loop.turn()
        with pytest.raises(RuntimeError, match=r"ended with 1:(.|\n)*a step has failed"):
            loop.turn()
    finally:
        loop.stop()


def test_a_loop_ends_when_nobody_waits_for_it(module: str, tmp_path: Path) -> None:
    loop = paced(module, tmp_path / "log", 200)
    loop.wait_until_warm()
    assert loop._process.stdin is not None
    loop._process.stdin.close()
    assert loop._process.wait(timeout=60) == 1
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2"]
    loop._times.close()
