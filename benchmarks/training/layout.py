"""Training steps of several architectures with images in channels-last and in channels-first memory layout.

Only the images' layout differs; batch 16 at 96 px, random weights, float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from benchmarks.harness.interleaved import Row, interleave, row

ARCHITECTURES: dict[str, dict[str, int]] = {
    "mobilevit_xxs": {},
    "regnetx_002": {},
    "efficientnet_b0": {},
    "mobilenetv3_small_100": {},
    "resnet18": {},
    "resnet50": {},
    "convnext_atto": {},
    "deit_tiny_patch16_224": {"img_size": 96},
}
LAST, FIRST = "channels last", "channels first"


def contenders(name: str, size: int = 96, batch_size: int = 16) -> dict[str, Callable[[], float]]:
    """A training step in both layouts; each gives steps a second."""
    import timm
    import torch

    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10, **ARCHITECTURES.get(name, {}))
    pixels = torch.randn(batch_size, 3, size, size)

    def step(memory_format: torch.memory_format) -> float:
        images = pixels.to(memory_format=memory_format)
        begin = time.perf_counter()
        network(images).square().mean().backward()
        seconds = time.perf_counter() - begin
        network.zero_grad()
        return 1 / seconds

    return {LAST: partial(step, torch.channels_last), FIRST: partial(step, torch.contiguous_format)}


def run(repeats: int) -> list[Row]:
    """Steps a second in our layout by those in the other, for each architecture."""
    rows = []
    for name in ARCHITECTURES:
        steps = contenders(name)
        for step in steps.values():
            step()
        rows.append(row(f"layout, {name}", LAST, FIRST, interleave(steps, 4 * repeats), "steps/s"))
    return rows
