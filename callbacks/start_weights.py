"""The weights that a training began with, beside those that it ended with."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

START_FILE = "start.ckpt"


class StartWeights(Callback):
    """Writes ``checkpoints/start.ckpt`` before the first step.

    ``python -m evaluation wise_ft`` interpolates between it and the best checkpoint, and shows what fine-tuning cost. A
    run that is resumed keeps the one it has.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, unless training goes on from a checkpoint."""
        if trainer.global_step == 0 and not getattr(trainer, "fast_dev_run", False):
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / START_FILE, weights_only=True)
