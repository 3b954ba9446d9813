"""``python -m evaluation select`` and ``learning-curve``: images to label next, and what choosing them is worth."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from datamodules.table import composed
from evaluation.commands.dataset.explore import add_data_arguments, collection_of, data_of, gallery_vectors
from evaluation.dataset.active_learning import STRATEGIES, VARIANCE, Labelled, Pool, ranking, to_label
from evaluation.statistics.scores import IN_UNITS, LOWER_IS_BETTER, MAIN, heading
from vitrail.errors import UserError
from vitrail.predictions import LABEL_SEPARATOR, Predictions, check_finite, known_rows, task_predictions
from vitrail.runs import Run
from vitrail.runtime import check_device
from vitrail.types import CLASS_KINDS, DATA_ARGUMENTS, LABEL_TASK, UNKNOWN, TaskKind, kind_of

if TYPE_CHECKING:
    import pandas as pd

    from datamodules.base import ImageDataModule
    from evaluation.dataset.sections import Collection
    from lightning_modules.base import VisionTask

_SELECT_EPILOG = """\
examples:
  python -m evaluation select --run runs/NAME/TIME --pool new_photos/ --by margin --n 50 --to to_label.csv
  python -m evaluation select --run runs/NAME/TIME --pool galleries/holiday --by coreset --to to_label.csv
  python -m evaluation select --run runs/NAME/TIME --pool new_photos/ --task tags --by entropy --to to_label.csv
"""

_CURVE_EPILOG = """\
example:
  python -m evaluation learning-curve --config experiments/quickstart.yaml --long-tail 0.72 --to curves/wares
"""


def add_select_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``select``."""
    command.description = (
        "Images that have a label of the task are left out; the core-set counts them, and the run's "
        "train split, as covered."
    )
    command.epilog = _SELECT_EPILOG
    command.add_argument("--run", type=Path, required=True, metavar="RUN", help="run directory of the model")
    command.add_argument(
        "--pool", required=True, help="an experiment's YAML, a folder of images, or a gallery of the run"
    )
    command.add_argument(
        "--by", choices=(*STRATEGIES, VARIANCE), help="(default: margin, and variance where the task is a number)"
    )
    command.add_argument("--n", type=int, default=50, help="images (default: 50)")
    command.add_argument("--to", type=Path, required=True, metavar="CSV", help="table to write")
    command.add_argument("--task", type=composed, help="that is to be labelled (default: the main task)")
    command.add_argument("--labelled-too", action="store_true", help="rank images that have a label as well")


