"""What the first start reads: CPU time of verification, compared with only decoding every image once.

Real photos where they are at hand (``$VITRAIL_DATA``; about 100 px a side), others scaled to a long side of 500 px, and
generated ones elsewhere. The peer decodes the same files by the same reader and does nothing else. The cache of decoded
images is filled in the same pass where it is wanted; its peer decodes once more.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from benchmarks.harness.data import CLASSES, linked_products, write_photos
from benchmarks.harness.interleaved import Row, interleave, row
from datamodules.image_folder import ImageFolder
from datamodules.options import CheckOptions, ImageOptions, LoaderOptions

DECODING, VERIFYING = "decoding alone", "verification"
HEADERS = "verification, headers only"
ONE_PASS, TWO_PASSES = "verification fills the cache", "verification, then the cache"


def enlarged(root: Path, side: int = 500, number: int = 1000) -> Path | None:
    """Write some of the real photos with a long side of ``side`` pixels; None where there are none."""
    folders = Path(os.environ.get("VITRAIL_DATA", "data"))
    photos = sorted(folders.glob("flickr8k/**/*.jpg"))[:number]
    for index, path in enumerate(photos):
        image = Image.open(path).convert("RGB")
        scale = side / max(image.size)
        target = root / "train" / f"class_{index % CLASSES}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        size = (round(image.width * scale), round(image.height * scale))
        image.resize(size, Image.Resampling.BICUBIC).save(target, quality=92)
    return root if photos else None


def data(folder: Path, *, verify: str = "full", cached: bool = False) -> ImageFolder:
    """A folder of images; photos of one product may resemble each other."""
    return ImageFolder(
        str(folder),
        image=ImageOptions(size=224),
        loader=LoaderOptions(cache="always" if cached else "never"),
        checks=CheckOptions(allow_leaks=["exact", "near", "groups"], verify=verify),  # type: ignore[arg-type]
    )


def decode(folder: Path) -> None:
    """Decode every image once, one after the other."""
    found = data(folder)
    for index in range(len(found.table)):
        found.read_image(index)


def verify(folder: Path, mode: str) -> None:
    """Verify without what an earlier run has found."""
    data(folder, verify=mode).verification()


def fill(folder: Path, *, one_pass: bool) -> None:
    """Verify, and have all training and validation images in the cache."""
    found = data(folder, cached=True)
    found.verify(("train", "val") if one_pass else ())
    for split in ("train", "val"):
        found.dataset(split, augmented=split == "train")


def cpu_seconds(work: Callable[[], None]) -> float:
    """Seconds of all threads and child processes, with an empty cache folder."""
    shutil.rmtree(os.environ["VITRAIL_CACHE"], ignore_errors=True)
    begin = sum(os.times()[:4])
    work()
    return sum(os.times()[:4]) - begin


def run(repeats: int, number: int = 1024) -> list[Row]:
    """CPU time of verification by that of decoding, and of one pass by that of two."""
    import torch

    rows = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        os.environ["VITRAIL_CACHE"] = str(Path(name) / "cache")
        small = linked_products(Path(name) / "products") or write_photos(Path(name) / "small", number, 128)
        large = enlarged(Path(name) / "enlarged") or write_photos(Path(name) / "large", number, 500)
        for what, folder, promise in (("500-px JPEGs", large, "≤ 1.15"), ("128-px JPEGs", small, "")):
            contenders = {
                DECODING: partial(decode, folder),
                VERIFYING: partial(verify, folder, "full"),
                HEADERS: partial(verify, folder, "headers"),
                ONE_PASS: partial(fill, folder, one_pass=True),
                TWO_PASSES: partial(fill, folder, one_pass=False),
            }
            found = interleave({key: partial(cpu_seconds, work) for key, work in contenders.items()}, repeats)
            title, unit = f"first start, {what}", "CPU s"
            rows += [row(title, VERIFYING, DECODING, found, unit, promise), row(title, HEADERS, DECODING, found, unit)]
            rows.append(row(title, ONE_PASS, TWO_PASSES, found, unit, "≤ 1"))
    torch.set_num_threads(before)
    return rows
