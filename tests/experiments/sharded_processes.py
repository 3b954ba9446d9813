"""Training with weights that are shared out (FSDP); started by ``test_several_processes.py``, alone and by torchrun.

Not in forks as the rest: sharding on CPUs starts threads of autograd, which torch's pool of threads does not survive in
a forked process.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from callbacks import NonFiniteLoss
from lightning_modules import FullySharded
from tests.experiments.several_processes import (
    EPOCHS,
    STEP_SAMPLES,
    Made,
    build,
    through_the_command_line,
    trainer_of,
)

SHARDED = ("classifier", "captioned")


def train_sharded(name: str, folder: Path, here: Path, world: int) -> None:
    """Trains with the weights shared out, tests what the checkpoint holds, and goes on from it with a new model."""
    data = Made(10, STEP_SAMPLES // world, captions=name == "captioned")
    changes: dict[str, Any] = {"limit_val_batches": 0, "gradient_clip_val": 1.0}
    if world > 1:
        changes["strategy"] = FullySharded()
    first = trainer_of(here, world, max_epochs=2, callbacks=[NonFiniteLoss()], **changes)
    task = build(name, folder)
    first.fit(task, datamodule=data)
    first.save_checkpoint(here / "half.ckpt", weights_only=False)
    metrics = first.test(task, datamodule=data, ckpt_path=here / "half.ckpt", weights_only=True, verbose=False)
    if world > 1:
        changes["strategy"] = FullySharded()
    second = trainer_of(here, world, max_epochs=EPOCHS, callbacks=[NonFiniteLoss()], **changes)
    second.fit(build(name, folder), datamodule=data, ckpt_path=here / "half.ckpt", weights_only=True)
    second.save_checkpoint(here / "whole.ckpt", weights_only=False)
    (here / f"tested_{first.global_rank}.json").write_text(json.dumps(metrics[0]), encoding="utf-8")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    root, processes = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1"))
    for task_name in SHARDED:
        train_sharded(task_name, root, root / str(processes) / f"{task_name}-sharded", processes)
    if processes > 1:
        through_the_command_line(root, "fsdp")
