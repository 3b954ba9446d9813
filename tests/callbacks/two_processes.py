"""Two processes train and test on the CPU; run by ``test_two_processes.py``, which looks at what they wrote.

A program of its own, because processes are forked, which a process that has computed gradients before may not be. So
``import lightning`` is paid for once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks import BackboneUnfreezing, ConfusionMatrixLogger, SaliencyOfMistakes
from tests.support.runs import MadePhotos, tiny_classifier, tiny_trainer

PHASE_ONE, EPOCHS = 1, 3


class WeightKeeper(Callback):
    """Writes the weights of each process after every epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        torch.save(pl_module.state_dict(), folder / f"weights_{trainer.current_epoch}_{trainer.global_rank}.pt")


def unfreezing() -> BackboneUnfreezing:
    return BackboneUnfreezing(PHASE_ONE, lr=1e-3, backbone_lr=1e-4, head_lr=1e-3)


def train(folder: Path, batch_size: int, **changes: Any) -> None:
    trainer = tiny_trainer(folder, max_epochs=EPOCHS, callbacks=[unfreezing(), WeightKeeper()], **changes)
    trainer.fit(tiny_classifier(), datamodule=MadePhotos(batch_size))


def evaluate(folder: Path, **changes: Any) -> None:
    trainer = tiny_trainer(folder, callbacks=[ConfusionMatrixLogger(), SaliencyOfMistakes(3)], **changes)
    task, data = tiny_classifier(), MadePhotos(3)
    trainer.validate(task, datamodule=data, verbose=False)
    trainer.test(task, datamodule=data, verbose=False)


def main(folder: Path) -> None:
    both: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork"}
    torch.set_num_threads(1)
    train(folder / "fit", 2, **both)
    train(folder / "accumulated", 2, accumulate_grad_batches=2, **both)
    # Six batches an epoch: the last step has one.
    train(folder / "uneven", 2, accumulate_grad_batches=5, **both)
    evaluate(folder / "evaluation", **both)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
