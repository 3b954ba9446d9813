"""``python -m evaluation select``: which unlabelled images to label next, as a table to be filled in."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from datamodules.table import composed
from evaluation.dataset.active_learning import STRATEGIES, Pool, ranking, to_label
from vitrail.console import tracked
from vitrail.errors import UserError
from vitrail.predictions import predicted_classes
from vitrail.runs import Run
from vitrail.types import DATA_ARGUMENTS, LABEL_TASK, UNKNOWN

if TYPE_CHECKING:
    from datamodules.base import ImageDataModule
    from lightning_modules.base import VisionTask

SPLITS = ("train", "val", "test")

_EPILOG = """\
examples:
  python -m evaluation select --run runs/NAME/TIME --pool new_photos/ --by margin --n 50 --to to_label.csv
  python -m evaluation select --run runs/NAME/TIME --pool galleries/holiday --by coreset --to to_label.csv
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``select``."""
    command.description = (
        "Images that have a label of the task are left out; the core-set counts them, and the run's "
        "train split, as covered."
    )
    command.epilog = _EPILOG
    command.add_argument("--run", type=Path, required=True, metavar="RUN", help="run directory of the model")
    command.add_argument(
        "--pool", required=True, help="an experiment's YAML, a folder of images, or a gallery of the run"
    )
    command.add_argument("--by", choices=STRATEGIES, default="margin", help="(default: margin)")
    command.add_argument("--n", type=int, default=50, help="images (default: 50)")
    command.add_argument("--to", type=Path, required=True, metavar="CSV", help="table to write")
    command.add_argument("--task", type=composed, help="that is to be labelled (default: the main task)")
    command.add_argument("--labelled-too", action="store_true", help="rank images that have a label as well")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Rank the pool and write the table.

    Raises:
        UserError: for every mistake in what was asked, of the run or of the pool.
    """
    from vitrail.files import write_csv

    if options.n < 1:
        raise UserError(f"--n: is {options.n}, must be at least 1")
    if strange := [one for one in rest if one.startswith("-") and not one.startswith(DATA_ARGUMENTS)]:
        raise UserError(f"select: unknown argument {strange[0]!r}; see python -m evaluation select --help")
    checkpoint = options.run / Run.BEST
    if not checkpoint.is_file():
        raise UserError(f"--run {options.run}: has no checkpoints/best.ckpt; train it first with `fit`")
    is_gallery = "://" in options.pool or (Path(options.pool) / "images.lance").is_dir()
    pool = _gallery_pool(options, checkpoint) if is_gallery else _image_pool(options, checkpoint, rest)
    ranked = ranking(pool, options.by, options.n)
    write_csv(options.to, to_label(pool, ranked, options.task or LABEL_TASK))
    sys.stdout.write(
        f"{options.to}: {len(ranked.rows)} of {len(pool.names):,} images by {options.by}, the most wanted first; "
        f"fill in the column {options.task or LABEL_TASK}\n"
    )


def _gallery_pool(options: argparse.Namespace, checkpoint: Path) -> Pool:
    """Images of a gallery; those with a label are covered."""
    from lightning_modules.checkpoint import load_task
    from retrieval.gallery import Gallery
    from retrieval.schema import CONFIDENCE, LABEL, PREDICTED, EmbedsImages

    gallery = Gallery.open(options.pool)
    task = load_task(checkpoint)
    if not isinstance(task, EmbedsImages) or task.weights_digest() != gallery.identity.weights:
        raise UserError(
            f"--pool {options.pool}: was made by {gallery.identity.run}, with other weights than {options.run}"
        )
    name = _task_name(options.task, gallery.identity.predicts, options.run)
    predicts, labelled = name in gallery.identity.predicts, name in gallery.identity.labels
    columns = ["id", "path", "vector"]
    columns += [f"{PREDICTED}{name}", f"{CONFIDENCE}{name}"] if predicts else []
    columns += [f"{LABEL}{name}"] if labelled else []
    rows = gallery.table([column for column in columns if column != "vector"])
    ids = rows.column("id").to_pylist()
    vectors = gallery.vectors(ids)
    known = np.array([value is not None for value in rows.column(f"{LABEL}{name}").to_pylist()]) if labelled else None
    wanted = _wanted(known, len(ids), name, options)

    def text(column: str) -> NDArray[np.object_]:
        return np.array(rows.column(column).to_pylist(), dtype=object)[wanted]

    confidence = rows.column(f"{CONFIDENCE}{name}").to_numpy()[wanted].astype(np.float64) if predicts else None
    return Pool(
        names=np.array(ids, dtype=object)[wanted],
        paths=text("path"),
        vectors=vectors[wanted],
        probability=None,
        predicted=text(f"{PREDICTED}{name}") if predicts else None,
        confidence=confidence,
        covered=np.delete(vectors, wanted, axis=0),
    )


