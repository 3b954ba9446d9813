"""How long ``python -m experiments --help`` takes beside importing torch and lightning, which nothing can avoid.

    python -m benchmarks.data.startup [--repeats 5]

The commands are run in turn, so that a noisy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

from benchmarks.harness.interleaved import Row, interleave, row, say

PEER = "import torch, lightning"

COMMANDS: dict[str, list[str]] = {
    PEER: ["-c", PEER],
    "experiments --help": ["-m", "experiments", "--help"],
    "experiments fit --help": ["-m", "experiments", "fit", "--help"],
}


def measure(repeats: int) -> dict[str, list[float]]:
    """Wall time in seconds of each command, ``repeats`` times, interleaved; one unmeasured round warms the disk."""
    commands = {name: _timed(arguments) for name, arguments in COMMANDS.items()}
    return {name: seconds[1:] for name, seconds in interleave(commands, repeats + 1).items()}


def _timed(arguments: list[str]) -> Callable[[], float]:
    def run_once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    return run_once


def rows_of(times: Mapping[str, list[float]]) -> list[Row]:
    """Each command beside the import."""
    return [row("start-up", name, PEER, times, "s") for name in times if name != PEER]


def run(repeats: int) -> list[Row]:
    """Seconds of the commands by those of the import."""
    return rows_of(measure(repeats))


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    say(run(parser.parse_args().repeats))


if __name__ == "__main__":
    main()
