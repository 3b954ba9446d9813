"""Galleries filled on one process and on several (gloo); ``test_gallery_writer.py`` compares them.

A program of its own: everything is imported once, and each process is a fork that has computed nothing yet.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lance_namespace  # noqa: F401 -- most of what importing LanceDB costs; LanceDB itself starts a thread
import timm  # noqa: F401 -- likewise before the forks
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks import EmbeddingExport
from tests.experiments.several_processes import Made, build, in_forks, trainer_of
from tests.support.models import write_clip

WORLDS = {"multitask": 3, "captioned": 2}
"""Processes that are compared with one, for each task."""

SIZE = 37
"""Test images; divides neither by the processes nor by the size of a batch."""
BATCH_SIZE = 4
CHUNK = 8


def export(name: str, folder: Path, here: Path, world: int, **changes: Any) -> None:
    """Tests, and predicts everything, into the same gallery."""
    data = Made(SIZE, BATCH_SIZE, captions=name == "captioned")
    trainer = trainer_of(here, world, callbacks=[EmbeddingExport(chunk=CHUNK)], **changes)
    task = build(name, folder)
    trainer.test(task, datamodule=data, verbose=False)
    data.loader_options = replace(data.loader_options, predict=["train", "val", "test"])
    trainer.predict(task, datamodule=data, return_predictions=False)


class Killed(Callback):
    """Kills the second process in its third batch."""

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 3 and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: Path, here: Path) -> None:
    """A test that is killed after shards have been written."""
    trainer = trainer_of(here, 1, callbacks=[EmbeddingExport(chunk=CHUNK), Killed()])
    trainer.test(build("multitask", folder), datamodule=Made(SIZE, BATCH_SIZE), verbose=False)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    write_clip(root / "clip", image_size=16)
    for task, most in WORLDS.items():
        for world in (1, most):
            here = root / str(world) / task
            in_forks(world, partial(export, task, root, here, world), root / "log")
    try:
        in_forks(1, lambda: killed(root, root / "killed"), root / "log")
    except RuntimeError:
        (root / "was_killed").touch()
    shards = sorted(path.name for path in (root / "killed").rglob("rank*.parquet"))
    (root / "shards_of_the_killed").write_text(" ".join(shards))
    in_forks(1, lambda: export("multitask", root, root / "killed", 1), root / "log")
