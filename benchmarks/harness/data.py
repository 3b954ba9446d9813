"""Data for timings: folders of photo-like images, one long epoch out of a few images in memory, experiment files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks.harness.processes import Pacer
from datamodules.base import ImageDataModule
from datamodules.loading.dataset import CountedLoader
from datamodules.options import ImageOptions, LoaderOptions
from datamodules.table import SampleTable
from vitrail.types import DEFAULT_SEED

CLASSES = 8


def write_photos(root: Path, number: int, size: int) -> Path:
    """Write ``train/<class>/<number>.jpg`` with a long side of ``size`` pixels: blurred noise with grain, like photos.

    Returns:
        The folder.
    """
    draw = np.random.default_rng(0)
    short = size * 3 // 4
    for index in range(number):
        coarse = Image.fromarray(draw.integers(0, 256, (short // 16, size // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((size, short), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = draw.normal(0, 6, (short, size, 1)).astype(np.float32)
        image = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
        path = root / "train" / f"class_{index % CLASSES}" / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    return root


def linked_products(root: Path) -> Path | None:
    """The product photos (about 128 px) where ``$VITRAIL_DATA`` has them, as a folder of links; else None."""
    images = Path(os.environ.get("VITRAIL_DATA", "data")) / "products" / "images"
    if not images.is_dir():
        return None
    for index, image in enumerate(sorted(images.glob("*.jpg"))):
        link = root / "train" / f"class_{index % CLASSES}" / image.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image.resolve())
    return root


def write_experiment(
    folder: Path, data: dict[str, Any], model: dict[str, Any], seed: int = DEFAULT_SEED, **trainer: Any
) -> Path:
    """Write an experiment of one epoch on the CPU without validation, whose runs are put into the same folder."""
    options = {"max_epochs": 1, "accelerator": "cpu", "limit_val_batches": 0, "enable_model_summary": False, **trainer}
    experiment = {
        "seed_everything": seed,
        "name": "benchmark",
        "runs": str(folder / "runs"),
        "data": data,
        "model": model,
        "trainer": options,
        "wandb": {"mode": "disabled"},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment), encoding="utf-8")
    return path


LONG_CLASSES = ("bag", "bottle", "cap", "cup", "lamp", "plate", "shoe", "sock", "vase", "watch")
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "grey")
PLACES = ("on a table", "in a box", "before a wall", "under a lamp", "on the grass")
_IMAGES = 64


class LongEpoch(ImageDataModule):
    """Noise with a label and a caption, ``steps`` training batches long.

    Everything but the reading of images is the loader that all data sets have; reading has a benchmark of its own.

    Args:
        steps: full batches of an epoch.
        image: size of the images.
        loader: batch size and workers.
        seed: of the order.

    Attributes:
        pacer: if set, every training batch ticks.
    """

    generated: ClassVar[bool] = True
    pacer: ClassVar[Pacer | None] = None

    def __init__(
        self, steps: int, image: ImageOptions = ImageOptions(), loader: LoaderOptions = LoaderOptions(), seed: int = 0
    ) -> None:
        super().__init__(image, loader=loader, seed=seed)
        self.steps = steps
        size = self.image_options["size"]
        # A generator of its own: the weights that come next must not depend on how large the images are.
        noise = np.random.default_rng(0).integers(0, 256, (_IMAGES, 3, size, size), dtype=np.uint8)
        self._images = torch.from_numpy(noise)

    def load_table(self) -> SampleTable:
        """Names, labels and captions; nothing is read."""
        import pandas as pd

        numbers = range(self.steps * self.loader_options.batch_size)
        kinds = [LONG_CLASSES[number % len(LONG_CLASSES)] for number in numbers]
        captions = [
            f"a photo of a {COLOURS[number % len(COLOURS)]} {kind} {PLACES[number % len(PLACES)]}, number {number % 97}"
            for number, kind in zip(numbers, kinds, strict=True)
        ]
        columns = {"source": [str(number) for number in numbers], "split": "train", "class": kinds, "caption": captions}
        frame = pd.DataFrame({"name": [f"noise_{number}" for number in numbers], **columns})
        return SampleTable.from_frame(frame, ["class"], {"class": LONG_CLASSES}, origin="LongEpoch")

    def read_image(self, index: int) -> torch.Tensor:
        """One of a few images, uint8 ``(3, size, size)``."""
        return self._images[index % _IMAGES]

    def train_dataloader(self) -> CountedLoader:
        """The usual loader, with a tick where the steps are timed."""
        loader = super().train_dataloader()
        if LongEpoch.pacer is not None:
            loader.collate_fn = LongEpoch.pacer.pace(loader.collate_fn)
        return loader
