from __future__ import annotations

import mmap
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from benchmarks.harness.interleaved import children, own_memory, peak_memory

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux only")

MEGABYTES = 60


def hold(inherited: bytearray, size: int, end: Connection) -> None:
    own = bytearray(b"y" * (size << 20))
    end.send(sum(inherited[:: 1 << 12]) + len(own))  # read what the parent has, write what is one's own
    end.recv()


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


def test_pages_of_a_fresh_file_are_not_a_process_own(tmp_path: Path) -> None:
    path = tmp_path / "fresh"
    before = own_memory(os.getpid())
    path.write_bytes(bytes(MEGABYTES << 20))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        assert sum(pages[:: 1 << 12]) == 0  # every page is read
        assert own_memory(os.getpid()) - before < MEGABYTES / 2


def test_the_peak_remembers_what_was_given_back() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before = peak_memory()
    block = bytearray(b"z" * (300 << 20))
    assert len(block) == 300 << 20
    del block
    assert peak_memory() - before > 250
