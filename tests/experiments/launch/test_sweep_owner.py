"""Who is still there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from experiments.launch.study import Silence, is_gone, name_of


def test_this_process_is_here() -> None:
    assert is_gone(name_of(os.getpid())) is False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_later_process_with_the_same_number_is_another() -> None:
    machine, number, started = name_of(os.getpid()).rsplit(" ", 2)
    assert is_gone(f"{machine} {number} {int(started) - 1}") is True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_ended_process_is_gone() -> None:
    code = "import os; from experiments.launch.study import name_of; print(name_of(os.getpid()))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert is_gone(ended) is True


def test_nothing_is_known_of_another_machine() -> None:
    assert is_gone("another pid:[1] 1 2") is None


def test_silence_counts_from_the_last_beat() -> None:
    seconds = [0.0]
    silence = Silence(10, lambda: seconds[0])
    assert not silence.too_long(1, 0)
    seconds[0] = 11
    assert silence.too_long(1, 0)
    assert not silence.too_long(1, 1)
    assert not silence.too_long(2, 0)
