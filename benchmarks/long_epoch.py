"""Data for timings: one epoch of as many full batches as wanted, out of a few pictures in memory.

Everything but the reading of pictures is the loader that all data sets have. Reading has a benchmark of its own.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from benchmarks.pacing import Pacer
from datamodules.base import ImageDataModule
from datamodules.loading.dataset import CountedLoader
from datamodules.options import ImageOptions, LoaderOptions
from datamodules.table import SampleTable

CLASSES = ("bag", "bottle", "cap", "cup", "lamp", "plate", "shoe", "sock", "vase", "watch")
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "grey")
PLACES = ("on a table", "in a box", "before a wall", "under a lamp", "on the grass")
_PICTURES = 64


class LongEpoch(ImageDataModule):
    """Noise with a label and a caption, ``steps`` training batches long.

    Args:
        steps: full batches of an epoch.
        image: size of the pictures.
        loader: batch size and workers.
        seed: of the order.

    Attributes:
        pacer: if set, every training batch ticks.
    """

    generated: ClassVar[bool] = True
    pacer: ClassVar[Pacer | None] = None

    def __init__(
        self, steps: int, image: ImageOptions | None = None, loader: LoaderOptions | None = None, seed: int = 0
    ) -> None:
        super().__init__(image, loader=loader, seed=seed)
        self.steps = steps
        size = self.image_options["size"]
        # A generator of its own: the weights that come next must not depend on how large the pictures are.
        noise = np.random.default_rng(0).integers(0, 256, (_PICTURES, 3, size, size), dtype=np.uint8)
        self._pictures = torch.from_numpy(noise)

    def load_table(self) -> SampleTable:
        """Names, labels and captions; nothing is read."""
        import pandas as pd

        numbers = range(self.steps * self.loader_options["batch_size"])
        kinds = [CLASSES[number % len(CLASSES)] for number in numbers]
        captions = [
            f"a photo of a {COLOURS[number % len(COLOURS)]} {kind} {PLACES[number % len(PLACES)]}, number {number % 97}"
            for number, kind in zip(numbers, kinds, strict=True)
        ]
        columns = {"source": [str(number) for number in numbers], "split": "train", "class": kinds, "caption": captions}
        frame = pd.DataFrame({"name": [f"noise_{number}" for number in numbers], **columns})
        return SampleTable.from_frame(frame, ["class"], {"class": CLASSES}, origin="LongEpoch")

    def read_image(self, index: int) -> torch.Tensor:
        """One of a few pictures, uint8 ``(3, size, size)``."""
        return self._pictures[index % _PICTURES]

    def train_dataloader(self) -> CountedLoader:
        """The usual loader, with a tick where the steps are timed."""
        loader = super().train_dataloader()
        if LongEpoch.pacer is not None:
            loader.collate_fn = LongEpoch.pacer.pace(loader.collate_fn)
        return loader
