from __future__ import annotations

import mmap
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from benchmarks.harness.processes import Paced, children, in_new_process, own_memory, peak_memory, steps_for

linux = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux only")

LOOP = """
import os, sys

def loop(pacer, steps):
    collate = pacer.pace(lambda batch: print(batch, file=sys.stderr, flush=True))
    for step in range(steps):
        collate(step)
        if step == 99:
            sys.exit("a step has failed")

def clock(text):
    print("noise")
    if text == "fail":
        sys.exit("no such case")
    return {"clock": os.environ["CLOCK"] + text}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "paced_loop.py").write_text(LOOP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "paced_loop"


def test_the_result_of_another_process_comes_back(module: str) -> None:
    assert in_new_process(f"{module}:clock", "s", environment={"CLOCK": "1.5"}) == {"clock": "1.5s"}
    with pytest.raises(RuntimeError, match=r"paced_loop:clock \('fail',\) ended with 1:\nno such case"):
        in_new_process(f"{module}:clock", "fail")


def paced(module: str, log: Path, steps: int) -> Paced:
    return Paced(f"{module}:loop", steps, log=log, warm_up=3, chunk=2)


def test_a_loop_does_its_steps_in_a_turn_and_none_between_turns(module: str, tmp_path: Path) -> None:
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


def test_a_loop_that_fails_reports_why(module: str, tmp_path: Path) -> None:
    loop = paced(module, tmp_path / "log", 200)
    try:
        loop.wait_until_warm()
        for _ in range(48):  # 3 steps, then 2 a turn
            loop.turn()
        with pytest.raises(RuntimeError, match=r"ended with 1:(.|\n)*a step has failed"):
            loop.turn()
    finally:
        loop.stop()


def test_a_loop_ends_when_no_process_waits_for_it(module: str, tmp_path: Path) -> None:
    loop = paced(module, tmp_path / "log", 200)
    loop.wait_until_warm()
    assert loop._process.stdin is not None
    loop._process.stdin.close()
    assert loop._process.wait(timeout=60) == 1
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2"]
    loop._times.close()


MEGABYTES = 60


def hold(inherited: bytearray, size: int, end: Connection) -> None:
    # Pages from the system, not from malloc, which keeps or returns freed memory depending on what ran before.
    with mmap.mmap(-1, max(size << 20, 1), flags=mmap.MAP_PRIVATE) as own:
        for page in range(0, len(own), mmap.PAGESIZE):
            own[page] = 1
        end.send(sum(inherited[:: 1 << 12]) + len(own))  # read what the parent has, write what is one's own
        end.recv()


@linux
def test_only_what_a_process_has_written_itself_is_its_own() -> None:
    found = {}
    inherited = bytearray(b"x" * (MEGABYTES << 20))
    context = multiprocessing.get_context("fork")
    for size in (0, MEGABYTES):
        ours, theirs = context.Pipe()
        process = context.Process(target=hold, args=(inherited, size, theirs))
        process.start()
        ours.recv()
        assert process.pid in children(os.getpid())
        found[size] = own_memory(process.pid or 0)
        ours.send(0)
        process.join()
    assert found[0] < MEGABYTES / 2
    assert found[MEGABYTES] - found[0] == pytest.approx(MEGABYTES, abs=5)


@linux
def test_pages_of_a_fresh_file_are_not_a_process_own(tmp_path: Path) -> None:
    path = tmp_path / "fresh"
    before = own_memory(os.getpid())
    path.write_bytes(bytes(MEGABYTES << 20))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        assert sum(pages[:: 1 << 12]) == 0  # every page is read
        assert own_memory(os.getpid()) - before < MEGABYTES / 2


@linux
def test_the_peak_remembers_what_was_given_back() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before = peak_memory()
    # Pages of its own: memory that earlier tests gave back to malloc is not taken twice.
    with mmap.mmap(-1, 300 << 20) as block:
        block.write(b"z" * (300 << 20))
    assert peak_memory() - before > 250
