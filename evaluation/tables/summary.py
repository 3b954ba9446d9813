"""The table of results that the README shows: per run and task n, groups, majority baseline, accuracy and macro F1.

Every figure comes with a 95 % interval by group (see ``statistics``), and a result whose interval does not lie above
the majority baseline says so instead of being hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from evaluation.retrieval import BOTH, Row, read_report
from evaluation.retrieval import with_interval as score_with_interval
from evaluation.statistics import intervals as statistics
from evaluation.statistics.intervals import Interval
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.predictions import Predictions, read_predictions
from vitrail.runs import Run, read_class_counts
from vitrail.types import UNKNOWN

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


def summary_table(summaries: Sequence[TaskSummary]) -> Table:
    """One row per run and task."""
    values = [{**asdict(summary), "above_majority": summary.above_majority} for summary in summaries]
    return Table(COLUMNS, [_cells(one) for one in summaries], ("run", "split", "task", "note"), values=values)


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


def task_heading(summaries: Sequence[TaskSummary]) -> str:
    """A task with split and n, where all these summaries of it have the same; else without n."""
    split = {summary.split for summary in summaries}
    heading = ", ".join([summaries[0].task, *(split if len(split) == 1 else [])])
    sizes = {(summary.n, summary.groups) for summary in summaries}
    if len(sizes) > 1:
        return heading
    ((n, groups),) = sizes
    return f"{heading} (n {n}{'' if n == groups else f', {groups} objects'})"


def wide_table(summaries: Sequence[TaskSummary]) -> Table:
    """One row per run and one column per task: accuracies, below the majority baseline if all runs share it.

    A run whose n is another than that of the rest says so in its cell.
    """
    tasks = {task: [one for one in summaries if one.task == task] for task in dict.fromkeys(s.task for s in summaries)}
    headings = ["run", *(f"{task_heading(own)} [95 %]" for own in tasks.values())]
    rows = []
    baselines = [{(one.majority, one.majority_label) for one in own} for own in tasks.values()]
    if all(len(found) == 1 for found in baselines):
        rows.append(["majority", *map(_baseline, tasks.values())])
    for run in dict.fromkeys(summary.run for summary in summaries):
        rows.append([run, *(_wide_cell(run, own) for own in tasks.values())])
    return Table(headings, rows, None)


def _baseline(of_task: Sequence[TaskSummary]) -> str:
    """The majority baseline, and where its class does not come from training."""
    told = share(of_task[0].majority)
    return f"{told} (of the split itself)" if any(one.n and one.majority_source == "split" for one in of_task) else told


def _wide_cell(run: str, of_task: Sequence[TaskSummary]) -> str:
    found = next((summary for summary in of_task if summary.run == run), None)
    if found is None:
        return "–"
    told = with_interval(found.accuracy, found.accuracy_interval)
    told = f"{told}, checkpoint {found.checkpoint}" if found.checkpoint else told
    return told if len({summary.n for summary in of_task}) == 1 else f"{told}, n {found.n}"


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


def read_retrieval(run: Path, split: str) -> RunScores:
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
            f"{path}: no such file; `python -m experiments {stage} --ckpt_path {run / Run.BEST}` writes it "
            "where images have texts"
        )
    return RunScores("/".join(run.resolve().parts[-2:]), split, read_report(path))


def retrieval_table(runs: Sequence[RunScores]) -> Table:
    """One row per run and direction; the one number of both directions together is left out."""
    shown = [(run, [row for row in run.rows if row.direction != BOTH]) for run in runs]
    metrics = list(dict.fromkeys(row.metric for _, rows in shown for row in rows))
    cells = []
    for run, rows in shown:
        for direction in dict.fromkeys(row.direction for row in rows):
            own = {row.metric: row for row in rows if row.direction == direction}
            n = str(next(iter(own.values())).n)
            scores = [score_with_interval(own[metric]) if metric in own else "–" for metric in metrics]
            cells.append([run.run, run.split, _ARROWS.get(direction, direction), n, *scores])
    named = [metric.replace("_", " ") for metric in metrics]
    columns = ["run", "split", "direction", "n", *(f"{name} [95 %]" for name in named)]
    values = [{"run": run.run, "split": run.split, **row._asdict()} for run in runs for row in run.rows]
    return Table(columns, cells, ("run", "split", "direction"), values=values)
