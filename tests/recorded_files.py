"""What a program asks the system to do with files, in order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

Event = tuple[str, Path]


def recorded_files(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """Renames and flushes to the disk from now on: ``("flush", file or folder)``, ``("rename", new name)``."""
    events: list[Event] = []
    fsync, replace = os.fsync, Path.replace

    def flushed(number: int) -> None:
        events.append(("flush", Path(f"/proc/self/fd/{number}").resolve()))
        fsync(number)

    def renamed(self: Path, target: Any) -> Path:
        events.append(("rename", Path(target)))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    return events
