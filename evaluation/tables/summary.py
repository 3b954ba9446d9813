"""The table of results that the README shows: per run and task n, groups, majority baseline, accuracy and macro F1.

Every figure comes with a 95 % interval by group (see ``statistics``), and a result whose interval does not lie above
the majority baseline says so instead of being hidden.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evaluation.statistics import intervals as statistics
from evaluation.statistics.intervals import Interval
from vitrail.console import text_table
from vitrail.errors import UserError
from vitrail.predictions import Predictions, read_predictions
from vitrail.runs import Run, read_class_counts
from vitrail.types import UNKNOWN

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("run", "split", "task", "n", "groups", "majority", "accuracy [95 %]", "macro F1 [95 %]", "note")


@dataclass(frozen=True)
class TaskSummary:
    """What is known of one task of one run; shares are 0 to 1, higher is better, NaN where nothing is known.

    Attributes:
        run: Name of the experiment and of the run directory.
        split: Split that was predicted.
        task: Name of the task.
        n: Samples with a known target.
        groups: Different groups (objects, products) among them; the intervals rest on these.
        majority: Accuracy of always answering the majority class.
        majority_source: Split whose class counts chose the majority class.
        majority_label: Name of that class, empty where n is 0.
        accuracy: Share of right answers.
        accuracy_interval: By group bootstrap.
        accuracy_wilson: The cross-check, ``statistics.clustered_wilson``.
        f1_macro: Mean F1 over classes.
        f1_macro_interval: By group bootstrap.
        f1_weighted: Mean F1 weighted by support.
        f1_weighted_interval: By group bootstrap.
        top3_accuracy: Share of samples whose target is among the three largest logits.
        top3_interval: By group bootstrap.
        unanswered: Samples with a known target for which the model predicts no class; they count as wrong.
        checkpoint: Name of the checkpoint that was judged where it is another one than ``best``, else empty.
    """

    run: str
    split: str
    task: str
    n: int
    groups: int
    majority: float
    majority_source: Literal["train", "split"]
    majority_label: str
    accuracy: float
    accuracy_interval: Interval
    accuracy_wilson: Interval
    f1_macro: float
    f1_macro_interval: Interval
    f1_weighted: float
    f1_weighted_interval: Interval
    top3_accuracy: float
    top3_interval: Interval
    unanswered: int
    checkpoint: str = ""

    @property
    def above_majority(self) -> bool:
        """True where the whole interval of accuracy lies above the majority baseline."""
        return self.accuracy_interval.low > self.majority

    @property
    def note(self) -> str:
        """What a reader must know next to the numbers, empty where there is nothing."""
        if not self.n:
            return "no known targets"
        notes = [] if self.above_majority else ["not above majority"]
        if self.majority_source == "split":
            notes.append("majority of the split itself")
        if self.unanswered:
            notes.append(f"{self.unanswered} without a prediction")
        if self.groups == 1:
            notes.append("one group: its interval is a guess")
        if self.checkpoint:
            notes.append(f"of checkpoint {self.checkpoint}, not best")
        return "; ".join(notes)


def summarise(
    predictions: Predictions,
    class_counts: Mapping[str, Sequence[int]],
    run: str,
    split: str,
    *,
    n_resamples: int = 5_000,
    seed: int = 0,
) -> list[TaskSummary]:
    """Summarise each task of one set of predictions.

    Args:
        predictions: Of one split.
        class_counts: Samples of each class in the train split, by task; a task may be missing.
        run: Name for the table.
        split: Name for the table.
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    return [
        _summarise_task(predictions, task, class_counts.get(task), run=run, split=split, bootstrap=(n_resamples, seed))
        for task in predictions.tasks
    ]


def summarise_run(run: Path, split: str = "test") -> list[TaskSummary]:
    """Summarise ``predictions/<split>.parquet`` of a run directory, with the class counts of its ``run.json``.

    Raises:
        UserError: The directory or its predictions are missing, or a file cannot be read.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory; give the directory that `fit` or `test` printed")
    predictions = read_predictions(run / Run.PREDICTIONS / f"{split}.parquet")
    counts = read_class_counts(run / Run.RECORD, predictions.tasks)
    rows = summarise(predictions, counts, "/".join(run.resolve().parts[-2:]), split)
    other = Run(run).other_checkpoint(split)
    return [replace(row, checkpoint=other) for row in rows] if other else rows


def rich_table(summaries: Sequence[TaskSummary]) -> Table:
    """The summaries as a table for the terminal."""
    return text_table(COLUMNS, [_cells(summary) for summary in summaries], ("run", "split", "task", "note"))


def markdown_table(summaries: Sequence[TaskSummary]) -> str:
    """The summaries as a Markdown table for the README."""
    return markdown_rows(COLUMNS, [_cells(summary) for summary in summaries])


def markdown_rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of these cells."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def as_json(summaries: Sequence[TaskSummary]) -> str:
    """The summaries as a JSON list of objects; NaN becomes null."""
    rows = [{**asdict(summary), "above_majority": summary.above_majority} for summary in summaries]
    return json.dumps(plain(rows), indent=2)


def _summarise_task(
    predictions: Predictions,
    task: str,
    counts: Sequence[int] | None,
    *,
    run: str,
    split: str,
    bootstrap: tuple[int, int],
) -> TaskSummary:
    rows = statistics.known(predictions.targets[task])
    targets, logits, groups = predictions.targets[task][rows], predictions.logits[task][rows], predictions.groups[rows]
    predicted = predictions.predicted(task)[rows]
    baseline = statistics.Baseline(math.nan, 0, "split" if counts is None else "train")
    intervals = [Interval(math.nan, math.nan)] * 4
    if len(rows):
        baseline = statistics.majority_baseline(targets, counts)
        scores = (
            statistics.accuracy_statistic(targets, predicted),
            statistics.f1_statistic(targets, predicted),
            statistics.f1_statistic(targets, predicted, "weighted"),
            statistics.share_statistic(statistics.in_top_k(targets, logits, 3)),
        )
        intervals = [statistics.group_bootstrap(score, groups, bootstrap[0], seed=bootstrap[1]) for score in scores]
    return TaskSummary(
        run=run,
        split=split,
        task=task,
        n=len(rows),
        groups=len(set(groups.tolist())),
        majority=baseline.accuracy,
        majority_source=baseline.source,
        majority_label=str(predictions.tasks[task][baseline.label]) if len(rows) else "",
        accuracy=statistics.accuracy(targets, predicted),
        accuracy_interval=intervals[0],
        accuracy_wilson=statistics.clustered_wilson(targets == predicted, groups),
        f1_macro=statistics.f1(targets, predicted),
        f1_macro_interval=intervals[1],
        f1_weighted=statistics.f1(targets, predicted, "weighted"),
        f1_weighted_interval=intervals[2],
        top3_accuracy=statistics.top_k_accuracy(targets, logits, 3),
        top3_interval=intervals[3],
        unanswered=int((predicted == UNKNOWN).sum()),
    )


def _cells(summary: TaskSummary) -> list[str]:
    return [
        summary.run,
        summary.split,
        summary.task,
        str(summary.n),
        str(summary.groups),
        share(summary.majority),
        with_interval(summary.accuracy, summary.accuracy_interval),
        with_interval(summary.f1_macro, summary.f1_macro_interval),
        summary.note,
    ]


def share(value: float) -> str:
    """Three decimals, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def with_interval(value: float, interval: Interval) -> str:
    """A share and its interval, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def plain(value: Any) -> Any:
    """The value as JSON has it: tuples become lists, NaN becomes null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
