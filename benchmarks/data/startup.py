"""How long ``python -m experiments --help`` takes, compared with importing torch and lightning, which is inevitable."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial

from benchmarks.harness.interleaved import Row, interleave, row

PEER = "import torch, lightning"

COMMANDS: dict[str, list[str]] = {
    PEER: ["-c", PEER],
    "experiments --help": ["-m", "experiments", "--help"],
    "experiments fit --help": ["-m", "experiments", "fit", "--help"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of a Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def run(repeats: int) -> list[Row]:
    """Seconds of the commands by those of the import; a round more than asked for warms the disk."""
    found = interleave({name: partial(seconds, arguments) for name, arguments in COMMANDS.items()}, repeats + 1)
    times = {name: several[1:] for name, several in found.items()}
    return [row("start-up", name, PEER, times, "s") for name in times if name != PEER]
