"""``python -m evaluation base-to-novel``: what fine-tuning on some of the classes cost on the others."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrail.errors import UserError
from vitrail.files import write_text_atomically
from vitrail.predictions import Predictions, read_predictions, write_predictions
from vitrail.runs import Run, class_counts_of
from vitrail.types import LABEL_TASK, kind_of

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule
    from evaluation.statistics.base_to_novel import BaseToNovel, Cost
    from lightning_modules.base import VisionTask


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``base-to-novel``."""
    command.description = (
        "Accuracy on the classes that were trained and on the others, with their harmonic mean: what fine-tuning cost."
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run directory, or a file of predictions")
    command.add_argument(
        "--before", type=Path, metavar="RUN", help="the same of the model before fine-tuning, on the same samples"
    )
    command.add_argument("--base", type=int, help="number of base classes, the first ones (default: half, rounded up)")
    command.add_argument("--split", default="test", help="split whose predictions are read (default: test)")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Print the table."""
    from evaluation.statistics.base_to_novel import accuracy_table, base_to_novel, compare, plain_values

    after = _predictions(options.run, options.split)
    note = _check_novel(options.run, after, options.base)
    result: BaseToNovel | Cost
    if options.before is None:
        result = base_to_novel(after, options.base)
    else:
        result = compare(after, _predictions(options.before, options.split), options.base)
    if options.json is not None:
        content = plain_values(result) | ({"note": note} if note else {})
        write_text_atomically(options.json, json.dumps(content, indent=2) + "\n")
    accuracy_table(result, f"base to novel: {options.run}", note).show()


def _predictions(path: Path, split: str) -> Predictions:
    """Predictions of a run directory, or of a file."""
    return read_predictions(path / Run.PREDICTIONS / f"{split}.parquet" if path.is_dir() else path)


def _check_novel(path: Path, predictions: Predictions, base: int | None) -> str:
    """Refuse a run that was trained on novel classes or not on base classes; return a note where that is not known."""
    from evaluation.statistics.base_to_novel import checked_base

    base = checked_base(predictions, base)
    names = predictions.tasks[LABEL_TASK]
    record = Run(path).record if path.is_dir() else {}
    counts = class_counts_of(record, {LABEL_TASK: names}, str(path)).get(LABEL_TASK)
    stages = Run(path).stages if path.is_dir() else []
    if counts is None or not stages:
        return (
            "which classes were trained is not recorded with these predictions: whether the others are novel to the "
            "model was not checked"
        )
    if not any(stage.get("stage") == "fit" for stage in stages):
        return "the run was not trained, so no class is novel to it in the sense of this comparison"
    trained = [name for name, count in zip(names[base:], counts[base:], strict=True) if count]
    if trained:
        raise UserError(
            f"base-to-novel: {path} was trained on {len(trained)} of the {len(names) - base} classes that would be "
            f"called novel, first '{trained[0]}'; train on base classes only (Flowers102: data.init_args.classes: "
            "base), or name their number with --base"
        )
    unseen = [name for name, count in zip(names[:base], counts[:base], strict=True) if not count]
    if unseen:
        raise UserError(
            f"base-to-novel: {path} was trained on none of the images of {len(unseen)} of the {base} base classes, "
            f"first '{unseen[0]}'; name the number of trained classes with --base"
        )
    return ""


def finetuning_cost(run: Path, datamodule: ImageDataModule, base_classes: int) -> Cost:
    """Compare the classes of a run's test split before and after fine-tuning.

    Args:
        run: directory with ``checkpoints/start.ckpt`` and ``predictions/test.parquet``; the predictions of the former
            are written next to the latter as ``test_start.parquet``.
        datamodule: of the run.
        base_classes: number of classes that were trained, the first in label order.

    Raises:
        UserError: a file is missing or does not fit.
    """
    from evaluation.statistics.base_to_novel import compare
    from lightning_modules.checkpoint import load_task

    before = predict_main_task(load_task(start_weights_of(run)), datamodule, "test")
    write_predictions(run / Run.PREDICTIONS / "test_start.parquet", before)
    return compare(read_predictions(run / Run.PREDICTIONS / "test.parquet"), before, base_classes)


def start_weights_of(run: Path) -> Path:
    """Return the checkpoint of what a fine-tuning began with.

    Raises:
        UserError: the run kept none.
    """
    path = run / Run.START
    if not path.is_file():
        raise UserError(f"{path}: the run kept no weights from before training; train it with callbacks.StartWeights")
    return path


def predict_main_task(task: VisionTask, datamodule: ImageDataModule, split: str) -> Predictions:
    """Predict the main task of all samples of a split, on the task's device.

    Raises:
        UserError: the data have no classes.
    """
    import numpy as np
    import torch
    from lightning.fabric.utilities import move_data_to_device

    if LABEL_TASK not in datamodule.tasks:
        raise UserError("the data have no classes to count right predictions of")
    kind = kind_of(datamodule.task_kinds, LABEL_TASK)
    datamodule.adopt_image_options(task.input_options)
    device = next(task.parameters()).device
    task.eval()
    with torch.inference_mode():
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
        kinds={} if kind == "single_label" else {LABEL_TASK: kind},
    )
