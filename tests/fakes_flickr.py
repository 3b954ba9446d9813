"""A tiny Flickr8k in its real layouts: token file and lists, Kaggle's CSV, a Karpathy JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from tests.fake_images import COLOURS, draw_image
from tests.fakes import write_csv

SHAPES = ("disc", "square", "triangle", "ring", "cross")
LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}
GHOST = "2258277193_586949ec62.jpg.1"
"""A photo that does not exist, but has captions in the original token file."""


def photo_name(number: int) -> str:
    """Name of a photo."""
    return f"{1000 + number}_ab.jpg"


def captions_of(number: int) -> list[str]:
    """Five captions of a photo, one of them with a comma."""
    colour, shape = list(COLOURS)[number % 6], SHAPES[number % 5]
    return [
        f"A {colour} {shape} .",
        f"The {shape} is {colour} , on a wall .",
        f"Somebody painted a {shape} in {colour} .",
        f"{colour} {shape} number {number}",
        f"a {shape}",
    ]


def split_of(number: int) -> str:
    """Every sixth photo is val, every sixth test."""
    return {4: "val", 5: "test"}.get(number % 6, "train")


def write_flickr(
    root: Path, *, photos: int = 24, size: int = 32, layout: Literal["original", "kaggle", "karpathy"] = "original"
) -> Path:
    """Writes photos and captions; the last photo is in no list.

    Args:
        root: folder of the data set, made where missing.
        photos: how many.
        size: side of the photos in pixels.
        layout: ``original`` (with captions of a photo that does not exist), ``kaggle`` or ``karpathy``.

    Returns:
        The folder.
    """
    folder = root / {"original": "Flicker8k_Dataset", "kaggle": "Images", "karpathy": "images"}[layout]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(photos):
        image = draw_image(number % 5, list(COLOURS)[number % 6], look=number, size=(size, size))
        image.save(folder / photo_name(number), quality=95)
    if layout == "original":
        text = root / "Flickr8k_text"
        text.mkdir(exist_ok=True)
        named = [(photo_name(n), captions_of(n)) for n in range(photos)] + [(GHOST, captions_of(0))]
        lines = [f"{name}#{k}\t{caption}\n" for name, captions in named for k, caption in enumerate(captions)]
        (text / "Flickr8k.token.txt").write_text("".join(lines), encoding="utf-8")
        for split, file in LISTS.items():
            names = [photo_name(n) for n in range(photos - 1) if split_of(n) == split]
            (text / file).write_text("\n".join(names) + "\n", encoding="utf-8")
    elif layout == "kaggle":
        rows = [[photo_name(n), caption] for n in range(photos) for caption in captions_of(n)]
        write_csv(root / "captions.txt", [["image", "caption"], *rows])
    else:
        images = [
            {
                "filename": photo_name(n),
                "split": "restval" if n == 0 else split_of(n),
                "sentences": [{"raw": caption} for caption in captions_of(n)],
            }
            for n in range(photos)
        ]
        (root / "dataset_tiny.json").write_text(json.dumps({"images": images}), encoding="utf-8")
    return root
