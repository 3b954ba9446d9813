"""End-to-end training rate on a GPU, images from the cache, as a share of what the model alone can do.

DeiT-Tiny and ViT-B/16 in bf16 on batches of 256. In front of every epoch of a ``fit`` a copy of its model trains on one
batch that stays on the GPU; both rates come from the same run. Where there is no GPU nothing is measured.
"""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from benchmarks.data.growth import write_images
from benchmarks.harness.data import write_experiment
from benchmarks.harness.interleaved import Row, row
from lightning_modules.base import VisionTask
from vitrail.files import write_text_atomically
from vitrail.types import Batch

BACKBONES = {"DeiT-Tiny": "deit_tiny_patch16_224", "ViT-B/16": "vit_base_patch16_224"}
END_TO_END, ALONE, UNIT, PROMISE = "fit from the cache", "model alone", "images/s", "≥ 0.95"


class Rates(Callback):
    """Times the model alone in front of every epoch, and the epoch.

    Args:
        path: JSON file with both rates, images per second of every epoch but the first, which warms up.
        skip: steps of an epoch that do not count.
        alone_steps: steps of the model alone.
    """

    def __init__(self, path: str, skip: int, alone_steps: int = 30) -> None:
        self.path, self.skip, self.alone_steps = path, skip, alone_steps
        self.found: dict[str, list[float]] = {ALONE: [], END_TO_END: []}
        self._batch: Batch | None = None
        self._begin = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Keep a batch; at the first of every later epoch time the model alone."""
        if self._batch is None:
            self._batch = {**batch}
        elif batch_idx == 0:
            self.found[ALONE].append(self._alone(trainer, cast("VisionTask", pl_module)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Time the steps of an epoch whose batches were not prefetched."""
        if trainer.current_epoch == 0:
            return
        if batch_idx + 1 == self.skip:
            _wait(pl_module.device)
            self._begin = time.perf_counter()
        elif batch_idx + 1 == trainer.num_training_batches:
            _wait(pl_module.device)
            images = (batch_idx + 1 - self.skip) * len(batch["image"])
            self.found[END_TO_END].append(images / (time.perf_counter() - self._begin))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rates."""
        write_text_atomically(Path(self.path), json.dumps(self.found))

    def _alone(self, trainer: Trainer, task: VisionTask) -> float:
        """Images per second of a plain loop with a copy of the network, on a batch that is there already."""
        assert self._batch is not None
        network = _copy(task)
        optimizer = network.configure_optimizers()
        image, label = self._batch["image"], self._batch["label"]
        half = torch.autocast(task.device.type, dtype=torch.bfloat16, enabled="bf16" in str(trainer.precision))
        begin = 0.0
        for step in range(-5, self.alone_steps):
            if step == 0:
                _wait(task.device)
                begin = time.perf_counter()
            optimizer.zero_grad()
            with half:
                (logits,) = network(image).values()
                loss = torch.nn.functional.cross_entropy(logits.float(), label)
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            optimizer.step()
        _wait(task.device)
        return self.alone_steps * len(image) / (time.perf_counter() - begin)


def _copy(task: VisionTask) -> VisionTask:
    """The task without its trainer, which cannot be copied."""
    trainer, task._trainer = task._trainer, None
    try:
        return copy.deepcopy(task)
    finally:
        task._trainer = trainer


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fit(
    backbone: str,
    folder: Path,
    epochs: int,
    *,
    batch: int = 256,
    steps: int = 128,
    pixels: int = 224,
    workers: int = min(16, os.cpu_count() or 1),
    **trainer: Any,
) -> dict[str, list[float]]:
    """Train on generated images and return what ``Rates`` has found."""
    from experiments.train.cli import VitrailCLI

    os.environ["VITRAIL_CACHE"] = str(folder / "cache")
    if not (folder / "images").exists():
        write_images(folder / "images" / "train", batch * steps, pixels)
    found = folder / f"{backbone}.json"
    # Batches that may have been prefetched while the model alone was timed do not count.
    watch = {"class_path": f"{__name__}.Rates", "init_args": {"path": str(found), "skip": 2 * workers}}
    data = {
        "root": str(folder / "images"),
        "split": {"val_fraction": 0.0, "test_fraction": 0.0},
        "image": {"size": pixels},
        "augment": {"preset": "none", "random_resized_crop": [0.35, 1.0], "horizontal_flip": 0.5},
        "loader": {"batch_size": batch, "num_workers": workers, "drop_last": True},
    }
    model = {"backbone": backbone, "pretrained": False}
    path = write_experiment(
        folder,
        {"class_path": "datamodules.ImageFolder", "init_args": data},
        {"class_path": "lightning_modules.ImageClassifier", "init_args": model},
        max_epochs=epochs + 1,
        devices=1,
        callbacks=[watch],
        **trainer,
    )
    VitrailCLI(["fit", "--config", str(path)])
    rates: dict[str, list[float]] = json.loads(found.read_text(encoding="utf-8"))
    return rates


def run(repeats: int) -> list[Row]:
    """End-to-end rate by that of the model alone, for both models; rows without numbers where there is no GPU."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, backbone in BACKBONES.items():
            title = f"GPU, {name}, bf16"
            if torch.cuda.is_available():
                rates = fit(backbone, Path(folder), repeats, accelerator="gpu", precision="bf16-mixed")
                rows.append(row(title, END_TO_END, ALONE, rates, UNIT, PROMISE))
            else:
                none = "not measured: this machine has no CUDA device"
                rows.append(Row(title, END_TO_END, ALONE, math.nan, math.nan, math.nan, UNIT, PROMISE, none))
    return rows
