"""Tiny tasks, data and trainers that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_modules.base import VisionTask
from lightning_modules.classification import ImageClassifier, MultiTaskClassifier
from lightning_modules.encoders.image import InputOptions
from lightning_modules.optim import OptimOptions
from vitrail.types import UNKNOWN, Batch

TASKS = {"class": ["cup", "lamp", "sock", "vase"], "type": ["new", "used"]}
SIZE = 32
BACKBONE = "test_efficientnet"


def tiny_classifier(**changes: Any) -> ImageClassifier:
    arguments: dict[str, Any] = {
        "backbone": BACKBONE,
        "pretrained": False,
        "class_names": TASKS["class"],
        "image_size": SIZE,
    }
    return ImageClassifier(**{**arguments, **changes})


def tiny_multitask(**changes: Any) -> MultiTaskClassifier:
    arguments: dict[str, Any] = {"backbone": BACKBONE, "pretrained": False, "tasks": TASKS, "image_size": SIZE}
    return MultiTaskClassifier(**{**arguments, **changes})


def warm_cosine() -> OptimOptions:
    return {"warmup_epochs": 1.0, "min_lr": 1e-6}


def make_batch(ids: list[int], padding: int = 0) -> Batch:
    """A batch that is a function of the ids; every third sample has no second target."""
    rows = []
    for index in ids:
        generator = torch.Generator().manual_seed(index)
        rows.append(torch.randint(0, 256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8))
    sample_id = torch.tensor(ids)
    batch: Batch = {
        "image": torch.stack(rows),
        "label": sample_id % 4,
        "attributes": {"type": torch.where(sample_id % 3 == 0, UNKNOWN, sample_id % 2)},
        "sample_id": sample_id,
    }
    if padding:
        batch["is_padding"] = torch.arange(len(ids)) >= len(ids) - padding
    return batch


class TinyData(pl.LightningDataModule):
    """Ten training and seven validation samples in batches of four, the last validation row being padding."""

    def __init__(self, image_options: InputOptions | None = None) -> None:
        super().__init__()
        self.image_options: InputOptions = image_options or {
            "size": SIZE,
            "crop_fraction": 1.0,
            "interpolation": "bicubic",
        }

    def _loader(self, batches: list[Batch]) -> DataLoader[Batch]:
        return DataLoader(cast("Any", batches), batch_size=None)

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader([make_batch([0, 1, 2, 3]), make_batch([4, 5, 6, 7]), make_batch([8, 9])])

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader([make_batch([20, 21, 22, 23]), make_batch([24, 25, 26, 20], padding=1)])

    def test_dataloader(self) -> DataLoader[Batch]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.val_dataloader()


def tiny_trainer(root: Path, **changes: Any) -> pl.Trainer:
    arguments: dict[str, Any] = {
        "default_root_dir": root,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(**{**arguments, **changes})


def seeded_multitask(**changes: Any) -> VisionTask:
    """As ``tiny_multitask`` with a warm-up, the same weights every time."""
    pl.seed_everything(3)
    return tiny_multitask(optim_options=warm_cosine(), **changes)
