"""What memory processes hold, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def peak_memory() -> float:
    """Highest resident memory of this process, since the peak was last cleared, in MB."""
    return _megabytes(Path("/proc/self/status"), "VmHWM")


def own_memory(process: int) -> float:
    """Memory that a process has written to and shares with nobody, in MB; that of its parent does not count."""
    return _megabytes(Path(f"/proc/{process}/smaps_rollup"), "Private_Dirty")


def children(process: int) -> list[int]:
    """Numbers of the processes that one has started, from whichever thread."""
    found = Path(f"/proc/{process}/task").glob("*/children")
    return [int(number) for path in found for number in path.read_text(encoding="ascii").split()]


def _megabytes(path: Path, key: str) -> float:
    lines = path.read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 1024
