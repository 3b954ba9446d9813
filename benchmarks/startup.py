"""How long ``python -m experiments --help`` takes beside importing torch and lightning, which nothing can avoid.

    python -m benchmarks.startup [--repeats 5]

The commands are run in turn, so that a noisy machine disturbs all alike; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

PEER = "import torch, lightning"

COMMANDS: dict[str, list[str]] = {
    PEER: ["-c", PEER],
    "experiments --help": ["-m", "experiments", "--help"],
    "experiments fit --help": ["-m", "experiments", "fit", "--help"],
}


def measure(repeats: int) -> dict[str, list[float]]:
    """Wall time in seconds of each command, ``repeats`` times, interleaved; one unmeasured round warms the disk."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(repeats + 1):
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    """Print medians, spread and the ratio to the peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    times = measure(parser.parse_args().repeats)
    table = Table("command", "median s", "fastest s", "slowest s", "ratio to the import")
    peer = statistics.median(times[PEER])
    for name, values in times.items():
        median = statistics.median(values)
        table.add_row(name, f"{median:.2f}", f"{min(values):.2f}", f"{max(values):.2f}", f"{median / peer:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
