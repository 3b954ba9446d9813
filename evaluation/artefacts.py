"""Where commands write what they make; ``written_whole`` is how."""

from __future__ import annotations

import time
from pathlib import Path

from datamodules.whole_files import written_whole

__all__ = ["timed_directory", "written_whole"]


def timed_directory(place: Path) -> Path:
    """A directory below ``place`` named by the time, for a run that is made now; it does not exist yet."""
    made = place / time.strftime("%Y%m%d-%H%M%S")
    directory, number = made, 1
    while directory.exists():
        number += 1
        directory = made.with_name(f"{made.name}-{number}")
    return directory
