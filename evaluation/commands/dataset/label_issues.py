"""``python -m evaluation label-issues RUN``: labels that the predictions of validation and test disagree with.

What it writes is a table of corrections: delete the rows where the label is right, and give the rest to ``relabel``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.files import write_csv, write_text_atomically
from vitrail.predictions import Predictions
from vitrail.runs import Run

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 10
_COLUMNS = ["image", "split", "old", "label", "score"]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``label-issues``."""
    command.description = (
        "Suspects labels by confident learning from predictions of images that the run was not trained on (val and "
        "test), of multi-label tasks each label, of regression tasks numbers with a residual far from the others."
    )
    command.add_argument("run", metavar="RUN", help="run directory")
    command.add_argument("--split", default="", metavar="S", help="default: val and test, as far as predicted")
    command.add_argument("--task", help="default: all tasks")
    command.add_argument("--to", type=Path, metavar="FILE", help="write all of them as corrections (.csv) for relabel")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Print the suspected labels, and write them where that is asked for.

    Raises:
        UserError: predictions of the training split, or none at all.
    """
    import pandas as pd

    opened = Run(options.run)
    if options.to is not None and options.to.suffix != ".csv":
        raise UserError(f"--to {options.to}: must end in .csv")
    splits = _splits(opened, options.split)
    frame = pd.concat([_of_split(opened, split, options.task) for split in splits], ignore_index=True)
    _leave(opened, splits, options.task, frame)
    copies = (opened.record.get("evaluation") or {}).get("in_training")
    if copies:
        sys.stdout.write(f"Warning: {copies} of the images are in the training split; their labels look right.\n")
    for task, own in frame.groupby("task", sort=False):
        head = own.head(_SHOWN)
        rows = [[*map(str, row[:-1]), f"{row[-1]:.3f}"] for row in head[_COLUMNS].itertuples(index=False, name=None)]
        title = f"{task}: {len(own):,} suspected labels" + (f", the first {_SHOWN}" if len(own) > _SHOWN else "")
        Table(["image", "split", "label", "suggested", "score"], rows, left=None, title=title).show()
    if not len(frame):
        sys.stdout.write("no label is suspected\n")
    if options.to is not None:
        write_csv(options.to, frame)
        sys.stdout.write(f"{options.to}: {len(frame):,} corrections; delete those where the label is right\n")


def _leave(opened: Run, splits: Sequence[str], task: str | None, frame: pd.DataFrame) -> None:
    """Write what the report of the run shows into it."""
    content = {
        "measured": time.strftime("%Y-%m-%d %H:%M"),
        "splits": splits,
        "task": task,
        "rows": frame.to_dict("records"),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_text_atomically(opened.path / Run.LABEL_ISSUES, text + "\n")


def _splits(opened: Run, asked: str) -> list[str]:
    if asked == "train":
        raise UserError(
            "--split train: the run was trained on these images, so it repeats their wrong labels; take val or test, "
            "or cross-validation: python -m evaluation explore"
        )
    found = [asked] if asked else [split for split in opened.splits if split != "train"]
    if not found:
        raise UserError(f"{opened.path}: has no predictions of val or test; run python -m experiments test")
    return found


def _of_split(opened: Run, split: str, task: str | None) -> pd.DataFrame:
    import pandas as pd

    from evaluation.dataset.label_issues import suspects_of

    predictions: Predictions | None = opened.predictions(split)
    if predictions is None:
        raise UserError(f"{opened.path}: there are no predictions of {split}; splits are {', '.join(opened.splits)}")
    if task is not None and task not in predictions.tasks:
        raise UserError(f"--task {task}: must be one of {', '.join(predictions.tasks)}")
    rows = [
        (predictions.names[one.place], split, of, one.old, one.new, round(one.score, 4), "suspected by label-issues")
        for of in ([task] if task else predictions.tasks)
        for one in suspects_of(predictions, of)
    ]
    return pd.DataFrame(rows, columns=["image", "split", "task", "old", "label", "score", "note"])
