"""Start-up of ``fit`` up to its first training step, and memory, with 1,000, 10,000 and 100,000 images.

Folders of 32-px JPEGs in ten classes, hard links to ten files. The first ``fit`` of a folder reads every image once
and fills the cache; that is measured once. Every later one finds what the first has found; those are repeated, the
sizes in turn, and go through a whole epoch with two workers, whose own memory is measured when it ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from benchmarks.harness.data import write_experiment
from benchmarks.harness.interleaved import Row, interleave, pick, row
from benchmarks.harness.processes import children, own_memory, peak_memory
from vitrail.files import write_text_atomically

CLASSES, PIXELS, WORKERS = 10, 32, 2


class Watch(Callback):
    """Notes when the first step was done, and what memory is in use at the end of the epoch.

    Args:
        path: JSON file with ``first_step`` (seconds since 1970), ``peak`` (highest resident memory of this process in
            MB) and ``worker`` (the largest memory that one loader process has for itself, in MB).
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._first_step = 0.0
        self._worker = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time, and the workers, which are gone when the training has ended."""
        self._first_step = self._first_step or time.time()
        if batch_idx + 1 == trainer.num_training_batches:
            self._worker = max((own_memory(process) for process in children(os.getpid())), default=0.0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was found."""
        found = {"first_step": self._first_step, "peak": peak_memory(), "worker": self._worker}
        write_text_atomically(Path(self.path), json.dumps(found))


def write_images(folder: Path, images: int, pixels: int = PIXELS) -> None:
    """Write square JPEGs into ten class folders, all of a class the same file."""
    import numpy as np
    from PIL import Image

    for code in range(CLASSES):
        own = folder / f"class_{code}"
        own.mkdir(parents=True)
        colours = np.random.default_rng(code).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        first = own / "000000.jpg"
        Image.fromarray(colours).resize((pixels, pixels), Image.Resampling.BICUBIC).save(first)
        for number in range(1, len(range(code, images, CLASSES))):
            (own / f"{number:06d}.jpg").hardlink_to(first)


def start(folder: Path, *, epoch: bool) -> dict[str, float]:
    """Run ``fit`` in a process of its own.

    Args:
        folder: with ``images``; everything that the run writes is put there.
        epoch: whether it goes on to the end of an epoch; else it ends after the first step.

    Returns:
        ``seconds`` from the start of the process to the end of the first step, ``peak`` and ``worker`` in MB.

    Raises:
        RuntimeError: if the run fails, with the last lines that it printed.
    """
    found = folder / "found.json"
    found.unlink(missing_ok=True)
    environment = {**os.environ, "VITRAIL_CACHE": str(folder / "cache"), "WANDB_MODE": "disabled"}
    command = [sys.executable, "-m", "experiments", "fit", "--config", str(experiment(folder, found, epoch=epoch))]
    begin = time.time()
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"fit ended with {done.returncode}:\n{done.stderr[-2000:]}")
    numbers: dict[str, float] = json.loads(found.read_text(encoding="utf-8"))
    return {"seconds": numbers["first_step"] - begin, "peak": numbers["peak"], "worker": numbers["worker"]}


def experiment(folder: Path, found: Path, *, epoch: bool, batch_size: int = 256) -> Path:
    """Write the experiment that is started."""
    data = {
        "root": str(folder / "images"),
        "split": {"by": "stratified", "val_fraction": 0.1, "test_fraction": 0.1},
        "image": {"size": PIXELS},
        "loader": {"batch_size": batch_size, "num_workers": WORKERS},
        # All images of a class are one file.
        "checks": {"allow_leaks": ["exact", "near"]},
    }
    return write_experiment(
        folder,
        {"class_path": "datamodules.ImageFolder", "init_args": data},
        {
            "class_path": "lightning_modules.ImageClassifier",
            "init_args": {"backbone": "test_resnet", "pretrained": False},
        },
        limit_train_batches=1.0 if epoch else 1,
        enable_progress_bar=False,
        callbacks=[{"class_path": f"{__name__}.Watch", "init_args": {"path": str(found)}}],
    )


def run(repeats: int, sizes: Sequence[int] = (1_000, 10_000, 100_000)) -> list[Row]:
    """Time and memory of the larger folders by those of the smallest, which is the first."""
    with tempfile.TemporaryDirectory() as name:
        folders = {f"{size:,} images": Path(name) / str(size) for size in sizes}
        for size, folder in zip(sizes, folders.values(), strict=True):
            write_images(folder / "images", size)
        first = {size: [start(folder, epoch=False)] for size, folder in folders.items()}
        later = interleave({size: partial(start, folder, epoch=True) for size, folder in folders.items()}, repeats)
    smallest, *others = folders
    rows: list[Row] = []
    for benchmark, key, unit, promise, found in (
        ("start of fit, first time", "seconds", "s to the first step", "", first),
        ("start of fit, later", "seconds", "s to the first step", "", later),
        ("fit, peak memory", "peak", "MB", "", later),
        ("own memory of a loader process", "worker", "MB", "≤ 1.1", later),
    ):
        rows += [row(benchmark, size, smallest, pick(found, key), unit, promise) for size in others]
    return rows
