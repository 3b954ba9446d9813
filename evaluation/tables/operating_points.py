"""Operating points: thresholds chosen on validation for a goal such as ``recall>=.95``, and what they reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.statistics.curves import Goal, Side, choose_threshold, parsed_goal, rates, sides_of
from evaluation.statistics.intervals import Estimate
from evaluation.tables.summary import with_interval
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.predictions import OperatingPoint, Predictions
from vitrail.types import CLASS_KINDS

Row = dict[str, Any]


def choose_point(validation: Predictions, goal: str, task: str = "", positive: str = "") -> dict[str, OperatingPoint]:
    """Choose the thresholds of one task.

    Args:
        validation: calibrated predictions.
        goal: such as ``recall>=.95``.
        task: its name, by default the first one with classes or labels.
        positive: class that the goal is about; by default the last of two classes, or every label.

    Returns:
        The point by task; labels that do not reach the goal on validation have no threshold.

    Raises:
        UserError: the goal is none, there is no such task or class, or no threshold reaches the goal.
    """
    wanted = parsed_goal(goal)
    having = [name for name in validation.tasks if validation.kind(name) in (*CLASS_KINDS, "multi_label")]
    task = task or next(iter(having), "")
    if task not in having:
        raise UserError(f"--task {task}: must be a task with classes or labels: {', '.join(having) or '(none)'}")
    names = [str(name) for name in validation.tasks[task]]
    one_class = validation.kind(task) in CLASS_KINDS
    if wanted.abstains:
        if not one_class:
            raise UserError(
                f"--operating-point {goal}: '{task}' has labels; give recall, precision, fpr or specificity"
            )
        thresholds = _reached(wanted, {"": _confidences(validation, task)})
    else:
        if one_class and not positive and len(names) > 2:
            raise UserError(
                f"--operating-point {goal}: '{task}' has {len(names)} classes; say which by --positive CLASS"
            )
        positives = [positive] if positive else names[-1:] if one_class else names
        if missing := [name for name in positives if name not in names]:
            raise UserError(f"--positive {missing[0]}: must be one of {', '.join(names)}")
        sides = sides_of(validation, task)
        thresholds = _reached(wanted, {name: sides[name] for name in positives})
    if not thresholds:
        raise UserError(f"--operating-point {goal}: no threshold of '{task}' reaches it on validation; ask for less")
    return {task: OperatingPoint(str(wanted), thresholds)}


def _reached(goal: Goal, sides: Mapping[str, Side]) -> dict[str, float]:
    found = {name: choose_threshold(goal, side.positive, side.scores) for name, side in sides.items() if len(side[0])}
    return {name: threshold for name, threshold in found.items() if threshold is not None}


def _confidences(predictions: Predictions, task: str) -> Side:
    own = predictions.take(predictions.known(task))
    right = own.predicted(task) == own.targets[task]
    return Side(right, own.probabilities(task).max(axis=1), own.groups)


def point_rows(points: Mapping[str, OperatingPoint], splits: Mapping[str, Predictions]) -> list[Row]:
    """Return what the points reach on each split of calibrated predictions, with intervals by group."""
    rows = []
    for task, point in points.items():
        for name, threshold in point.thresholds.items():
            for split, predictions in splits.items():
                side = sides_of(predictions, task)[name] if name else _confidences(predictions, task)
                found = rates(side.positive, side.scores >= threshold, side.groups, abstains=not name)
                fixed = {"task": task, "class": name, "point": point.goal, "threshold": threshold, "split": split}
                rows.append({**fixed, "n": len(side.scores), "positive": int(side.positive.sum()), **found})
    return rows


def point_tables(rows: Sequence[Row]) -> list[Table]:
    """Return a table of points of classes and labels, and one of those below which nothing is predicted."""
    tables = []
    for shown in (("recall", "precision", "fpr"), ("accuracy", "coverage")):
        if own := [row for row in rows if shown[0] in row]:
            counted = "right" if "accuracy" in shown else "positive"
            columns = ("task", "class", "point", "threshold", "split", "n", counted)
            cells = [[*_texts(row), *(_cell(row[name]) for name in shown)] for row in own]
            headings = [f"{'FPR' if name == 'fpr' else name} [95 %]" for name in shown]
            tables.append(Table([*columns, *headings], cells, ("task", "class", "point", "split")))
    return tables


def _texts(row: Row) -> list[str]:
    fixed = [row["task"], row["class"] or "(confidence)", row["point"], f"{row['threshold']:.4g}", row["split"]]
    return [*fixed, str(row["n"]), str(row["positive"])]


def _cell(found: Estimate) -> str:
    return "–" if np.isnan(found.value) else with_interval(*found)
