"""What memory processes hold, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def peak_memory() -> float:
    """Highest resident memory of this process, since the peak was last cleared, in MB."""
    return _megabytes(Path("/proc/self/status"), "VmHWM")


def own_memory(process: int) -> float:
    """Memory that a process has written to and shares with nobody, in MB.

    What it has in common with its parent does not count. Neither do pages of a file that it has mapped: where the file
    was written a moment ago Linux calls them dirty and private too, but they are the file's, not the process's.
    """
    total = dirty = 0
    for line in Path(f"/proc/{process}/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("Private_Dirty:"):
            dirty = int(line.split()[1])
        elif line.startswith("Anonymous:"):
            total += min(dirty, int(line.split()[1]))
    return total / 1024


def children(process: int) -> list[int]:
    """Numbers of the processes that one has started, from whichever thread."""
    found = Path(f"/proc/{process}/task").glob("*/children")
    return [int(number) for path in found for number in path.read_text(encoding="ascii").split()]


def _megabytes(path: Path, key: str) -> float:
    lines = path.read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 1024
