"""Tiny images with captions, and dual encoders that learn them in a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_modules.dual_encoder import DualEncoder
from tests.fakes_models import write_clip
from tests.lightning_modules.tiny import SIZE, TinyData
from vitrail.types import Batch

CLASSES = ["rose", "tulip", "daisy", "iris"]
PROMPTS = [[f"a photo of a {name}.", f"a {name}"] for name in CLASSES]


def pair_batch(ids: list[int], *, padding: int = 0, captions: bool = False) -> Batch:
    """A batch that is a function of the ids: the colour says the class, id modulo 4.

    Args:
        ids: of the samples.
        padding: rows at the end that only fill up.
        captions: whether the data set has captions of its own (two an image) and no classes.
    """
    rows = []
    for index in ids:
        generator = torch.Generator().manual_seed(index)
        base = torch.tensor([60 * (index % 4), 200 - 50 * (index % 4), 30 * (index % 7)]).view(3, 1, 1)
        rows.append((base + torch.randint(0, 40, (3, SIZE, SIZE), generator=generator)).clamp(0, 255).to(torch.uint8))
    sample_id = torch.tensor(ids)
    own = [[f"{CLASSES[index % 4]} number {index}", f"image {index} of a {CLASSES[index % 4]}"] for index in ids]
    batch: Batch = {
        "image": torch.stack(rows),
        "caption": [texts[0] for texts in own] if captions else [PROMPTS[index % 4][0] for index in ids],
        "positive_id": sample_id if captions else sample_id % 4,
        "sample_id": sample_id,
        "is_padding": torch.arange(len(ids)) >= len(ids) - padding,
    }
    if captions:
        batch["captions"] = own
    else:
        batch["label"] = sample_id % 4
    return batch


class TinyPairs(TinyData):
    """Twelve training and seven validation samples, the last validation row being padding."""

    def __init__(self, *, captions: bool = False) -> None:
        super().__init__()
        self.has_captions = captions

    def training_texts(self) -> list[str]:
        return [prompt for prompts in PROMPTS for prompt in prompts]

    def train_dataloader(self) -> DataLoader[Batch]:
        batches = [pair_batch(ids, captions=self.has_captions) for ids in ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11])]
        for batch in batches:
            batch.pop("captions", None)
        return self._loader(batches)

    def val_dataloader(self) -> DataLoader[Batch]:
        captions = self.has_captions
        return self._loader(
            [
                pair_batch([20, 21, 22, 23], captions=captions),
                pair_batch([24, 25, 26, 20], padding=1, captions=captions),
            ]
        )


def tiny_pair(folder: Path, **changes: Any) -> DualEncoder:
    """A CLIP with random weights and no tokenizer yet; the same weights every time.

    Args:
        folder: where its configuration is written, once.
        changes: arguments of ``DualEncoder``; ``class_names: None`` for captions without classes.
    """
    if not (folder / "config.json").exists():
        write_clip(folder, image_size=SIZE)
    pl.seed_everything(3)
    arguments: dict[str, Any] = {
        "towers": {"model": str(folder), "pretrained": False},
        "class_names": CLASSES,
        "class_prompts": PROMPTS,
        "image_size": SIZE,
        "lr": 1e-3,
    }
    arguments |= changes
    if arguments["class_names"] is None:
        arguments["class_prompts"] = None
    return DualEncoder(**arguments)
