"""The worst mistakes of a test with their saliency maps, as one figure in the run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.outputs import OutputCollector
from evaluation.report.figures import save_figure
from evaluation.saliency import Method, check_method
from evaluation.saliency.overlays import explain_task, explained_figure, worst_mistakes
from vitrail.errors import UserError
from vitrail.runs import Run
from vitrail.trust import file_name
from vitrail.types import Split, TaskKind, kind_of


class SaliencyOfMistakes(OutputCollector):
    """Writes ``figures/mistakes_test_<task>.png`` after testing: the worst mistakes, each with its maps.

    The worst are those whose right class got the least probability, of labels those of the highest cross-entropy, of
    numbers those of the largest error. What the maps are of: ``evaluation.saliency.overlays.explain_task``. No more
    images than are shown are kept in memory. Without mistakes there is no figure. More can be asked of the finished
    run: ``python -m evaluation explain``.

    Args:
        count: images at most.
        method: ``gradcam`` for any network, ``rollout`` for plain vision transformers.
        task: whose mistakes; the main task by default.
    """

    splits = ("test",)

    def __init__(self, count: int = 16, method: Method = "gradcam", task: str | None = None) -> None:
        if count < 1:
            raise UserError(f"SaliencyOfMistakes.count: must be at least 1, got {count}")
        if method not in ("gradcam", "rollout"):
            raise UserError(f"SaliencyOfMistakes.method: {method!r} is unknown; choose gradcam or rollout")
        self.count = count
        self.method: Method = method
        self.task = task
        self._kept: _Mistakes | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a task that the model has not and a network that the method does not know, before anything is done.

        Raises:
            UserError: for one of these.
        """
        tasks: dict[str, list[str]] = getattr(pl_module, "tasks", {})
        if not tasks or (self.task is not None and self.task not in tasks):
            raise UserError(
                f"SaliencyOfMistakes.task: {type(pl_module).__name__} has {', '.join(tasks) or 'no classes'}; name a "
                "task that it has, or leave the callback out"
            )
        check_method(pl_module, self.method)

    def start(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Forget an earlier test."""
        self._kept = None

    def collect(self, trainer: Trainer, pl_module: LightningModule, split: Split, outputs: object, batch: Any) -> None:
        """Keep the worst mistakes so far.

        Raises:
            UserError: if the batch holds features of images instead of the images.
        """
        if "image" not in batch:
            raise UserError(
                "SaliencyOfMistakes: the test batches hold features instead of images; leave the callback out, and "
                "explain the finished run with `python -m evaluation explain`"
            )
        found = self._outputs(outputs, pl_module)
        task = self._task(pl_module)
        image = batch["image"][~batch["is_padding"]] if "is_padding" in batch else batch["image"]
        mistakes = _Mistakes(
            found["logits"][task].float().cpu().numpy(),
            found["targets"][task].cpu().numpy(),
            found["sample_id"].cpu().numpy(),
            image,
        )
        parts = [mistakes] if self._kept is None else [self._kept, mistakes]
        self._kept = _Mistakes.worst(parts, self.count, *self._decision(pl_module))

    def finish(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Explain the worst mistakes of all processes, and write the figure."""
        if getattr(trainer, "fast_dev_run", False):
            return
        kept = _of_all_processes(self._kept, trainer.world_size, self.count, *self._decision(pl_module))
        self._kept = None
        task = self._task(pl_module)
        path = Path(trainer.default_root_dir) / Run.FIGURES / f"mistakes_test_{file_name(task)}.png"
        if kept is None or not len(kept.sample_id):
            rank_zero_info(f"SaliencyOfMistakes: there are no mistakes of {task!r}, so there is no figure")
            if trainer.is_global_zero:
                path.unlink(missing_ok=True)
            return
        names = self._samples(trainer).sample_names()
        # Every process computes the same, because a model whose weights are shared out needs all of them.
        explained = explain_task(
            pl_module,
            task,
            kept.image,
            [names[index] for index in kept.sample_id],
            kept.targets,
            method=self.method,
        )
        if trainer.is_global_zero:
            save_figure(explained_figure(explained, columns=2), path)

    def _task(self, pl_module: LightningModule) -> str:
        tasks: dict[str, list[str]] = getattr(pl_module, "tasks", {})
        return self.task or next(iter(tasks))

    def _decision(self, pl_module: LightningModule) -> tuple[TaskKind, list[float]]:
        """Kind of the task, and the thresholds of its labels."""
        task = self._task(pl_module)
        thresholds: dict[str, list[float]] = getattr(pl_module, "thresholds", {})
        return kind_of(getattr(pl_module, "task_kinds", {}), task), thresholds.get(task, [])


class _Mistakes:
    """Logits and targets of N samples (``Predictions``), ids int64 ``(N,)`` and images uint8 ``(N, 3, H, W)``."""

    def __init__(self, logits: Any, targets: Any, sample_id: Any, image: torch.Tensor) -> None:
        self.logits, self.targets, self.sample_id, self.image = logits, targets, sample_id, image

    @classmethod
    def worst(cls, parts: list[_Mistakes], count: int, kind: TaskKind, thresholds: list[float]) -> _Mistakes:
        """The worst mistakes among several parts; their images are copied to the processor's memory."""
        logits, targets, sample_id = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("logits", "targets", "sample_id")
        )
        rows = worst_mistakes(logits, targets, count, kind, thresholds)
        owner = np.concatenate([np.full(len(part.sample_id), place) for place, part in enumerate(parts)])
        inside = np.concatenate([np.arange(len(part.sample_id)) for part in parts])
        images = [parts[owner[row]].image[int(inside[row])].cpu().clone() for row in rows]
        image = torch.stack(images) if images else parts[0].image[:0].cpu()
        return cls(logits[rows], targets[rows], sample_id[rows], image)


def _of_all_processes(
    kept: _Mistakes | None, world_size: int, count: int, kind: TaskKind, thresholds: list[float]
) -> _Mistakes | None:
    """The worst mistakes of all processes, on every process; a sample that several have seen comes once."""
    if world_size == 1:
        return kept
    parts: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(parts, kept)
    found: list[_Mistakes] = [part for part in parts if part is not None]
    return _Mistakes.worst(found, count, kind, thresholds) if found else None
