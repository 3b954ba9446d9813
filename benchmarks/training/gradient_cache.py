"""Memory and time of large contrastive batches with cached gradients, beside one chunk and beside everything at once.

    python -m benchmarks.training.gradient_cache [--batch 256] [--chunk 32] [--repeats 3]

Each case runs one training step in a process of its own, which reports its highest resident memory over what it held
before. With cached gradients a step should need the memory of one chunk and of the embeddings, whatever the batch; the
price is a second forward pass. The cases are run in turn, so that a noisy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.interleaved import Row, in_new_process, interleave, peak_memory, row, say

if TYPE_CHECKING:
    from lightning_modules.dual_encoder import DualEncoder
    from vitrail.types import Batch

CASES = ("one chunk", "cached gradients", "everything at once")
IMAGE_SIZE = 64


def step(case: str, batch_size: int, chunk_size: int) -> dict[str, float]:
    """One training step of a ResNet18 with DistilBERT.

    Returns:
        Highest memory over the start in MB, and seconds.
    """
    import torch

    from lightning_modules.dual_encoder import DualEncoder
    from lightning_modules.options import TowerOptions

    task = DualEncoder(
        TowerOptions(image="resnet18", image_pretrained=False, text="distilbert-base-uncased", text_pretrained=False),
        image_size=IMAGE_SIZE,
        chunk_size=chunk_size if case == CASES[1] else 0,
    )
    task.towers.tokenizer = task.towers.train_tokenizer(["a few words to read"])
    # A first step, so that gradients and the libraries' own buffers do not count.
    _train(task, pairs(2))
    batch = pairs(chunk_size if case == CASES[0] else batch_size)
    before, start = resident(), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    _train(task, batch)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in task.parameters())
    return {"memory": peak_memory() - before, "seconds": time.perf_counter() - start}


def _train(task: DualEncoder, batch: Batch) -> None:
    loss, _ = task._shared_step(batch, "train")
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own


def pairs(rows: int) -> Batch:
    """Random images, each with the same caption of 25 words."""
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


def measure(batch_size: int, chunk_size: int, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Every case so many times, interleaved."""
    # Large blocks go back to the system at once, so that resident memory is what is in use.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    sizes = ["--batch", str(batch_size), "--chunk", str(chunk_size)]
    cases = {
        case: partial(in_new_process, "benchmarks.training.gradient_cache", ["--case", case, *sizes], environment)
        for case in CASES
    }
    return interleave(cases, repeats)


def rows_of(found: Mapping[str, list[dict[str, float]]], batch_size: int) -> list[Row]:
    """Memory of cached gradients beside that of one chunk and all embeddings, and everything beside all at once."""
    chunk, cached, at_once = CASES
    benchmark = f"contrastive step of {batch_size} pairs"
    memory = {case: [one["memory"] for one in several] for case, several in found.items()}
    seconds = {case: [one["seconds"] for one in several] for case, several in found.items()}
    embeddings = 2 * batch_size * 256 * 4 / 2**20
    least = {cached: memory[cached], "one chunk and the embeddings": [one + embeddings for one in memory[chunk]]}
    return [
        row(benchmark, cached, "one chunk and the embeddings", least, "MB"),
        row(benchmark, cached, at_once, memory, "MB", "< 1"),
        row(benchmark, cached, at_once, seconds, "s"),
    ]


def run(repeats: int, batch_size: int = 256, chunk_size: int = 32) -> list[Row]:
    """Memory and seconds of cached gradients by those of the other ways."""
    return rows_of(measure(batch_size, chunk_size, repeats), batch_size)


def main() -> None:
    """Print the ratios, or be one of the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        sys.stdout.write(json.dumps(step(options.case, options.batch, options.chunk)) + "\n")
    else:
        say(run(options.repeats, options.batch, options.chunk))


if __name__ == "__main__":
    main()
