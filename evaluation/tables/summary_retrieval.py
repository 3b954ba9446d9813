"""How well the images and texts of tested runs found each other, one row a run and direction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from evaluation.retrieval import BOTH, Row, read_report, with_interval
from evaluation.tables.summary import markdown_rows
from vitrail.console import text_table
from vitrail.errors import UserError
from vitrail.runs import Run

if TYPE_CHECKING:
    from rich.table import Table

_ARROWS = {"image_to_text": "image → text", "text_to_image": "text → image"}


class RunScores(NamedTuple):
    """What a run's test (or validation) wrote of its retrieval.

    Attributes:
        run: name of the experiment and of the run directory.
        split: that was evaluated.
        rows: of the report.
    """

    run: str
    split: str
    rows: list[Row]


def read_run(run: Path, split: str) -> RunScores:
    """``reports/<split>_retrieval.csv`` of a run directory.

    Raises:
        UserError: there is no such run or file, or it cannot be read.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory; give the directory that `fit` or `test` printed")
    path = run / Run.REPORTS / f"{split}_retrieval.csv"
    if not path.is_file():
        stage = {"val": "validate"}.get(split, "test")
        raise UserError(
            f"{path}: no such file; `python -m experiments {stage} --ckpt_path {run}/checkpoints/best.ckpt` writes it "
            "where images have texts"
        )
    return RunScores("/".join(run.resolve().parts[-2:]), split, read_report(path))


def scores_rows(runs: Sequence[RunScores]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each run and direction; the one number of both directions together is left out."""
    shown = [(run, [row for row in run.rows if row.direction != BOTH]) for run in runs]
    metrics = list(dict.fromkeys(row.metric for _, rows in shown for row in rows))
    cells = []
    for run, rows in shown:
        for direction in dict.fromkeys(row.direction for row in rows):
            own = {row.metric: row for row in rows if row.direction == direction}
            n = str(next(iter(own.values())).n)
            scores = [with_interval(own[metric]) if metric in own else "–" for metric in metrics]
            cells.append([run.run, run.split, _ARROWS.get(direction, direction), n, *scores])
    named = [metric.replace("_", " ") for metric in metrics]
    return ["run", "split", "direction", "n", *(f"{name} [95 %]" for name in named)], cells


def markdown_table(runs: Sequence[RunScores]) -> str:
    """The same as a Markdown table."""
    return markdown_rows(*scores_rows(runs))


def rich_table(runs: Sequence[RunScores]) -> Table:
    """The same for the terminal."""
    return text_table(*scores_rows(runs), ("run", "split", "direction"))


def as_json(runs: Sequence[RunScores]) -> str:
    """Every number of every run as a JSON list of objects."""
    return json.dumps(
        [{"run": run.run, "split": run.split, **row._asdict()} for run in runs for row in run.rows], indent=2
    )
