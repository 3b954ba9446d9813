"""Predictions of a task outside of the Trainer: what another set of weights says to the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evaluation.base_to_novel import Cost, compare
from vitrail.errors import UserError
from vitrail.predictions import Predictions, read_predictions, write_predictions
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule
    from lightning_modules.base import VisionTask


@torch.inference_mode()
def predict_classes(task: VisionTask, datamodule: ImageDataModule, split: str) -> Predictions:
    """Class predictions of all samples of a split, on the task's device.

    Raises:
        UserError: if the data have no classes.
    """
    from lightning.fabric.utilities import move_data_to_device

    if LABEL_TASK not in datamodule.tasks:
        raise UserError("the data have no classes to count right answers of")
    datamodule.adopt_image_options(task.input_options)
    device = next(task.parameters()).device
    task.eval()
    task.on_predict_epoch_start()
    outputs: list[Any] = [
        task.predict_step(move_data_to_device(batch, device), index)
        for index, batch in enumerate(datamodule.eval_dataloader(split))
    ]
    sample_id = torch.cat([output["sample_id"] for output in outputs]).cpu().numpy()
    names, groups = datamodule.sample_names(), datamodule.group_names()
    return Predictions(
        sample_id=sample_id,
        names=np.array([names[index] for index in sample_id], dtype=object),
        groups=np.array([groups[index] for index in sample_id], dtype=object),
        tasks={LABEL_TASK: datamodule.class_names},
        targets={LABEL_TASK: torch.cat([output["targets"][LABEL_TASK] for output in outputs]).cpu().numpy()},
        logits={LABEL_TASK: torch.cat([output["logits"][LABEL_TASK] for output in outputs]).float().cpu().numpy()},
    )


def start_weights_of(run: Path) -> Path:
    """Checkpoint of what a fine-tuning began with.

    Args:
        run: the run directory.

    Raises:
        UserError: the run kept none.
    """
    path = run / "checkpoints" / "start.ckpt"
    if not path.is_file():
        raise UserError(f"{path}: the run kept no weights from before training; train it with callbacks.StartWeights")
    return path


def finetuning_cost(run: Path, datamodule: ImageDataModule, base_classes: int) -> Cost:
    """What a fine-tuning on some of the classes did to them and to the others.

    Args:
        run: directory with ``checkpoints/start.ckpt`` and ``predictions/test.parquet``; the predictions of the former
            are written beside the latter as ``test_start.parquet``.
        datamodule: of the run.
        base_classes: number of classes that were trained, the first in label order.

    Raises:
        UserError: if a file is missing or does not fit.
    """
    from lightning_modules.checkpoint import load_task

    before = predict_classes(load_task(start_weights_of(run)), datamodule, "test")
    write_predictions(run / "predictions" / "test_start.parquet", before)
    return compare(read_predictions(run / "predictions" / "test.parquet"), before, base_classes)
