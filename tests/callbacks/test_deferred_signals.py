from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from callbacks.last_checkpoint import DeferredSignals


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """Signals that an earlier handler has got."""
    got: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: got.append(number))
    yield got
    signal.signal(signal.SIGUSR2, before)


def test_a_signal_waits_until_it_is_taken(handled: list[int]) -> None:
    forwarded: list[int] = []
    signals = DeferredSignals([signal.SIGUSR2], forwarded.append)
    signals.install()
    assert signals.take() is None
    os.kill(os.getpid(), signal.SIGUSR2)
    assert forwarded == [signal.SIGUSR2]
    assert handled == []
    assert signals.take() == signal.SIGUSR2
    assert signals.take() is None
    signals.handle_as_before(signal.SIGUSR2)
    assert handled == [signal.SIGUSR2]
    signals.remove()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert handled == [signal.SIGUSR2, signal.SIGUSR2]


def test_who_asks_twice_does_not_wait(handled: list[int]) -> None:
    signals = DeferredSignals([signal.SIGUSR2], lambda number: None)
    signals.install()
    os.kill(os.getpid(), signal.SIGUSR2)
    with pytest.raises(SystemExit) as caught:
        os.kill(os.getpid(), signal.SIGUSR2)
    assert caught.value.code == 128 + signal.SIGUSR2
    signals.remove()
    assert handled == []


def test_what_another_process_has_got() -> None:
    signals = DeferredSignals([], lambda number: None)
    signals.note(signal.SIGTERM)
    assert signals.take() == signal.SIGTERM
