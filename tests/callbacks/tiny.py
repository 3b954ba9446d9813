"""Tiny data, tasks and trainers that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from lightning.pytorch import Trainer
from torch import nn

from datamodules.base import ImageDataModule
from datamodules.table import SampleTable
from lightning_modules.classification import ImageClassifier, MultiTaskClassifier

TASKS = {"class": ["bag", "cap", "mug"], "colour": ["blue", "red"]}
SPLIT_SIZES = {"train": 24, "val": 10, "test": 13}
SIZE = 32


class MadePhotos(ImageDataModule):
    """24 training, 10 validation and 13 test images of objects in three views; some colours are unknown."""

    generated: ClassVar[bool] = True

    def __init__(self, batch_size: int = 4, seed: int = 0) -> None:
        super().__init__(image={"size": SIZE}, loader={"batch_size": batch_size}, seed=seed)

    def prepare_data(self) -> None:
        """There are no files to verify."""

    def load_table(self) -> SampleTable:
        splits = [split for split, size in SPLIT_SIZES.items() for _ in range(size)]
        rows = range(len(splits))
        frame = pd.DataFrame(
            {
                "name": [f"photo {row}" for row in rows],
                "source": [str(row) for row in rows],
                "split": splits,
                "group": [f"object {row // 3}" for row in rows],
                "class": [TASKS["class"][row * 7 % 3] for row in rows],
                "colour": [None if row % 5 == 4 else TASKS["colour"][row % 2] for row in rows],
            }
        )
        return SampleTable.from_frame(frame, ["class", "colour"], origin="made")

    def read_image(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


def tiny_task() -> MultiTaskClassifier:
    """Has BatchNorm and dropout in the backbone, and dropout in the heads; the same weights every time."""
    torch.manual_seed(0)
    task = MultiTaskClassifier("test_efficientnet", TASKS, pretrained=False, image_size=SIZE, weight_decay=0.1)
    backbone = task.encoder.backbone
    assert isinstance(backbone.global_pool, nn.Module)
    backbone.global_pool = nn.Sequential(backbone.global_pool, nn.Dropout(0.2))
    return task


def tiny_classifier() -> ImageClassifier:
    """Has BatchNorm but no dropout; the same weights every time."""
    torch.manual_seed(0)
    return ImageClassifier("test_efficientnet", TASKS["class"], pretrained=False, image_size=SIZE)


def tiny_trainer(root: Path, **changes: Any) -> Trainer:
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
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**arguments, **changes})
