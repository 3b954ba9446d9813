"""Predictions of a split as a file that every later number is computed from: ``predictions/<split>.parquet``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.outputs import OutputCollector
from vitrail.predictions import Predictions, join_predictions, read_predictions, write_predictions
from vitrail.runs import Run
from vitrail.types import Outputs, Split, TaskKind

WrittenSplit = Literal["val", "test", "predict"]


class PredictionWriter(OutputCollector):
    """Writes ``predictions/<split>.parquet`` in the run directory, each sample once (see ``vitrail.predictions``).

    On several processes each writes its own share atomically, and the first one joins them. The run directory
    must be one that all processes see.

    Args:
        splits: which of ``val``, ``test`` and ``predict`` are written. ``val`` is written by ``validate`` only, not
            while fitting.
    """

    during_fit = False

    def __init__(self, splits: list[WrittenSplit] | None = None) -> None:
        self.splits: list[WrittenSplit] = ["test", "predict"] if splits is None else splits
        self._check_splits(get_args(WrittenSplit))
        self._batches: list[Outputs] = []

    def collect(self, trainer: Trainer, pl_module: LightningModule, split: Split, outputs: object, batch: Any) -> None:
        """Keep a batch."""
        found = self._outputs(outputs, pl_module)
        self._batches.append(
            {
                "sample_id": found["sample_id"].cpu(),
                "logits": {task: values.float().cpu() for task, values in found["logits"].items()},
                "targets": {task: values.cpu() for task, values in found["targets"].items()},
            }
        )

    def finish(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Write the file."""
        batches, self._batches = self._batches, []
        # Without classes there is nothing to predict: captions have their own report.
        if not batches or not batches[0]["logits"] or getattr(trainer, "fast_dev_run", False):
            return
        predictions = self._described(batches, trainer, pl_module)
        folder = Path(trainer.default_root_dir) / Run.PREDICTIONS
        if trainer.world_size == 1:
            joined, _ = join_predictions([predictions])
            write_predictions(folder / f"{split}.parquet", joined)
            return
        shards = [folder / f".{split}.rank{rank}.parquet" for rank in range(trainer.world_size)]
        write_predictions(shards[trainer.global_rank], predictions)
        trainer.strategy.barrier("every process has written its predictions")
        if trainer.is_global_zero:
            joined, dropped = join_predictions([read_predictions(shard) for shard in shards])
            write_predictions(folder / f"{split}.parquet", joined)
            for shard in shards:
                shard.unlink()
            if dropped:
                rank_zero_info(f"PredictionWriter: {dropped} samples came twice and were counted once.")

    def _described(self, batches: list[Outputs], trainer: Trainer, pl_module: LightningModule) -> Predictions:
        samples = self._samples(trainer)
        sample_id = torch.cat([batch["sample_id"] for batch in batches]).numpy()
        names, groups = samples.sample_names(), samples.group_names()
        tasks = list(batches[0]["logits"])
        kinds: dict[str, TaskKind] = getattr(pl_module, "task_kinds", {})
        return Predictions(
            sample_id=sample_id,
            names=np.array([names[index] for index in sample_id], dtype=object),
            groups=np.array([groups[index] for index in sample_id], dtype=object),
            tasks={task: samples.tasks[task] for task in tasks},
            targets={task: torch.cat([batch["targets"][task] for batch in batches]).numpy() for task in tasks},
            logits={task: torch.cat([batch["logits"][task] for batch in batches]).numpy() for task in tasks},
            kinds={task: kind for task, kind in kinds.items() if task in tasks},
            thresholds=dict(getattr(pl_module, "thresholds", {})),
        )
