"""``python -m evaluation learning-curve``: what choosing images to label is worth, on data whose labels are known."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from datamodules.table import composed
from evaluation.commands.explore import add_data_arguments, collection_of, data_of
from evaluation.dataset.active_learning import STRATEGIES
from vitrail.errors import UserError
from vitrail.types import UNKNOWN

if TYPE_CHECKING:
    import pandas as pd

    from evaluation.dataset.active_learning import Labelled
    from evaluation.dataset.sections import Collection

_EPILOG = """\
example:
  python -m evaluation learning-curve --config experiments/quickstart.yaml --long-tail 0.72 --to curves/wares
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``learning-curve``."""
    command.description = (
        "The labels of the train split are hidden and given out step by step to a linear classifier on "
        "colours and edges, or on a gallery's vectors; accuracy is measured on validation and test together."
    )
    command.epilog = _EPILOG
    add_data_arguments(command)
    command.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="for the curve as PNG, and the tables"
    )
    command.add_argument("--task", type=composed, help="to train on (default: the main task)")
    command.add_argument(
        "--by", nargs="+", choices=STRATEGIES, default=["entropy", "margin", "coreset"], help="strategies"
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


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Compute the curves, write them, and print a summary.

    Raises:
        UserError: for every mistake in what was asked or in the data.
    """
    from evaluation.dataset.active_learning import Schedule, curve_figure, learning_curves, summarised
    from evaluation.dataset.sections import main_task
    from evaluation.report.figures import save_figure
    from vitrail.files import write_csv

    if options.seeds < 1 or not 0 < options.long_tail <= 1:
        raise UserError("learning_curve: --seeds must be at least 1, and --long-tail above 0 and up to 1")
    collection = collection_of(data_of("learning_curve", options, rest))
    task = main_task(collection, options.task)
    if task is None:
        raise UserError(f"{collection.name}: has no labels, so there are no curves")
    pool, test = _pool_and_test(collection, task, options)
    schedule = Schedule(options.start, options.step, options.rounds)
    curves = learning_curves(pool, test, options.by, range(options.seeds), schedule)
    summary = summarised(curves)
    save_figure(curve_figure(curves, _title(collection, task, pool, options)), options.to / "learning_curve.png")
    for name, table in {"learning_curve": curves, "summary": summary}.items():
        write_csv(options.to / f"{name}.csv", table)
    sys.stdout.write(_markdown(summary, len(pool.labels), len(test.labels)))


def long_tailed(labels: NDArray[np.int64], groups: NDArray[np.object_], ratio: float) -> NDArray[np.int64]:
    """Rows of a pool in which each class has ``ratio`` times the groups of the one before, at least two.

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
    from evaluation.dataset.active_learning import Labelled

    rows, features = _features(collection, options.gallery)
    labels, splits = collection.targets[task][rows], collection.splits[rows]
    known = labels != UNKNOWN
    pool, test = np.flatnonzero(known & (splits == "train")), np.flatnonzero(known & (splits != "train"))
    if options.long_tail < 1 and len(pool):
        pool = pool[long_tailed(labels[pool], collection.groups[rows[pool]], options.long_tail)]
    return Labelled(features[pool], labels[pool]), Labelled(features[test], labels[test])


def _features(collection: Collection, gallery: str | None) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows that have features, and the features."""
    from evaluation.commands.explore import gallery_vectors
    from evaluation.dataset.features import pixel_features
    from vitrail.console import tracked

    if gallery is not None:
        return gallery_vectors(collection, gallery)[:2]

    if not len(collection.usable):
        raise UserError(f"{collection.name}: has no image that can be read")
    rows = collection.usable.tolist()
    features = [pixel_features(collection.read(row)) for row in tracked(rows, "reading images", len(rows))]
    return collection.usable, np.stack(features)


def _title(collection: Collection, task: str, pool: Labelled, options: argparse.Namespace) -> str:
    tail = f", long tail {options.long_tail:g}" if options.long_tail < 1 else ""
    return f"{collection.name}, {task}: a pool of {len(pool.labels):,} images{tail}; {options.seeds} seeds"


def _markdown(summary: pd.DataFrame, pool: int, test: int) -> str:
    """A Markdown table with the sentence that belongs to it."""
    lines = [
        f"Mean accuracy over all steps; pool {pool:,}, measured on {test:,} images; difference to random choice, "
        "paired by seed, with its 95 % Student interval over seeds.",
        "",
        "| chosen by | accuracy | after the last step | ahead of random [95 %] | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in summary.to_dict("records"):
        interval = "" if np.isnan(row["low"]) else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
        ahead = "" if row["strategy"] == "random" else f"{row['ahead']:+.3f}{interval}"
        lines.append(
            f"| {row['strategy']} | {row['accuracy']:.3f} | {row['last']:.3f} | {ahead} | {row['verdict']} |"
        )  # fmt: skip
    return "\n".join(lines) + "\n"
