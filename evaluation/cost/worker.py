"""``python -m evaluation.cost.worker``: holds one model in a process of its own and times it when it is told to.

The first line that it reads says which model and device, each further one a batch size. Each is answered by one line
of JSON. ``evaluation.cost.workers`` is the other end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from vitrail.errors import run_reporting_user_errors


def main() -> int:
    """Answer until there is no more line to read."""
    # What libraries print must not stand between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return run_reporting_user_errors(lambda: _serve(answers))


def _serve(answers: IO[str]) -> None:
    import torch

    from evaluation.cost.efficiency import ModelSource, build

    asked = json.loads(sys.stdin.readline())
    device = asked["device"]
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    task, size = build(ModelSource(**asked["source"]), device)
    # What libraries take is no cost of the model; so weights are counted, and what a batch adds to them is measured.
    weights = sum(one.numel() * one.element_size() for one in [*task.parameters(), *task.buffers()])
    before = _resident()
    name = torch.cuda.get_device_name() if device == "cuda" else device
    answers.write(json.dumps({"device": name, "threads": torch.get_num_threads()}) + "\n")
    for line in sys.stdin:
        # Pixels that differ, because some kernels are quicker on zeros.
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (int(line), 3, size, size), dtype=torch.uint8, generator=generator)
        answers.write(json.dumps(_once(task, images, device, before and before - weights)) + "\n")


def _once(task: Any, images: Any, device: str, without: int | None) -> dict[str, Any]:
    """One batch, copied to the device; seconds, and peak memory of model and batch in bytes.

    Args:
        task: the model.
        images: uint8 ``(B, 3, H, W)``.
        device: ``cpu`` or ``cuda``.
        without: memory of the process without the model in bytes; None where the system does not tell.
    """
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    watched = device != "cuda" and _forget_peak()
    start = time.perf_counter()
    with torch.inference_mode():
        task(images.to(device))
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    if watched and without is not None:
        peak = _status("VmHWM") - without
    return {"seconds": seconds, "peak_bytes": peak}


def _forget_peak() -> bool:
    """Ask Linux to count the peak of this process's memory anew; whether it does."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _resident() -> int | None:
    return _status("VmRSS") if Path("/proc/self/status").exists() else None


def _status(key: str) -> int:
    """Bytes, by the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    sys.exit(main())
