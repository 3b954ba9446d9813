"""A data set of noise, a model that notes what it is given, and a small trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.base import ImageDataModule
from datamodules.options import AugmentOptions, CheckOptions, ImageOptions, LoaderOptions
from datamodules.table import SampleTable
from vitrail.types import Batch

CLASSES = ["ball", "cup", "hat"]

Seen = list[tuple[int, int, list[int], int]]
"""Epoch, number of the batch, ids of its samples and a sum over its content, for each training batch."""


def frame(n: int = 30, n_val: int = 9, n_test: int = 8) -> pd.DataFrame:
    """n training samples, then validation and test; classes are skewed."""
    total = n + n_val + n_test
    return pd.DataFrame(
        {
            "name": [f"n{i}" for i in range(total)],
            "source": [f"{i}.png" for i in range(total)],
            "split": ["train"] * n + ["val"] * n_val + ["test"] * n_test,
            "group": [f"g{i}" for i in range(total)],
            "class": [CLASSES[min(i % 5, 2)] for i in range(total)],
            "colour": [None if i % 7 == 0 else ("red", "blue")[i % 2] for i in range(total)],
        }
    )


def noise(index: int, height: int = 20, width: int = 24) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Noise(ImageDataModule):
    """Generated images of noise."""

    generated: ClassVar[bool] = True

    def __init__(
        self,
        n: int = 30,
        tags: list[str] | None = None,
        *,
        image: ImageOptions | None = None,
        augment: AugmentOptions | None = None,
        loader: LoaderOptions | None = None,
        checks: CheckOptions | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(image, augment, loader, checks, seed)
        self.n = n
        self.tags = tags

    def load_table(self) -> SampleTable:
        return SampleTable.from_frame(frame(self.n), ["class", "colour"])

    def read_image(self, index: int) -> torch.Tensor:
        return torch.from_numpy(noise(index)).permute(2, 0, 1)


def small(**options: Any) -> Noise:
    loader: LoaderOptions = {"batch_size": 4, **options}  # type: ignore[typeddict-item]
    augment: AugmentOptions = {"preset": "reference", "mixup": 0.4, "cutmix": 1.0}
    return Noise(image={"size": 16}, augment=augment, loader=loader, seed=3)


class Recorder(LightningModule):
    """Learns nothing and notes what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: Seen = []
        self.evaluated: dict[str, list[int]] = {"val": [], "test": [], "predict": []}

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        content = int(batch["image"].long().sum()) + int(batch["mix"]["partner"][0] if "mix" in batch else 0)
        self.seen.append((self.current_epoch, batch_idx, batch["sample_id"].tolist(), content))
        return self.weight * 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluated["val"] += batch["sample_id"].tolist()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluated["test"] += batch["sample_id"].tolist()

    def predict_step(self, batch: Batch, batch_idx: int) -> list[int]:
        return batch["sample_id"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, epochs: int, *callbacks: ModelCheckpoint, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"devices": 1, "use_distributed_sampler": False}
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks) or None,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **{**defaults, **options},
    )


def run(folder: Path, epochs: int, workers: int = 0) -> Seen:
    model = Recorder()
    trainer(folder, epochs).fit(model, datamodule=small(num_workers=workers))
    return model.seen