def run_select(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Rank the pool and write the table.

    Raises:
        UserError: for every mistake in what was asked, of the run or of the pool.
    """
    from vitrail.files import write_csv

    if options.n < 1:
        raise UserError(f"--n: is {options.n}, must be at least 1")
    if strange := [one for one in rest if one.startswith("-") and not one.startswith(DATA_ARGUMENTS)]:
        raise UserError(f"select: unknown argument {strange[0]!r}; see python -m evaluation select --help")
    if not (options.run / Run.BEST).is_file():
        raise UserError(f"--run {options.run}: has no checkpoints/best.ckpt; train it first with `fit`")
    is_gallery = "://" in options.pool or (Path(options.pool) / "images.lance").is_dir()
    pool = _gallery_pool(options) if is_gallery else _image_pool(options, rest)
    by = options.by or (VARIANCE if pool.kind == "regression" else "margin")
    ranked = ranking(pool, by, options.n)
    write_csv(options.to, to_label(pool, ranked, options.task or LABEL_TASK))
    several = ", labels with ; between them" if pool.kind == "multi_label" else ""
    sys.stdout.write(
        f"{options.to}: {len(ranked.rows)} of {len(pool.names):,} images by {by}, the most wanted first; "
        f"fill in the column {options.task or LABEL_TASK}{several}\n"
    )


def _gallery_pool(options: argparse.Namespace) -> Pool:
    """Images of a gallery; those with a label are covered."""
    from lightning_modules.checkpoint import load_task
    from retrieval.gallery import Gallery
    from retrieval.schema import LABEL, prediction_columns

    gallery = Gallery.open(options.pool)
    identity = gallery.identity
    if load_task(options.run / Run.BEST).weights_digest() != identity.weights:
        raise UserError(f"--pool {options.pool}: was made by {identity.run}, with other weights than {options.run}")
    name = _task_name(options.task, identity.predicts, options.run)
    predicts, kind = name in identity.predicts, identity.kind(name)
    columns = ["id", "path", *(prediction_columns(identity, name) if predicts else [])]
    columns += [f"{LABEL}{name}"] if name in identity.labels else []
    rows = gallery.table(columns).to_pandas()
    vectors = gallery.vectors(rows["id"].tolist())
    known = rows[f"{LABEL}{name}"].notna().to_numpy() if name in identity.labels else None
    wanted = _wanted(known, len(rows), name, options)
    chosen = rows.iloc[wanted]
    predicted = confidence = deviation = None
    if predicts:
        of_task, further = prediction_columns(identity, name)
        values = chosen[of_task].tolist()
        predicted = np.array([LABEL_SEPARATOR.join(one) if kind == "multi_label" else one for one in values], object)
        # Of labels only those of the predicted ones are there, which do not show how sure the others are.
        numbers = None if kind == "multi_label" else chosen[further].to_numpy(np.float64)
        confidence = None if kind == "regression" else numbers
        deviation = numbers if kind == "regression" and not chosen[further].isna().any() else None
    return Pool(
        names=chosen["id"].to_numpy(object),
        paths=chosen["path"].to_numpy(object),
        vectors=vectors[wanted],
        probability=None,
        predicted=predicted,
        confidence=confidence,
        covered=np.delete(vectors, wanted, axis=0),
        kind=kind,
        deviation=deviation,
    )


def _image_pool(options: argparse.Namespace, rest: Sequence[str]) -> Pool:
    """Images that the model predicts now."""
    from datamodules.cli import load_datamodule

    if not Path(options.pool).expanduser().is_dir() and Path(options.pool).suffix not in (".yaml", ".yml"):
        raise UserError(
            f"--pool {options.pool}: is neither a folder of images, a gallery nor an experiment's YAML file"
        )
    datamodule = load_datamodule(options.pool, rest, "python -m evaluation select")
    run = Run(options.run)
    model = run.load_model(device=check_device("auto"))
    found = _predicted(model, datamodule, ("train", "val", "test"))
    name = _task_name(options.task, found.logits, options.run)
    kind, given = (kind_of(kinds, name) for kinds in (getattr(model, "task_kinds", {}), datamodule.task_kinds))
    targets = datamodule.table.targets.get(name)
    if targets is not None and kind != given and not {kind, given} <= set(CLASS_KINDS):
        raise UserError(f"--pool {options.pool}: {name!r} is {given}, the model has it as {kind}; set its kind")
    known = None if targets is None else _labelled(targets[found.sample_id])
    wanted = _wanted(known, len(found.sample_id), name, options)
    covered = np.delete(found.vectors, wanted, axis=0)
    if options.by == "coreset":
        covered = np.concatenate([covered, _predicted(model, run.datamodule, ("train",)).vectors])
    facts = datamodule.image_facts(found.sample_id[wanted])
    pool = Pool(
        names=np.array(facts.column("id").to_pylist(), dtype=object),
        paths=np.array(facts.column("path").to_pylist(), dtype=object),
        vectors=found.vectors[wanted],
        probability=None,
        predicted=None,
        confidence=None,
        covered=covered,
        kind=kind,
    )
    if name not in found.logits:
        return pool
    return _with_predictions(pool, model, name, found.logits[name][wanted], str(options.run))


def _with_predictions(pool: Pool, model: VisionTask, task: str, logits: NDArray[np.float32], run: str) -> Pool:
    """The pool with what the model predicts for its images."""
    from evaluation.dataset.active_learning import checked_probabilities

    probability = None if pool.kind == "regression" else checked_probabilities(logits, run, pool.kind)
    thresholds: dict[str, list[float]] = getattr(model, "thresholds", {})
    names: dict[str, list[str]] = {task: cast("Any", model).tasks[task] or []}
    predictions = Predictions(
        np.arange(len(logits)), pool.names, pool.names, names, {}, {task: logits}, {task: pool.kind}, thresholds
    )
    check_finite(predictions, run)
    found = task_predictions(predictions, task)
    is_number = pool.kind == "regression"
    return replace(
        pool,
        probability=probability,
        predicted=np.array([one.value if is_number else one.label for one in found], dtype=object),
        confidence=None if is_number else np.array([one.confidence for one in found]),
        deviation=predictions.deviations(task) if is_number else None,
    )


def _labelled(targets: NDArray[Any]) -> NDArray[np.bool_]:
    """Which samples need no label, bool ``(N,)``; of multi-label tasks those with all entries known."""
    return (targets != UNKNOWN).all(axis=1) if targets.ndim > 1 else known_rows(targets)


class _Predicted(NamedTuple):
    """Outputs of a model for N images: ids ``(N,)``, unit vectors ``(N, D)``, logits ``(N, C)`` of each task."""

    sample_id: NDArray[np.int64]
    vectors: NDArray[np.float32]
    logits: dict[str, NDArray[np.float32]]


def _predicted(model: VisionTask, datamodule: ImageDataModule, splits: Sequence[str]) -> _Predicted:
    """Predict the images of some splits; unreadable ones are left out."""
    import torch
    from lightning.fabric.utilities import move_data_to_device

    from vitrail.console import tracked

    # How images are made is the model's; and a pool is no test, what is in it twice does no harm.
    datamodule.image_options = {**model.input_options}
    datamodule.check_options = replace(datamodule.check_options, on_bad_image="skip")
    datamodule.setup("predict")
    rows = datamodule.rows_of(splits)
    if not len(rows):
        raise UserError(f"{datamodule.table.origin}: has no image in {', '.join(splits)} that can be read")
    device = next(model.parameters()).device
    loader = datamodule.rows_dataloader(rows)
    with torch.inference_mode():
        model.on_predict_epoch_start()
        batches = enumerate(tracked(loader, "predicting images, in batches", len(loader)))
        outputs: list[Any] = [model.predict_step(move_data_to_device(batch, device), index) for index, batch in batches]
    if "image_embedding" not in outputs[0]:
        raise UserError(f"{type(model).__name__}: returns no image embeddings; use a classifier or a dual encoder")

    def joined(parts: list[torch.Tensor]) -> NDArray[Any]:
        return np.asarray(torch.cat(parts).float().cpu())

    return _Predicted(
        torch.cat([output["sample_id"] for output in outputs]).cpu().numpy(),
        joined([output["image_embedding"] for output in outputs]),
        {task: joined([output["logits"][task] for output in outputs]) for task in outputs[0]["logits"]},
    )


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


def add_learning_curve_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``learning-curve``."""
    command.description = (
        "The labels of the train split are hidden and given out step by step to a linear model on colours and edges, "
        "or on a gallery's vectors; accuracy (mAP of labels, mean absolute error of numbers) is measured on validation "
        "and test together."
    )
    command.epilog = _CURVE_EPILOG
    add_data_arguments(command)
    command.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="for the curve as PNG, and the tables"
    )
    command.add_argument("--task", type=composed, help="to train on (default: the main task)")
    command.add_argument(
        "--by",
        nargs="+",
        choices=(*STRATEGIES, VARIANCE),
        help="strategies (default: entropy margin coreset, of numbers variance coreset)",
    )
    command.add_argument("--gallery", metavar="G", help="its vectors are the features, instead of colours and edges")
    command.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    command.add_argument("--start", type=int, default=30, help="random labels to begin with (default: 30)")
    command.add_argument("--step", type=int, default=30, help="labels at a time (default: 30)")
    command.add_argument("--rounds", type=int, default=10, help="number of steps (default: 10)")
    command.add_argument(
        "--long-tail",
        type=float,
        default=1.0,
        metavar="R",
        help="each class of the pool has R times the groups of the one before, as real collections do (default: 1)",
    )