def _image_pool(options: argparse.Namespace, checkpoint: Path, rest: Sequence[str]) -> Pool:
    """Images that the model predicts now."""
    from datamodules.cli import load_datamodule
    from evaluation.dataset.active_learning import checked_probabilities
    from lightning_modules.checkpoint import load_task

    is_folder = Path(options.pool).expanduser().is_dir()
    if not is_folder and Path(options.pool).suffix not in (".yaml", ".yml"):
        raise UserError(
            f"--pool {options.pool}: is neither a folder of images, a gallery nor an experiment's YAML file"
        )
    datamodule = load_datamodule(options.pool, rest, "python -m evaluation select")
    model = load_task(checkpoint, _device())
    found = _Predicted.of(model, datamodule, SPLITS)
    name = _task_name(options.task, found.logits, options.run)
    targets = datamodule.table.targets.get(name)
    known = None if targets is None else targets[found.sample_id] != UNKNOWN
    wanted = _wanted(known, len(found.sample_id), name, options)
    covered = np.delete(found.vectors, wanted, axis=0)
    if options.by == "coreset":
        own: ImageDataModule = Run(options.run).datamodule
        covered = np.concatenate([covered, _Predicted.of(model, own, ("train",)).vectors])
    probability = predicted = confidence = None
    if name in found.logits:
        probability = checked_probabilities(found.logits[name][wanted], str(options.run))
        classes = np.array([*cast("Any", model).tasks[name], ""], dtype=object)
        # The last one, nothing, where the model predicts none (UNKNOWN is -1).
        predicted = classes[predicted_classes(found.logits[name][wanted])]
        confidence = probability.max(axis=1)
    facts = datamodule.image_facts(found.sample_id[wanted])
    return Pool(
        names=np.array(facts.column("id").to_pylist(), dtype=object),
        paths=np.array(facts.column("path").to_pylist(), dtype=object),
        vectors=found.vectors[wanted],
        probability=probability,
        predicted=predicted,
        confidence=confidence,
        covered=covered,
    )


@dataclass(frozen=True)
class _Predicted:
    """Outputs of a model for N images: ids ``(N,)``, unit vectors ``(N, D)``, logits ``(N, C)`` of each task."""

    sample_id: NDArray[np.int64]
    vectors: NDArray[np.float32]
    logits: dict[str, NDArray[np.float32]]

    @classmethod
    def of(cls, model: VisionTask, datamodule: ImageDataModule, splits: Sequence[str]) -> _Predicted:
        """Predict the images of some splits; unreadable ones are left out."""
        import torch
        from lightning.fabric.utilities import move_data_to_device

        # How images are made is the model's; and a pool is no test, what is in it twice does no harm.
        datamodule.image_options = {**model.input_options}
        datamodule.check_options = replace(datamodule.check_options, on_bad_image="skip")
        datamodule.setup("predict")
        rows = datamodule.rows_of(splits)
        if not len(rows):
            raise UserError(f"{datamodule.table.origin}: has no image in {', '.join(splits)} that can be read")
        device = next(model.parameters()).device
        outputs: list[Any] = []
        loader = datamodule.rows_dataloader(rows)
        with torch.inference_mode():
            model.on_predict_epoch_start()
            for index, batch in enumerate(tracked(loader, "predicting images, in batches", len(loader))):
                outputs.append(model.predict_step(move_data_to_device(batch, device), index))
        if "image_embedding" not in outputs[0]:
            raise UserError(f"{type(model).__name__}: returns no image embeddings; use a classifier or a dual encoder")

        def joined(parts: list[Any]) -> NDArray[Any]:
            values: NDArray[Any] = torch.cat(parts).float().cpu().numpy()
            return values

        return cls(
            torch.cat([output["sample_id"] for output in outputs]).cpu().numpy(),
            joined([output["image_embedding"] for output in outputs]),
            {task: joined([output["logits"][task] for output in outputs]) for task in outputs[0]["logits"]},
        )


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _task_name(wanted: str | None, predicted: Any, run: Path) -> str:
    """The task that is to be labelled."""
    if wanted is not None and wanted not in predicted:
        raise UserError(f"--task {wanted}: {run} predicts {', '.join(predicted) or 'no classes'}; name one of them")
    return wanted or next(iter(predicted), LABEL_TASK)


def _wanted(
    known: NDArray[np.bool_] | None, count: int, task: str, options: argparse.Namespace
) -> NDArray[np.int64]:  # fmt: skip
    """Places of the images that may be ranked, int64."""
    if known is None or options.labelled_too:
        return np.arange(count)
    wanted = np.flatnonzero(~known)
    if not len(wanted):
        raise UserError(
            f"--pool {options.pool}: all {count} images have a label of {task!r}; name images without, or rank "
            "them all the same with --labelled-too"
        )
    return wanted
