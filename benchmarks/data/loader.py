"""Training images a second from the second epoch on, compared with torchvision's ``ImageFolder``.

Both sides crop at random (bicubic, antialiased) and flip: photos with a long side of 500 px to 224 px, and photos of
about 128 px to 112 px, the product photos where they are at hand, generated ones elsewhere. torchvision's transforms
run on Pillow images as its documentation has it, and on tensors, which is faster. Both sides have the same number of
worker processes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.data import linked_products, write_photos
from benchmarks.harness.interleaved import Row, interleave, row
from datamodules.options import AugmentOptions, CheckOptions, ImageOptions, LoaderOptions
from datamodules.splits import SplitOptions

BATCH_SIZE = 32
SCALE = (0.8, 1.0)
OURS = "Vitrail, decoded once"
ON_TENSORS, ON_PILLOW = "torchvision, on tensors", "torchvision, on Pillow"


def ours(folder: Path, size: int, workers: int) -> Iterable[Any]:
    """Our training batches of a folder of images."""
    from datamodules import ImageFolder

    data = ImageFolder(
        str(folder),
        split=SplitOptions(by="table", val_fraction=0.0, test_fraction=0.0),
        image=ImageOptions(size=size),
        augment=AugmentOptions(random_resized_crop=list(SCALE), horizontal_flip=0.5),
        loader=LoaderOptions(batch_size=BATCH_SIZE, num_workers=workers, cache="always"),
        # Photos of one product resemble each other.
        checks=CheckOptions(allow_leaks=["exact", "near", "groups"]),
    )
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader()


def theirs(folder: Path, size: int, workers: int, *, on_tensors: bool) -> Iterable[Any]:
    """Torchvision's batches of the same folder."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import v2 as T

    crop = T.RandomResizedCrop(size, SCALE, interpolation=InterpolationMode.BICUBIC, antialias=True)
    steps = [crop, T.RandomHorizontalFlip()]
    transform = T.Compose([T.PILToTensor(), *steps] if on_tensors else [*steps, T.PILToTensor()])
    dataset = ImageFolder(str(folder / "train"), transform)
    return DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def images_per_second(loader: Iterable[Any]) -> float:
    """Of one epoch."""
    images, begin = 0, time.perf_counter()
    for batch in loader:
        images += len(batch["image"] if isinstance(batch, dict) else batch[0])
    return images / (time.perf_counter() - begin)


def measure(folder: Path, size: int, workers: int, rounds: int) -> dict[str, list[float]]:
    """Images a second of each contender in each round, after an epoch that does not count."""
    loaders = {
        OURS: ours(folder, size, workers),
        ON_TENSORS: theirs(folder, size, workers, on_tensors=True),
        ON_PILLOW: theirs(folder, size, workers, on_tensors=False),
    }
    for loader in loaders.values():
        images_per_second(loader)
    contenders: dict[str, Callable[[], float]] = {
        name: partial(images_per_second, loader) for name, loader in loaders.items()
    }
    return interleave(contenders, rounds)


def run(repeats: int, number: int = 1024) -> list[Row]:
    """Images a second of ours by torchvision's, for large and small photos, with and without worker processes."""
    import torch

    rows = []
    before = torch.get_num_threads()
    # Workers have one thread each; without workers, one thread for both.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        os.environ["VITRAIL_CACHE"] = str(Path(name) / "cache")
        large = write_photos(Path(name) / "large", number, 500)
        small = linked_products(Path(name) / "products") or write_photos(Path(name) / "small", number, 170)
        for what, folder, size, promise in (("500-px JPEGs", large, 224, "≥ 5"), ("128-px JPEGs", small, 112, "≥ 2")):
            for workers in (0, 2):
                values = measure(folder, size, workers, repeats)
                title = f"loader, {what}, {workers} workers"
                rows += [row(title, OURS, peer, values, "images/s", promise) for peer in (ON_TENSORS, ON_PILLOW)]
    torch.set_num_threads(before)
    return rows
