"""Eight epochs of heads on a frozen backbone: features computed once, compared with the whole network each time.

RegNetX-200MF on generated photos of its own 224 px, training and validation, without augmentation. Both sides read
decoded images from the cache.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.harness.data import write_photos
from benchmarks.harness.interleaved import Row, interleave, row
from callbacks import FrozenFeatures
from callbacks.finetuning import Mode
from datamodules import ImageFolder
from datamodules.options import CheckOptions, ImageOptions
from datamodules.splits import SplitOptions
from lightning_modules import ImageClassifier

EPOCHS = 8
ONCE, NAIVE = "features once", "whole network"
MODES: dict[str, Mode] = {NAIVE: "never", ONCE: "auto"}


class Frozen(Callback):
    """Freezes the backbone for the whole training, and takes the time."""

    seconds = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze the backbone."""
        assert isinstance(pl_module, ImageClassifier)
        pl_module.freeze_backbone()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; this is the first callback, so what others do now counts."""
        self.seconds = -time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter()


def seconds(folder: Path, mode: Mode, *, backbone: str, size: int, epochs: int = EPOCHS) -> float:
    """Of a training of the head, without building network and loaders."""
    data = ImageFolder(
        str(folder),
        split=SplitOptions(by="table", val_fraction=0.2, test_fraction=0.0),
        image=ImageOptions(size=size),
        checks=CheckOptions(allow_leaks=["exact", "near", "groups"]),
    )
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[frozen := Frozen(), FrozenFeatures(mode)],
    )
    data.prepare_data()
    trainer.fit(ImageClassifier(backbone, data.class_names, pretrained=False, image_size=size), datamodule=data)
    return frozen.seconds


def run(repeats: int, number: int = 400, backbone: str = "regnetx_002", size: int = 224) -> list[Row]:
    """Seconds through the whole network by those with features computed once."""
    with tempfile.TemporaryDirectory() as name:
        os.environ["VITRAIL_CACHE"] = str(Path(name) / "cache")
        folder = write_photos(Path(name) / "photos", number, 320)
        cases = {
            contender: partial(seconds, folder, mode, backbone=backbone, size=size) for contender, mode in MODES.items()
        }
        found = interleave(cases, repeats)
    # How many times as fast, so the slow side is the numerator.
    return [row(f"{EPOCHS} epochs of heads, time", NAIVE, ONCE, found, "s", "≥ 6")]
