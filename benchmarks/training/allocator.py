"""Training steps on a CPU with glibc's own memory thresholds and with those of ``vitrail.runtime``.

    python -m benchmarks.training.allocator [--repeats 3] [--steps 4]

Each case runs RegNetX-200MF on 32 images of 224 px in a process of its own; they run in turn, so that a noisy machine
disturbs both alike.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Mapping
from functools import partial

from benchmarks.harness.interleaved import Row, in_new_process, interleave, row, say

CASES = ("as glibc has it", "memory kept")
STEPS = 4


def steps(case: str, number: int) -> dict[str, float]:
    """Seconds of so many training steps: by the clock, in the program, and in the system."""
    from vitrail.runtime import keep_freed_memory

    if case == CASES[1] and not keep_freed_memory():
        sys.exit("this C library has no such thresholds")
    import timm
    import torch

    network = timm.create_model("regnetx_002", num_classes=10)
    images = torch.randn(32, 3, 224, 224)

    def step() -> None:
        network.zero_grad()
        network(images).sum().backward()

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


def measure(repeats: int, number: int) -> dict[str, list[dict[str, float]]]:
    """Each case so many times, in turn."""
    arguments = {case: ["--case", case, "--steps", str(number)] for case in CASES}
    cases = {case: partial(in_new_process, "benchmarks.training.allocator", given) for case, given in arguments.items()}
    return interleave(cases, repeats)


def rows_of(found: Mapping[str, list[dict[str, float]]], number: int) -> list[Row]:
    """Memory kept beside what is the default, by the clock and within the system."""
    peer, kept = CASES
    rows = []
    for key, unit in (("clock", "s"), ("system", "s within the system")):
        values = {case: [one[key] for one in several] for case, several in found.items()}
        rows.append(row(f"allocator, {number} training steps", kept, peer, values, unit, "< 1"))
    return rows


def run(repeats: int, number: int = STEPS) -> list[Row]:
    """Seconds with memory kept by those without."""
    return rows_of(measure(repeats, number), number)


def main() -> None:
    """Print the ratios, or be one of the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        sys.stdout.write(json.dumps(steps(options.case, options.steps)) + "\n")
    else:
        say(run(options.repeats, options.steps))


if __name__ == "__main__":
    main()
