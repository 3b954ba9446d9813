"""A tiny task that embeds images and texts; run as a program it evaluates on two processes.

A program of its own for the same reason as ``two_processes``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from callbacks import RetrievalMetrics
from tests.callbacks.tiny import tiny_trainer
from vitrail.types import Outputs

IMAGES = 23
"""Divides neither by two processes nor by the size of a batch."""
BATCH_SIZE = 3
DIM = 6


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


def caption_counts() -> torch.Tensor:
    """1 to 3 captions an image, int64 ``(IMAGES,)``."""
    return torch.arange(IMAGES) * 7 % 3 + 1


def embeddings() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings of images and texts, which resemble them somewhat, and the image of each text."""
    images, owner = unit(IMAGES, 0), torch.arange(IMAGES).repeat_interleave(caption_counts())
    return images, F.normalize(images[owner] + 1.2 * unit(len(owner), 1), dim=1), owner


class Rows(Dataset[int]):
    """The numbers of the images."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> int:
        return index


class TinyPairs(LightningDataModule):
    """Deals images to the processes unequally: whoever is first gets one more.

    Args:
        padded: let Lightning's sampler deal them, which fills up with images that it has dealt before.
    """

    def __init__(self, padded: bool = False) -> None:
        super().__init__()
        self.padded = padded

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(Rows(), batch_size=BATCH_SIZE)

    def val_dataloader(self) -> DataLoader[int]:
        if self.padded or self.trainer is None:
            return DataLoader(Rows(), batch_size=BATCH_SIZE)
        own = range(self.trainer.global_rank, IMAGES, self.trainer.world_size)
        return DataLoader(Rows(), batch_size=BATCH_SIZE, sampler=own)

    def test_dataloader(self) -> DataLoader[int]:
        return self.val_dataloader()


class TinyDualEncoder(LightningModule):
    """Looks embeddings up; every epoch of training makes them better or worse, as ``noise`` says.

    Args:
        noise: how far the texts stray from their images in each epoch of training.
        keys: which outputs to return; None for all.
        images_alone: how many of the first images have no text.
    """

    def __init__(
        self, noise: tuple[float, ...] = (0.0,), keys: tuple[str, ...] | None = None, images_alone: int = 0
    ) -> None:
        super().__init__()
        self.noise, self.keys, self.images_alone = noise, keys, images_alone
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.weight * 1.0

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> Outputs:
        images, texts, owner = embeddings()
        noise = self.noise[min(self.current_epoch, len(self.noise) - 1)]
        texts = F.normalize(texts + noise * unit(len(texts), 2), dim=1)
        rows = [row for sample in batch.tolist() for row in (owner == sample).nonzero()[:, 0].tolist()]
        rows = [row for row in rows if int(owner[row]) >= self.images_alone]
        outputs: dict[str, Any] = {"sample_id": batch, "logits": {}, "targets": {}, "image_embedding": images[batch]}
        outputs |= {"text_embedding": texts[rows], "text_image": owner[rows]}
        return cast("Outputs", {key: outputs[key] for key in self.keys or outputs})

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> Outputs:
        return self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LogKeeper(Callback):
    """Writes what was logged, of each process."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write("val", trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write("test", trainer)

    def _write(self, split: str, trainer: Trainer) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        text = json.dumps({name: value for name, value in logged.items() if name.startswith(f"{split}/")})
        (Path(trainer.default_root_dir) / f"{split}_{trainer.global_rank}.json").write_text(text, encoding="utf-8")


def evaluate(folder: Path, *, padded: bool = False, **changes: Any) -> None:
    """Validate and test."""
    folder.mkdir(parents=True, exist_ok=True)
    watching = [RetrievalMetrics(), LogKeeper()]
    trainer = tiny_trainer(folder, callbacks=watching, use_distributed_sampler=padded, **changes)
    trainer.validate(TinyDualEncoder(), datamodule=TinyPairs(padded), verbose=False)
    trainer.test(TinyDualEncoder(), datamodule=TinyPairs(padded), verbose=False)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    both: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork"}
    evaluate(folder / "dealt", **both)
    evaluate(folder / "padded", padded=True, **both)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
