"""Training steps on a CPU with glibc's own memory thresholds and with those of ``vitrail.runtime``.

Each case runs RegNetX-200MF on 32 images of 224 px in a process of its own; they run in turn.
"""

from __future__ import annotations

import resource
import time
from functools import partial

from benchmarks.harness.interleaved import Row, interleave, pick, row
from benchmarks.harness.processes import in_new_process

DEFAULT, KEPT = "glibc's thresholds", "memory kept"


def seconds(keeps_memory: bool, steps: int) -> dict[str, float]:
    """Seconds of training steps: wall time, and time within the system."""
    from vitrail.runtime import keep_freed_memory

    if keeps_memory and not keep_freed_memory():
        raise RuntimeError("this C library has no such thresholds")
    import timm
    import torch

    network = timm.create_model("regnetx_002", num_classes=10)
    images = torch.randn(32, 3, 224, 224)

    def step() -> None:
        network.zero_grad()
        network(images).sum().backward()

    step()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(steps):
        step()
    system = resource.getrusage(resource.RUSAGE_SELF).ru_stime - before.ru_stime
    return {"clock": time.perf_counter() - start, "system": system}


def run(repeats: int, steps: int = 4) -> list[Row]:
    """Seconds with memory kept by those without."""
    target = f"{__name__}:seconds"
    cases = {case: partial(in_new_process, target, case == KEPT, steps) for case in (DEFAULT, KEPT)}
    found = interleave(cases, repeats)
    return [
        row(f"allocator, {steps} training steps", KEPT, DEFAULT, pick(found, key), unit, "< 1")
        for key, unit in (("clock", "s"), ("system", "s within the system"))
    ]
