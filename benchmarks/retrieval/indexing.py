"""Filling a gallery compared with the model's own forward pass, in images a second.

Photos of 500 px that have been decoded before, at 224 px, networks with random weights. The forward pass has all of its
batches in memory. Filling reads them from the cache, runs the model, and makes vectors, predictions, facts and files of
the gallery out of them, with everything that ``python -m retrieval index`` does after it has loaded model and data.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.data import write_photos
from benchmarks.harness.interleaved import Row, interleave, row
from datamodules.options import CheckOptions, ImageOptions, LoaderOptions
from datamodules.splits import SplitOptions

BACKBONES = {"DeiT-Tiny": "deit_tiny_patch16_224", "RegNetX-200MF": "regnetx_002"}
FILLING, FORWARD = "filling a gallery", "forward pass"


def data_of(folder: Path, size: int, batch: int) -> Any:
    """A folder of images, decoded once."""
    from datamodules import ImageFolder

    data = ImageFolder(
        str(folder),
        split=SplitOptions(by="table", val_fraction=0.0, test_fraction=0.0),
        image=ImageOptions(size=size),
        loader=LoaderOptions(batch_size=batch, num_workers=0, cache="always"),
        checks=CheckOptions(allow_leaks=["exact", "near", "groups"]),
    )
    data.prepare_data()
    data.setup("predict")
    return data


class Contest:
    """One network with random weights and its data; both sides may be run again and again."""

    def __init__(self, backbone: str, data: Any, folder: Path) -> None:
        from lightning_modules import ImageClassifier
        from retrieval.schema import identity_of

        torch.manual_seed(0)
        size = data.image_options["size"]
        self.task = ImageClassifier(backbone, data.tasks["class"], image_size=size, pretrained=False).eval()
        self.data, self.folder = data, folder
        self.identity = identity_of(self.task, "", self.data.image_options, data.tasks, data.task_kinds)
        self.count = len(data.rows_of(["train"]))
        self.images = [batch["image"].clone() for batch in data.rows_dataloader(data.rows_of(["train"]))]

    def forward(self) -> float:
        """Images a second of the model alone."""
        begin = time.perf_counter()
        with torch.inference_mode():
            for images in self.images:
                self.task(images)
        return self.count / (time.perf_counter() - begin)

    def fill(self) -> float:
        """Images a second of filling a new gallery.

        Raises:
            RuntimeError: if the gallery does not hold all of them.
        """
        from retrieval.fill import fill
        from retrieval.gallery import Gallery

        uri = self.folder / "gallery"
        begin = time.perf_counter()
        gallery = Gallery.create(str(uri), self.identity)
        report = fill(self.task, self.data, gallery, splits=["train"])
        seconds = time.perf_counter() - begin
        if report.added != self.count:
            raise RuntimeError(f"{self.count} images were to be added: {report}")
        shutil.rmtree(uri)
        return self.count / seconds


def run(
    repeats: int,
    backbones: Mapping[str, str] = BACKBONES,
    images: int = 2048,
    size: int = 224,
    photo: int = 500,
    batch: int = 32,
) -> list[Row]:
    """Images a second of filling by those of the forward pass, for each network."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["VITRAIL_CACHE"] = str(folder / "cache")
        data = data_of(write_photos(folder / "images", images, photo), size, batch)
        for label, backbone in backbones.items():
            contest = Contest(backbone, data, folder)
            contest.fill()  # imports LanceDB
            rates = interleave({FILLING: contest.fill, FORWARD: contest.forward}, repeats)
            title = f"indexing {images:,} photos at {size} px, {label}"
            rows.append(row(title, FILLING, FORWARD, rates, "images/s", "≥ 0.95"))
    return rows
