"""Compared runs as texts by column, the same for terminal, Markdown and page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from evaluation.comparison_table import ComparedRow, Cost
from evaluation.statistics import Estimate, Interval
from evaluation.summary import with_interval

COST_COLUMNS = ("parameters", "train min", "ms/picture")
"""Those of ``cells`` that are the same for all tasks."""


def cells(rows: Sequence[ComparedRow], costs: dict[str, Cost]) -> list[dict[str, str]]:
    """The rows as texts by column, the same for terminal, Markdown and page."""
    return [_cells(row, costs[row.side]) for row in rows]


def number(value: float, form: str) -> str:
    """A number in a form, or a dash for NaN."""
    return "–" if math.isnan(value) else format(value, form)


def _cells(row: ComparedRow, cost: Cost) -> dict[str, str]:
    joined, made = row.joined, row.comparison
    several = len(joined.runs) > 1
    spread = f"{number(joined.accuracy.mean, '.3f')} ± {number(joined.accuracy.std, '.3f')}" if several else "–"
    return {
        "run": row.side,
        "runs": f"{len(joined.runs)} ({joined.kind})" if several else "1",
        "task": joined.task,
        "n": str(joined.n),
        "groups": str(joined.groups),
        "no prediction": f"{joined.unanswered:g}" if joined.unanswered else "–",
        "accuracy [95 %]": with_interval(*joined.accuracy.pooled),
        "mean ± sd of runs": spread,
        "difference [95 %]": "–" if made is None else _difference(made.accuracy_difference),
        "over seeds [95 %]": "–" if made is None else _signed(made.over_seeds),
        "p": number(row.p_value, ".3g"),
        "McNemar p": number(row.mcnemar_p, ".3g"),
        "verdict": row.verdict,
        "macro F1 [95 %]": with_interval(*joined.f1_macro.pooled),
        "its difference [95 %]": "–" if made is None else _difference(made.f1_macro_difference),
        "ECE [95 %]": _error(row.calibration),
        "calibrated ECE [95 %]": "–" if row.calibrated is None else _error(row.calibrated),
        **dict(zip(COST_COLUMNS, _costs(cost), strict=True)),
    }


def _costs(cost: Cost) -> tuple[str, str, str]:
    return number(cost.parameters, ",.0f"), number(cost.minutes, ".1f"), number(cost.latency, ".2f")


def _error(estimate: Estimate) -> str:
    """With its interval, where there is one."""
    return number(estimate.value, ".3f") if math.isnan(estimate.interval.low) else with_interval(*estimate)


def _difference(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "–"
    return f"{estimate.value:+.3f} {_signed(estimate.interval)}"


def _signed(interval: Interval) -> str:
    return "–" if math.isnan(interval.low) else f"[{interval.low:+.3f}, {interval.high:+.3f}]"


def shown_columns(table: list[dict[str, str]]) -> list[dict[str, str]]:
    """Without the columns that say nothing in any row."""
    said = [name for name in table[0] if any(row[name] != "–" for row in table)]
    if all(row["runs"] == "1" for row in table):
        said.remove("runs")
    return [{name: row[name] for name in said} for row in table]


def parts(table: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Tables that a window has room for: accuracy and the verdict on it, the other scores, and cost, a row a run.

    Joined runs have more to say of both, so their differences are a table of their own.
    """
    names = list(table[0])
    end = names.index("verdict") + 1
    cost = [name for name in names if name in COST_COLUMNS]
    columns = {"accuracies": names[:end]}
    if "runs" in names:
        middle = names.index("mean ± sd of runs") + 1
        columns = {"accuracies": names[:middle], "differences": ["run", "task", *names[middle:end]]}
    columns["other_scores"] = ["run", "task", *(name for name in names[end:] if name not in cost)]
    if cost:
        columns["cost"] = ["run", *cost]
    rows = {part: [tuple((name, row[name]) for name in own) for row in table] for part, own in columns.items()}
    # A run's cost is the same on all tasks.
    return {part: [dict(row) for row in dict.fromkeys(own)] for part, own in rows.items()}