def run_learning_curve(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Compute the curves, write them, and print a summary.

    Raises:
        UserError: for every mistake in what was asked or in the data.
    """
    from evaluation.dataset.active_learning import Schedule, curve_figure, learning_curves, summarised
    from evaluation.report.figures import save_figure
    from vitrail.files import write_csv

    if options.seeds < 1 or not 0 < options.long_tail <= 1:
        raise UserError("learning-curve: --seeds must be at least 1, and --long-tail above 0 and up to 1")
    collection = collection_of(data_of("learning-curve", options, rest))
    task = _curve_task(collection, options.task)
    pool, test = _pool_and_test(collection, task, options)
    schedule = Schedule(options.start, options.step, options.rounds)
    by = options.by or ([VARIANCE, "coreset"] if pool.kind == "regression" else ["entropy", "margin", "coreset"])
    curves = learning_curves(pool, test, by, range(options.seeds), schedule)
    summary = summarised(curves)
    tail = f", long tail {options.long_tail:g}" if options.long_tail < 1 else ""
    title = f"{collection.name}, {task}: a pool of {len(pool.labels):,} images{tail}; {options.seeds} seeds"
    save_figure(curve_figure(curves, title), options.to / "learning_curve.png")
    for name, table in {"learning_curve": curves, "summary": summary}.items():
        write_csv(options.to / f"{name}.csv", table)
    sys.stdout.write(_markdown(summary, MAIN[pool.kind], len(pool.labels), len(test.labels)))


def _curve_task(collection: Collection, wanted: str | None) -> str:
    """The task that curves are measured of, by default the main one."""
    every = [*collection.tasks, *collection.others]
    if not every:
        raise UserError(f"{collection.name}: has no labels, so there are no curves")
    if wanted is not None and wanted not in every:
        raise UserError(f"--task {wanted}: the data have {', '.join(every)}; name one of them")
    return wanted or (LABEL_TASK if LABEL_TASK in every else every[0])


def long_tailed(labels: NDArray[np.int64], groups: NDArray[np.object_], ratio: float) -> NDArray[np.int64]:
    """Return rows of a pool in which each class has ``ratio`` times the groups of the one before, at least two.

    Args:
        labels: int64 ``(N,)``, all known.
        groups: ``(N,)``.
        ratio: above 0, up to 1.

    Returns:
        int64 ``(n,)``, ascending; whole groups in the order of their first row.
    """
    kept = []
    for place, code in enumerate(np.unique(labels)):
        rows = np.flatnonzero(labels == code)
        own = list(dict.fromkeys(groups[rows].tolist()))
        chosen = own[: max(2, round(len(own) * ratio**place))]
        kept.append(rows[np.isin(groups[rows].astype(str), np.array(chosen, dtype=str))])
    return np.sort(np.concatenate(kept)).astype(np.int64)


def _pool_and_test(collection: Collection, task: str, options: argparse.Namespace) -> tuple[Labelled, Labelled]:
    from evaluation.dataset.features import pixel_features
    from vitrail.console import tracked

    kind: TaskKind = "single_label"
    if task in collection.others:
        kind = "multi_label" if collection.others[task] else "regression"
    if options.long_tail < 1 and kind != "single_label":
        raise UserError(f"--long-tail: '{task}' is {kind}, it has no classes that could be made rare; leave it out")
    if options.gallery is not None:
        rows, features, _ = gallery_vectors(collection, options.gallery)
    else:
        rows = collection.usable
        if not len(rows):
            raise UserError(f"{collection.name}: has no image that can be read")
        images = (collection.read(row) for row in tracked(rows.tolist(), "reading images", len(rows)))
        features = np.stack([pixel_features(image) for image in images])
    labels, splits = {**collection.targets, **collection.other_targets}[task][rows], collection.splits[rows]
    known = known_rows(labels)
    pool, test = np.flatnonzero(known & (splits == "train")), np.flatnonzero(known & (splits != "train"))
    if options.long_tail < 1 and len(pool):
        pool = pool[long_tailed(labels[pool], collection.groups[rows[pool]], options.long_tail)]
    return Labelled(features[pool], labels[pool], kind), Labelled(features[test], labels[test], kind)


def _markdown(summary: pd.DataFrame, metric: str, pool: int, test: int) -> str:
    """A Markdown table with the sentence that belongs to it."""
    from vitrail.console import Table

    form = ".4g" if metric in IN_UNITS else ".3f"
    rows = []
    for row in summary.to_dict("records"):
        interval = "" if np.isnan(row["low"]) else f" [{row['low']:+{form}}, {row['high']:+{form}}]"
        ahead = "" if row["strategy"] == "random" else f"{row['ahead']:+{form}}{interval}"
        rows.append([row["strategy"], f"{row[metric]:{form}}", f"{row['last']:{form}}", ahead, row["verdict"]])
    better = ", lower is better" if metric in LOWER_IS_BETTER else ""
    columns = ["chosen by", heading(metric), "after the last step", "difference to random [95 %]", ""]
    lead = (
        f"Mean {heading(metric)} over all steps{better}; pool {pool:,}, measured on {test:,} images; difference to "
        "random choice, paired by seed, with its 95 % Student interval over seeds."
    )
    return f"{Table(columns, rows, title=lead).markdown()}\n"
