"""``vitrail slices RUN``: a score on parts of a split, next to the rest: by column, by condition, or the worst ones."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

from evaluation.commands.compare import add_forms
from evaluation.statistics.intervals import FEW_GROUPS
from evaluation.statistics.scores import MAIN, TESTED, checked_names, heading, is_defined
from evaluation.statistics.slices import (
    OF_OUTPUTS,
    SMALLEST,
    Columns,
    SliceScore,
    column_slices,
    rows_where,
    sample_columns,
    searched_slices,
    slice_scores,
)
from evaluation.tables.summary import number_text, predictions_of, score_text
from vitrail.console import Table, without_nan
from vitrail.errors import UserError
from vitrail.files import write_text_atomically
from vitrail.runs import Run
from vitrail.trust import file_name

_EPILOG = """\
examples:
  vitrail slices runs/NAME/TIME                                   # the worst slices of all columns and pairs
  vitrail slices runs/NAME/TIME --by store --by "confidence"
  vitrail slices runs/NAME/TIME --where "width * height < 1e5" --where "store = 'north' AND confidence < .5"
"""
_SHOWN = 20


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``slices``."""
    command.epilog = _EPILOG
    command.description = (
        "Scores parts of a split and compares each with the rest. Columns are targets and predictions of the tasks, "
        "confidence, and where the run's data are at hand width, height and the columns of their table."
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run directory")
    command.add_argument("--split", default="test", help="split whose predictions are read (default: test)")
    command.add_argument("--task", type=partial(normalize, "NFC"), default="", help="(default: the first)")
    command.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="COLUMN",
        help="a slice for each value, of many numbers for quarters",
    )
    command.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="such as \"store = 'north' AND confidence < .5\"",
    )
    command.add_argument(
        "--search",
        action="store_true",
        help="all columns of the data and pairs of them (the default without --by and --where)",
    )
    command.add_argument("--table", type=Path, metavar="FILE", help="further columns, with the samples' names in one")
    command.add_argument("--metric", default="", metavar="NAME", help="score, as of summary --metrics (default: main)")
    command.add_argument("--calibrated", action="store_true", help="calibrate outputs before")
    command.add_argument("--all", action="store_true", help=f"print all slices, not the {_SHOWN} worst")
    add_forms(command)


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Score the slices and print them, the worst first.

    Raises:
        UserError: there are no predictions, columns or scores as named, or no slice with enough samples.
    """
    opened = Run(options.run)
    predictions = predictions_of(opened, options.split, calibrated=options.calibrated)
    task = options.task or next((name for name in predictions.tasks if len(predictions.known(name))), "")
    if task not in predictions.tasks:
        raise UserError(f"--task {task}: must be one of {', '.join(predictions.tasks)}")
    kind = predictions.kind(task)
    metric = checked_names([options.metric])[0] if options.metric else MAIN[kind]
    if not is_defined(metric, kind):
        raise UserError(f"--metric {metric}: '{task}' is {kind}, which has no such score")
    columns, notes = sample_columns(opened, predictions, task, options.table)
    slices = _slices(options, columns)
    found = slice_scores(predictions, task, slices, metric)
    if not found:
        raise UserError(f"slices: no sample with a known target of '{task}' is in any slice")
    values = _values(found, task, metric)
    name = f"slices_{options.split}_{file_name(task)}.json"
    write_text_atomically(opened.path / Run.REPORTS / name, json.dumps(without_nan(values), indent=1) + "\n")
    _print(found, values, options, metric, [*notes, *_notes(found, options, metric)])


def _slices(options: argparse.Namespace, columns: Columns) -> dict[str, NDArray[np.bool_]]:
    slices: dict[str, NDArray[np.bool_]] = {}
    for name in options.by:
        if name not in columns:
            raise UserError(f"--by {name}: must be one of {', '.join(columns)}, or write a condition with --where")
        slices |= column_slices(name, columns[name])
    slices |= {text: rows_where(text, columns) for text in options.where}
    if options.search or not slices:
        own = {name: values for name, values in columns.items() if not name.startswith(OF_OUTPUTS) and name != "name"}
        slices = searched_slices(own) | slices
    if not slices:
        raise UserError(f"slices: no column has {SMALLEST} samples of one value; name conditions by --where")
    return slices


def _notes(found: Sequence[SliceScore], options: argparse.Namespace, metric: str) -> list[str]:
    notes = []
    if metric in TESTED:
        notes.append(
            f"p: equal to the rest, permutations of whole groups, corrected for {len(found)} slices (Holm); "
            "differences are to all other samples."
        )
    else:
        notes.append(f"{heading(metric)} is no mean over samples, so without a test; intervals are not corrected.")
    if options.search or not (options.by or options.where):
        notes.append(
            "The worst of many slices looks worse than it is: evaluate it on other data before you act on its score."
        )
    if any(one.note for one in found):
        notes.append(f"Slices of fewer than {FEW_GROUPS} groups are last: their intervals may be too narrow.")
    return notes


def _values(found: Sequence[SliceScore], task: str, metric: str) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "metric": metric,
            "slice": one.name,
            "n": one.n,
            "groups": one.groups,
            "value": one.score.value,
            "interval": one.score.interval,
            "rest": one.rest,
            "difference": one.difference,
            "p_value": one.p_value,
        }
        for one in found
    ]


def _print(
    found: Sequence[SliceScore],
    values: list[dict[str, Any]],
    options: argparse.Namespace,
    metric: str,
    notes: list[str],
) -> None:
    shown = found if options.all or options.json else found[:_SHOWN]
    cells = [
        [
            one.name,
            str(one.n),
            str(one.groups),
            score_text(metric, one.score),
            number_text(metric, one.rest),
            "–" if np.isnan(one.difference) else f"{one.difference:+.3f}",
            "–" if np.isnan(one.p_value) else f"{one.p_value:.3g}",
            one.note,
        ]
        for one in shown
    ]
    columns = ("slice", "n", "groups", f"{heading(metric)} [95 %]", "rest", "difference", "p", "note")
    table = Table(columns, cells, ("slice", "note"), f"{values[0]['task']}, {options.split}", values=values)
    table.show(as_markdown=options.markdown, as_json=options.json)
    if options.json:
        return
    mark = "* " if options.markdown else ""
    if len(shown) < len(found):
        notes = [f"{len(found) - len(shown)} more slices: --all prints them.", *notes]
    sys.stdout.write("\n" * bool(options.markdown) + "".join(f"{mark}{note}\n" for note in notes))
