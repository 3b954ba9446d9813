"""Summaries of several runs with one row a run and one column a task, for a page that has room for little else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evaluation.tables.summary import TaskSummary, markdown_rows, share, with_interval
from vitrail.console import text_table

if TYPE_CHECKING:
    from rich.table import Table


def task_heading(summaries: Sequence[TaskSummary]) -> str:
    """A task with split and n, where all these summaries of it have the same; else without n."""
    split = {summary.split for summary in summaries}
    heading = ", ".join([summaries[0].task, *(split if len(split) == 1 else [])])
    sizes = {(summary.n, summary.groups) for summary in summaries}
    if len(sizes) > 1:
        return heading
    ((n, groups),) = sizes
    return f"{heading} (n {n}{'' if n == groups else f', {groups} objects'})"


def wide_rows(summaries: Sequence[TaskSummary]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: accuracies, below the majority baseline where that is the same for all runs.

    A run whose n is another than that of the rest says so in its cell.
    """
    tasks = {task: [one for one in summaries if one.task == task] for task in dict.fromkeys(s.task for s in summaries)}
    headings = ["run", *(f"{task_heading(own)} [95 %]" for own in tasks.values())]
    rows = []
    baselines = [{(one.majority, one.majority_label) for one in own} for own in tasks.values()]
    if all(len(found) == 1 for found in baselines):
        rows.append(["majority", *map(_baseline, tasks.values())])
    for run in dict.fromkeys(summary.run for summary in summaries):
        rows.append([run, *(_cell(run, own) for own in tasks.values())])
    return headings, rows


def markdown_table(summaries: Sequence[TaskSummary]) -> str:
    """The same as a Markdown table."""
    return markdown_rows(*wide_rows(summaries))


def rich_table(summaries: Sequence[TaskSummary]) -> Table:
    """The same for the terminal."""
    headings, rows = wide_rows(summaries)
    return text_table(headings, rows, headings)


def _baseline(of_task: Sequence[TaskSummary]) -> str:
    """The majority baseline, and where its class does not come from training."""
    told = share(of_task[0].majority)
    return f"{told} (of the split itself)" if any(one.n and one.majority_source == "split" for one in of_task) else told


def _cell(run: str, of_task: Sequence[TaskSummary]) -> str:
    found = next((summary for summary in of_task if summary.run == run), None)
    if found is None:
        return "–"
    told = with_interval(found.accuracy, found.accuracy_interval)
    told = f"{told}, checkpoint {found.checkpoint}" if found.checkpoint else told
    return told if len({summary.n for summary in of_task}) == 1 else f"{told}, n {found.n}"
