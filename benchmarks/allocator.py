"""Training steps on a CPU with glibc's own memory thresholds and with those of ``experiments.allocator``.

    python -m benchmarks.allocator [--repeats 3] [--steps 4]

Each case runs RegNetX-200MF on 32 pictures of 224 px in a process of its own; they run in turn, so that a noisy machine
disturbs both alike.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

CASES = ("as glibc has it", "memory kept")


def steps(case: str, number: int) -> dict[str, float]:
    """Seconds of so many training steps: by the clock, in the program, and in the system."""
    from experiments.allocator import keep_freed_memory

    if case == CASES[1] and not keep_freed_memory():
        sys.exit("this C library has no such thresholds")
    import timm
    import torch

    network = timm.create_model("regnetx_002", num_classes=10)
    pictures = torch.randn(32, 3, 224, 224)

    def step() -> None:
        network.zero_grad()
        network(pictures).sum().backward()

    step()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(number):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "clock": time.perf_counter() - start,
        "user": after.ru_utime - before.ru_utime,
        "system": after.ru_stime - before.ru_stime,
    }


def main() -> None:
    """Print medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        sys.stdout.write(json.dumps(steps(options.case, options.steps)) + "\n")
        return
    found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(options.repeats):
        for case in CASES:
            command = [sys.executable, "-m", "benchmarks.allocator", "--case", case, "--steps", str(options.steps)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[case].append(json.loads(done.stdout.splitlines()[-1]))
    table = Table("case", "clock s", "user s", "system s", "ratio")
    peer = statistics.median(run["clock"] for run in found[CASES[0]])
    for case, runs in found.items():
        clock, user, system = (statistics.median(run[key] for run in runs) for key in ("clock", "user", "system"))
        table.add_row(case, f"{clock:.2f}", f"{user:.2f}", f"{system:.2f}", f"{clock / peer:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
