"""Memory and time of large contrastive batches with cached gradients, of one chunk, and of everything at once.

Each case runs one training step in a process of its own, which reports its highest resident memory over what it held
before. With cached gradients a step should need the memory of one chunk and of the embeddings, whatever the batch; the
price is a second forward pass.
"""

from __future__ import annotations

import resource
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.interleaved import Row, interleave, pick, row
from benchmarks.harness.processes import in_new_process, peak_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vitrail.types import Batch

CHUNK, CACHED, AT_ONCE = "one chunk", "cached gradients", "everything at once"
LEAST = "one chunk and the embeddings"
VERY_LARGE, SMALL_TEXT = 4096, "google/bert_uncased_L-2_H-128_A-2"
IMAGE_SIZE = 64


def step(case: str, batch_size: int, chunk_size: int, text: str = "distilbert-base-uncased") -> dict[str, float]:
    """One training step of a ResNet18 with a text tower.

    Returns:
        Highest memory over the start in MB, and seconds.
    """
    import torch

    from lightning_modules.dual_encoder import DualEncoder
    from lightning_modules.options import TowerOptions

    task = DualEncoder(
        TowerOptions(image="resnet18", image_pretrained=False, text=text, text_pretrained=False),
        image_size=IMAGE_SIZE,
        chunk_size=chunk_size if case == CACHED else 0,
    )
    task.towers.tokenizer = task.towers.train_tokenizer(["a few words to read"])

    def train(batch: Batch) -> None:
        loss, _ = task._shared_step(batch, "train")
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own

    # A first step, so that gradients and the libraries' own buffers do not count.
    train(pairs(2))
    batch = pairs(chunk_size if case == CHUNK else batch_size)
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 2**20
    start = time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    train(batch)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in task.parameters())
    return {"memory": peak_memory() - held, "seconds": time.perf_counter() - start}


def pairs(rows: int) -> Batch:
    """Random images, each with the same caption of 25 words."""
    import torch

    return {
        "image": torch.randint(0, 256, (rows, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8),
        "caption": ["a few words to read " * 5] * rows,
        "positive_id": torch.arange(rows),
        "sample_id": torch.arange(rows),
    }


def run(repeats: int, batch_size: int = 256, chunk_size: int = 32) -> list[Row]:
    """Memory and seconds of cached gradients by those of the other ways.

    The very large batch, whose logits alone would take as much memory as many chunks, has a small text tower, so that
    it takes minutes; everything at once would not fit into memory.
    """
    found = _measured(repeats, (CHUNK, CACHED, AT_ONCE), batch_size, chunk_size)
    memory = pick(found, "memory")
    benchmark = f"contrastive step of {batch_size} pairs"
    large = pick(_measured(1, (CHUNK, CACHED), VERY_LARGE, chunk_size, SMALL_TEXT), "memory")
    memory[LEAST], large[LEAST] = (
        [one + 2 * rows * 256 * 4 / 2**20 for one in values[CHUNK]]
        for rows, values in ((batch_size, memory), (VERY_LARGE, large))
    )
    return [
        row(benchmark, CACHED, LEAST, memory, "MB", "≤ 1.3"),
        row(f"contrastive step of {VERY_LARGE} pairs", CACHED, LEAST, large, "MB", "≤ 1.3"),
        row(benchmark, CACHED, AT_ONCE, memory, "MB", "< 1"),
        row(benchmark, CACHED, AT_ONCE, pick(found, "seconds"), "s"),
    ]


def _measured(repeats: int, cases: Sequence[str], *sizes: object) -> dict[str, list[dict[str, float]]]:
    # Large blocks go back to the system at once, so that resident memory is what is in use.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    steps = {case: partial(in_new_process, f"{__name__}:step", case, *sizes, environment=environment) for case in cases}
    return interleave(steps, repeats)
