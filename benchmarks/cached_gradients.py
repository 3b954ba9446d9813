"""Memory and time of large contrastive batches with cached gradients, beside one chunk and beside everything at once.

    python -m benchmarks.cached_gradients [--batch 256] [--chunk 32] [--repeats 3]

Each case runs one training step in a process of its own, which reports its highest resident memory over what it held
before. With cached gradients a step should need the memory of one chunk and of the embeddings, whatever the batch; the
price is a second forward pass. The cases are run in turn, so that a noisy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from datamodules.schema import Batch
    from lightning_modules.dual_encoder import DualEncoder

CASES = ("one chunk", "cached", "at once")
IMAGE_SIZE = 64


def step(case: str, batch_size: int, chunk_size: int) -> dict[str, float]:
    """One training step of a ResNet18 with DistilBERT.

    Returns:
        Highest memory over the start in MB, and seconds.
    """
    import torch

    from lightning_modules.dual_encoder import DualEncoder

    task = DualEncoder(
        {"image": "resnet18", "image_pretrained": False, "text": "distilbert-base-uncased", "text_pretrained": False},
        image_size=IMAGE_SIZE,
        chunk_size=chunk_size if case == "cached" else 0,
    )
    task.towers.tokenizer = task.towers.train_tokenizer(["a few words to read"])
    # A first step, so that gradients and the libraries' own buffers do not count.
    _train(task, pairs(2))
    batch = pairs(chunk_size if case == "one chunk" else batch_size)
    before, start = resident(), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    _train(task, batch)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in task.parameters())
    return {"memory": peak() - before, "seconds": time.perf_counter() - start}


def _train(task: DualEncoder, batch: Batch) -> None:
    loss, _ = task._shared_step(batch, "train")
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own


def pairs(rows: int) -> Batch:
    """Random pictures, each with the same caption of 25 words."""
    import torch

    return {
        "image": torch.randint(0, 256, (rows, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8),
        "caption": ["a few words to read " * 5] * rows,
        "positive_id": torch.arange(rows),
        "sample_id": torch.arange(rows),
    }


def resident() -> float:
    """Memory that is held now, in MB."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 2**20


def peak() -> float:
    """Highest resident memory since the peak was last cleared, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def measure(batch_size: int, chunk_size: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Every case so many times, interleaved."""
    # Large blocks go back to the system at once, so that resident memory is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(repeats):
        for case in CASES:
            command = [sys.executable, "-m", "benchmarks.cached_gradients", "--case", case]
            command += ["--batch", str(batch_size), "--chunk", str(chunk_size)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            found[case].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        sys.stdout.write(json.dumps(step(options.case, options.batch, options.chunk)) + "\n")
        return
    found = measure(options.batch, options.chunk, options.repeats)
    embeddings = 2 * options.batch * 256 * 4 / 2**20
    medians = {
        case: {key: statistics.median(run[key] for run in runs) for key in ("memory", "seconds")}
        for case, runs in found.items()
    }
    table = Table("case", "rows", "peak memory MB", "to one chunk + embeddings", "s", "to at once")
    limit = medians["one chunk"]["memory"] + embeddings
    for case, median in medians.items():
        rows = options.chunk if case == "one chunk" else options.batch
        ratios = f"{median['memory'] / limit:.2f}", f"{median['seconds'] / medians['at once']['seconds']:.2f}"
        table.add_row(case, str(rows), f"{median['memory']:.0f}", ratios[0], f"{median['seconds']:.2f}", ratios[1])
    Console().print(table)


if __name__ == "__main__":
    main()
