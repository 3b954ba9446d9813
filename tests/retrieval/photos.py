"""Images on disk with a table that tests change, and tiny models that fill galleries from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from datamodules.base import ImageDataModule
from datamodules.options import CheckOptions
from datamodules.table import SampleTable
from lightning_modules import DualEncoder, MultiTaskClassifier
from retrieval.gallery import Gallery
from retrieval.schema import identity_of

SIDE = 16
TASKS = {"colour": ["blue", "red"], "class": ["bag", "water_bottle", "cap"]}
"""The class is not the first one, to see that it comes first in texts."""

Row = dict[str, Any]


def row(number: int) -> Row:
    """What the table says of an image: two captions each, some colours unknown."""
    name = TASKS["class"][number % 3]
    return {
        "name": f"photo {number}",
        "split": ("train", "val", "test")[number % 3],
        "group": f"object {number // 2}",
        "class": name,
        "colour": None if number % 5 == 4 else TASKS["colour"][number % 2],
        "caption": [f"{name} {number}", f"the {name} {number}"],
    }


def write_image(root: Path, name: str, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE + 4, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / f"{name}.png")


def write_photos(root: Path, count: int) -> Path:
    """Writes so many images and their table."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        write_image(root, f"photo {number}", number)
    return write_table(root, [row(number) for number in range(count)])


def write_table(root: Path, rows: list[Row]) -> Path:
    (root / "table.json").write_text(json.dumps(rows), encoding="utf-8")
    return root


class Photos(ImageDataModule):
    """The images of ``write_photos``."""

    def __init__(
        self, root: str, batch_size: int = 4, captions: bool = False, checks: CheckOptions | None = None
    ) -> None:
        loader: Any = {"batch_size": batch_size}
        super().__init__(image={"size": SIDE}, loader=loader, checks=checks)
        self.root = root
        self.captions = captions

    def load_table(self) -> SampleTable:
        rows = json.loads((Path(self.root) / "table.json").read_text(encoding="utf-8"))
        frame = pd.DataFrame(rows).assign(source=lambda table: table["name"] + ".png")
        if not self.captions:
            frame["caption"] = frame["caption"].str[0]
        vocabularies = {} if self.captions else TASKS
        return SampleTable.from_frame(
            frame, [] if self.captions else ["class", "colour"], vocabularies, "photos", self.root
        )


def photos(root: Path, **options: Any) -> Photos:
    """The DataModule, ready."""
    datamodule = Photos(str(root), **options)
    datamodule.setup("predict")
    return datamodule


def classifier(seed: int = 0) -> MultiTaskClassifier:
    torch.manual_seed(seed)
    return MultiTaskClassifier("test_vit", TASKS, pretrained=False, image_size=SIDE).eval()


def dual_encoder(clip: Path) -> DualEncoder:
    torch.manual_seed(0)
    task = DualEncoder({"model": str(clip)}, image_size=SIDE)
    task.load_pretrained()
    return task.eval()


def gallery_of(task: Any, datamodule: Photos, uri: Path) -> Gallery:
    labels = list(datamodule.tasks)
    return Gallery.open_or_create(str(uri), identity_of(task, "runs/tiny", datamodule.image_options, labels))


def rows_of(uri: Path, table: str = "images") -> Any:
    """All rows of a gallery's table in their order, vectors included, as Arrow has them on disk."""
    import lancedb

    return lancedb.connect(uri).open_table(table).to_arrow()
