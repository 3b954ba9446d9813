"""Files that are written whole: a kill or a full disk leaves the old file or none, never half a one; and where to."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary name next to ``path`` to write to, and rename it once the block has ended without an error.

    The folder is made if need be; the suffix stays, for writers that choose the format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        # The name that the user knows; some errors of writing have none.
        if error.filename in (None, partial, str(partial)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def timed_directory(place: Path) -> Path:
    """A directory below ``place`` named by the time, for a run that is made now; it does not exist yet."""
    made = place / time.strftime("%Y%m%d-%H%M%S")
    directory, number = made, 1
    while directory.exists():
        number += 1
        directory = made.with_name(f"{made.name}-{number}")
    return directory
