"""Signals that wait until it is safe to act on them.

A handler runs between any two instructions, also in the middle of an optimizer step. Here a signal is only noted; the
training asks for it between two batches.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType
from typing import Any


class DeferredSignals:
    """Notes signals and hands them out when asked.

    Args:
        signals: which.
        forward: called at once with a signal that has come, to pass it on to processes that this one started.
    """

    def __init__(self, signals: Iterable[signal.Signals], forward: Callable[[signal.Signals], None]) -> None:
        self._signals = tuple(signals)
        self._forward = forward
        self._noted: list[signal.Signals] = []
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take the signals over from whoever handles them; nothing happens outside of the main thread."""
        for number in self._signals:
            with suppress(ValueError):
                self._previous[number] = signal.signal(number, self._note)

    def remove(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            with suppress(ValueError):
                signal.signal(number, handler)
        self._previous = {}

    def take(self) -> signal.Signals | None:
        """The signal that came first of those that were not taken yet."""
        return self._noted.pop(0) if self._noted else None

    def note(self, number: signal.Signals) -> None:
        """Note a signal that another process has got."""
        self._noted.append(number)

    def handle_as_before(self, number: signal.Signals) -> None:
        """Call the handler that the signal was taken over from."""
        handler = self._previous.get(number)
        if callable(handler):
            handler(number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        came = signal.Signals(number)
        if came in self._noted:
            # Whoever asks twice does not want to wait.
            raise SystemExit(128 + number)
        self._noted.append(came)
        self._forward(came)
