"""Decoders of JPEG files, whole and at the size that a network takes, and augmentation: CPU time by that of a peer.

Real photos with a long side of 500 px where they are at hand (``$VITRAIL_DATA``), generated ones elsewhere. Decoders
get the bytes of the files and return uint8 RGB; ``read_image`` also reads the header, follows orientation tags and
refuses damaged files. At half the size libjpeg skips work (a smaller inverse DCT), and its pixels are others than those
of the whole image scaled down. On a GPU nvJPEG decodes a batch, by wall time.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image

from benchmarks.data.first_start import enlarged
from benchmarks.harness.data import write_photos
from benchmarks.harness.interleaved import Row, interleave, row
from datamodules.loading.decode import read_image
from datamodules.loading.transforms import scale_down, train_transform
from datamodules.options import AugmentOptions, ImageOptions, Preset
from vitrail.runtime import keep_freed_memory
from vitrail.seeding import seeded_rng

OURS, SIMPLEJPEG, PILLOW, TORCHVISION = "read_image", "simplejpeg", "Pillow", "torchvision decode_jpeg"
HALF, HALF_PILLOW, NVJPEG = "simplejpeg, half the size", "Pillow, draft at half the size", "torchvision on the GPU"
SIZE = 224


def pillow(content: bytes, *, half: bool = False) -> None:
    """Decode with Pillow."""
    with Image.open(io.BytesIO(content)) as image:
        if half:
            image.draft("RGB", (image.width // 2, image.height // 2))
        np.asarray(image.convert("RGB"))


def torchvision(content: bytes) -> None:
    """Decode with torchvision."""
    import torchvision.io

    torchvision.io.decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))


def half(content: bytes) -> None:
    """Decode at half the size."""
    height, width, *_ = simplejpeg.decode_jpeg_header(content)
    simplejpeg.decode_jpeg(content, "RGB", min_height=-(-height // 2), min_width=-(-width // 2), min_factor=2)


def on_gpu(contents: Sequence[bytes]) -> None:
    """Decode all on the GPU."""
    import torchvision.io

    torchvision.io.decode_jpeg(
        [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents], device="cuda"
    )
    torch.cuda.synchronize()


def augment(images: Sequence[torch.Tensor], preset: Preset) -> None:
    """Augment each image as in a first epoch."""
    transform = train_transform(ImageOptions(size=SIZE).resolved(), AugmentOptions(preset=preset))
    for number, image in enumerate(images):
        with seeded_rng("benchmark", number):
            transform(image)


def per_second(work: Callable[[], None], count: int, clock: Callable[[], float] = time.process_time) -> float:
    """Images a second."""
    begin = clock()
    work()
    return count / (clock() - begin)


def run(repeats: int, number: int = 256) -> list[Row]:
    """Images a CPU second of each decoder by Pillow's, and of the presets by that of ``light``."""
    keep_freed_memory()  # as the command line does
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = enlarged(Path(name) / "enlarged", number=number) or write_photos(Path(name) / "photos", number, 500)
        contents = [path.read_bytes() for path in sorted(folder.glob("**/*.jpg"))[:number]]
    decoders: dict[str, Callable[[bytes], object]] = {
        PILLOW: pillow,
        SIMPLEJPEG: lambda content: simplejpeg.decode_jpeg(content, "RGB"),
        TORCHVISION: torchvision,
        OURS: read_image,
        HALF: half,
        HALF_PILLOW: partial(pillow, half=True),
    }

    def each(decode: Callable[[bytes], object]) -> None:
        for content in contents:
            decode(content)

    count = len(contents)
    timed: dict[str, Callable[[], float]] = {
        key: partial(per_second, partial(each, one), count) for key, one in decoders.items()
    }
    if torch.cuda.is_available():
        timed[NVJPEG] = partial(per_second, partial(on_gpu, contents), count, time.perf_counter)
    found = interleave(timed, repeats)
    rows = [row("decoding, 500-px JPEGs", key, PILLOW, found, "images/CPU s") for key in timed if key != PILLOW]
    small = [scale_down(read_image(content), SIZE * 9 // 8, "bicubic") for content in contents]
    images = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in small]
    presets: tuple[Preset, ...] = ("light", "reference")
    found = interleave({key: partial(per_second, partial(augment, images, key), count) for key in presets}, repeats)
    torch.set_num_threads(before)
    return [*rows, row(f"augmentation at {SIZE} px", "reference", "light", found, "images/CPU s", "≥ 0.25")]
