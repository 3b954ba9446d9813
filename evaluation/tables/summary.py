"""The table of results: per run and task n, groups, scores with intervals by group, and a constant prediction's scores.

A result whose interval is not better than always predicting the same (the majority class) has a note. Runs of one
experiment that differ in seed or fold can be joined (see ``statistics.pooled`` for their two intervals).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.retrieval import BOTH, Row, read_report
from evaluation.retrieval import with_interval as score_with_interval
from evaluation.statistics import intervals as statistics
from evaluation.statistics.intervals import Estimate, Interval, Mean
from evaluation.statistics.pooled import JoinedRuns, join_runs
from evaluation.statistics.scores import (
    IN_UNITS,
    LOWER_IS_BETTER,
    MAIN,
    NAMES,
    ConstantPrediction,
    Score,
    TrainTargets,
    constant_prediction,
    few_large_errors,
    heading,
    is_defined,
    names_of,
    scores_of,
    small_labels,
)
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.predictions import Predictions, read_predictions
from vitrail.runs import Run, read_class_counts
from vitrail.types import CLASS_KINDS, UNKNOWN, TaskKind

SHOWN: dict[TaskKind, tuple[str, ...]] = {**NAMES, "single_label": ("accuracy", "f1_macro")}
"""Scores of each kind that tables show where none are named."""

_CONSTANT: dict[TaskKind, str] = {
    "single_label": "majority class",
    "ordinal": "majority or median class",
    "multi_label": "labels by prevalence",
    "regression": "median or mean",
}
"""What is predicted for every image in the row of the constant prediction."""

_NOTHING = Estimate(math.nan, Interval(math.nan, math.nan))


def shown(kind: TaskKind, metrics: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the scores that tables show of a kind: the usual ones, or those of ``metrics`` that it has."""
    own = tuple(name for name in metrics if is_defined(name, kind))
    return own or ((MAIN[kind],) if metrics else SHOWN[kind])


@dataclass(frozen=True)
class TaskSummary:
    """What is known of one task of one run; NaN where nothing is known.

    Attributes:
        run: name of the experiment and of the run directory.
        split: that was predicted.
        task: its name.
        kind: of the task.
        n: samples with a known target.
        groups: different groups (objects, products) among them; the intervals rest on these.
        scores: by name, the main one first (``statistics.scores``), each with its interval by group.
        constant: scores of always predicting the same, as far as they are defined.
        majority_source: split that the constant prediction was chosen on.
        majority_label: what it is for the main score, such as the majority class; empty where n is 0.
        unanswered: samples with a known target for which the model predicts no class; they count as wrong.
        checkpoint: name of the checkpoint that was evaluated where it is another one than ``best``, else empty.
        restricted: number of classes that the model was restricted to (``evaluate --restrict-classes``); 0 for all.
        small_classes: classes or labels that too few groups show for the interval of macro F1 (of labels also of mAP)
            to hold its level.
        classes: classes or labels among the targets.
        few_errors: of regression, how many groups make half of the squared error; 0 where they are not few. Of classes
            and labels likewise of the NLL or Brier score.
        metrics: scores that were asked for; none for the usual ones.
        calibrated: whether the outputs are calibrated.
        thin_classes: of few classes, how many have too few groups for the interval of balanced accuracy.
    """

    run: str
    split: str
    task: str
    n: int
    groups: int
    scores: Mapping[str, Estimate]
    constant: Mapping[str, float]
    majority_source: Literal["train", "split"]
    majority_label: str
    unanswered: int
    kind: TaskKind = "single_label"
    checkpoint: str = ""
    restricted: int = 0
    small_classes: int = 0
    classes: int = 0
    few_errors: int = 0
    metrics: tuple[str, ...] = ()
    calibrated: bool = False
    thin_classes: int = 0

    @property
    def main(self) -> str:
        """Name of the main score."""
        return MAIN[self.kind]

    @property
    def main_score(self) -> Estimate:
        """The score by which models are compared."""
        return self.scores.get(self.main, _NOTHING)

    @property
    def accuracy(self) -> float:
        """Share of right predictions, of single-label and ordinal tasks."""
        return self.scores.get("accuracy", _NOTHING).value

    @property
    def accuracy_interval(self) -> Interval:
        """Its interval by group."""
        return self.scores.get("accuracy", _NOTHING).interval

    @property
    def f1_macro(self) -> float:
        """Mean F1 over classes or labels."""
        return self.scores.get("f1_macro", _NOTHING).value

    @property
    def majority(self) -> float:
        """Main score of always predicting the same: the accuracy of the majority class."""
        return self.constant.get(self.main, math.nan)

    @property
    def above_majority(self) -> bool:
        """True where the whole interval of the main score is better than always predicting the same."""
        low, high = self.main_score.interval
        return high < self.majority if self.main in LOWER_IS_BETTER else low > self.majority

    @property
    def note(self) -> str:
        """What a reader must know next to the numbers, empty where there is nothing."""
        if not self.n:
            return "no known targets"
        one_class = self.kind in CLASS_KINDS
        baseline = "majority" if one_class else "constant prediction"
        notes = [] if self.above_majority else [f"not above {baseline}" if one_class else f"not better than {baseline}"]
        if self.majority_source == "split":
            notes.append(f"{baseline} of the split itself")
        if self.unanswered:
            notes.append(f"{self.unanswered} without a prediction")
        if self.groups == 1:
            notes.append("one group: its interval is a guess" if one_class else "one group: no intervals")
        if self.small_classes:
            notes.append(small_classes_note(self.small_classes, self.classes, self.kind, self.metrics))
        if self.thin_classes and "balanced_accuracy" in self.metrics:
            notes.append(
                f"{self.thin_classes} of {self.classes} classes have fewer than {statistics.THIN_GROUPS} groups: the "
                "interval of balanced accuracy may be too narrow"
            )
        if self.few_errors:
            what, scores = ("squared error", "RMSE and R²") if self.kind == "regression" else ("loss", "NLL and Brier")
            notes.append(
                f"half of the {what} is of {self.few_errors} of {self.groups} groups: the intervals of {scores} may be "
                "too narrow"
            )
        if self.checkpoint:
            notes.append(f"of checkpoint {self.checkpoint}, not best")
        if self.restricted:
            notes.append(f"restricted to {self.restricted} of its classes")
        if self.calibrated:
            notes.append("calibrated")
        if without := [name for name in self.metrics if not is_defined(name, self.kind)]:
            notes.append(f"no {', '.join(map(heading, without))} of {self.kind} tasks")
        return "; ".join(filter(None, notes))

    def values(self) -> dict[str, Any]:
        """Return the numbers for JSON: each score as ``NAME`` and ``NAME_interval``, and ``constant_NAME``."""
        own = {name: value for name, value in asdict(self).items() if name not in ("scores", "constant")}
        for name, score in self.scores.items():
            own |= {name: score.value, f"{_JSON.get(name, name)}_interval": score.interval}
        constant = {f"constant_{name}": value for name, value in self.constant.items()}
        return {**own, **constant, "majority": self.majority, "above_majority": self.above_majority}


_JSON = {"top3_accuracy": "top3"}


_MEANS_OVER_CLASSES = ("mAP", "f1_macro", "auroc", "average_precision", "balanced_accuracy")


def small_classes_note(small: int, classes: int, kind: TaskKind = "single_label", metrics: Sequence[str] = ()) -> str:
    """Return what to know of intervals of means over classes where ``small`` of the classes or labels have few groups.

    Empty where none of them is shown.
    """
    scores = [heading(name) for name in _MEANS_OVER_CLASSES if name in shown(kind, metrics)]
    if not scores:
        return ""
    what, plural = "labels" if kind == "multi_label" else "classes", "s" if len(scores) > 1 else ""
    return (
        f"{small} of {classes} {what} have fewer than {statistics.FEW_GROUPS} groups: the interval{plural} of "
        f"{' and '.join(scores)} may be too narrow"
    )


def summarise(
    predictions: Predictions,
    train: Mapping[str, TrainTargets | Sequence[int]],
    run: str,
    split: str,
    *,
    n_resamples: int = 5_000,
    seed: int = 0,
    metrics: Sequence[str] = (),
) -> list[TaskSummary]:
    """Summarise each task of one set of predictions.

    Args:
        predictions: of one split.
        train: what is known of the train split by task, of classes and labels their counts at least; a task may be
            missing.
        run: name for the table.
        split: name for the table.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.
        metrics: scores next to the main ones, see ``statistics.scores``; by default the usual ones.
    """
    return [
        replace(
            _summarise_task(
                predictions, task, train_targets(train.get(task)), (n_resamples, seed), metrics=tuple(metrics)
            ),
            run=run,
            split=split,
        )
        for task in predictions.tasks
    ]


def train_targets(known: TrainTargets | Sequence[int] | None) -> TrainTargets:
    """Return what is known of a task's targets in training; of bare counts of classes nothing else is."""
    return known if isinstance(known, TrainTargets) else TrainTargets(known)


def summarise_run(
    run: Path, split: str = "test", metrics: Sequence[str] = (), *, calibrated: bool = False
) -> list[TaskSummary]:
    """Summarise ``predictions/<split>.parquet`` of a run directory, with the train split as in its ``run.json``.

    Args:
        run: its directory.
        split: that was predicted.
        metrics: scores next to the main ones, by default the usual ones.
        calibrated: whether outputs are calibrated before.

    Raises:
        UserError: The directory or its predictions are missing, a file cannot be read, or nothing was calibrated.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory; give the directory that `fit` or `test` printed")
    predictions = read_predictions(run / Run.PREDICTIONS / f"{split}.parquet")
    counts = read_class_counts(run / Run.RECORD, predictions.tasks)
    opened = Run(run)
    predictions = opened.calibrated(predictions, split) if calibrated else predictions
    train = train_targets_of(opened, predictions.tasks, counts)
    rows = summarise(predictions, train, opened.name, split, metrics=metrics)
    restricted = {task: len(names) for task, names in opened.restricted_to.items()}
    other = opened.other_checkpoint(split)
    return [
        replace(row, checkpoint=other, restricted=restricted.get(row.task, 0), calibrated=calibrated) for row in rows
    ]


def train_targets_of(
    run: Run, tasks: Mapping[str, Sequence[str]], counts: Mapping[str, Sequence[int]] | None = None
) -> dict[str, TrainTargets]:
    """Return what a run's record knows of the train split, by task.

    Args:
        run: the run.
        tasks: class names of its tasks.
        counts: samples of each class, read from the record by default.
    """
    counts = run.class_counts(tasks) if counts is None else counts
    data = run.record.get("data")
    facts: Mapping[str, Any] = data if isinstance(data, dict) else {}
    samples = facts.get("train_samples", (facts.get("samples") or {}).get("train", 0))
    means, medians = facts.get("target_stats") or {}, facts.get("target_medians") or {}
    return {
        task: TrainTargets(
            counts.get(task), int(samples), *(float(found.get(task, [math.nan])[0]) for found in (means, medians))
        )
        for task in tasks
    }


def summary_tables(summaries: Sequence[TaskSummary]) -> list[Table]:
    """Return a table for each kind of task, with a row per run and task.

    Except of single-label tasks, whose tables have a column for it, rows of the constant predictions follow.
    """
    tables = []
    for kind in dict.fromkeys(summary.kind for summary in summaries):
        own = [summary for summary in summaries if summary.kind == kind]
        headings = [f"{heading(name)} [95 %]" for name in shown(kind, own[0].metrics)]
        if kind == "single_label":
            columns = ("run", "split", "task", "n", "groups", "majority", *headings, "note")
            tables.append(Table(columns, [_cells(one) for one in own], ("run", "split", "task", "note")))
            continue
        rows = [_cells(one) for one in own]
        constant = [
            [f"constant: {_CONSTANT[kind]}", one.split, one.task, "", "", *_constant_cells(one), ""]
            for one in own
            if one.n and not set(_constant_cells(one)) <= {"–"}
        ]
        rows += [row for place, row in enumerate(constant) if row not in constant[:place]]
        columns = ("run", "split", "task", "n", "groups", *headings, "note")
        tables.append(Table(columns, rows, ("run", "split", "task", "note")))
    return tables


def show_summaries(summaries: Sequence[TaskSummary], *, as_markdown: bool = False, as_json: bool = False) -> None:
    """Print the tables, or one list of all values as JSON."""
    if as_json:
        Table((), (), values=[summary.values() for summary in summaries]).show(as_json=True)
        return
    for number, table in enumerate(summary_tables(summaries)):
        if as_markdown and number:
            sys.stdout.write("\n")
        table.show(as_markdown=as_markdown)


def _summarise_task(
    predictions: Predictions,
    task: str,
    train: TrainTargets,
    bootstrap: tuple[int, int],
    metrics: tuple[str, ...],
) -> TaskSummary:
    own = predictions.take(predictions.known(task))
    targets, groups, kind = own.targets[task], own.groups, own.kind(task)
    constant = ConstantPrediction(source="split" if train.counts is None else "train")
    scores = dict.fromkeys(names_of(kind, metrics), _NOTHING)
    small, occurring, unanswered, few_errors, thin = 0, 0, 0, 0, 0
    if len(own):
        constant = constant_prediction(own, task, train)
        found = scores_of(own, task, metrics)
        scores = {name: score.estimate(groups, bootstrap[0], seed=bootstrap[1]) for name, score in found.items()}
        few_errors = max((_few_losses(found[name], groups) for name in ("nll", "brier") if name in found), default=0)
    if kind == "multi_label":
        small, occurring = small_labels(targets, groups)
    elif kind == "regression":
        few_errors = few_large_errors(own.values(task) - targets, groups)
    else:
        small, occurring = statistics.small_classes(targets, groups)
        thin = statistics.small_classes(targets, groups, statistics.THIN_GROUPS)[0] if occurring < 10 else 0
        unanswered = int((own.predicted(task) == UNKNOWN).sum())
    return TaskSummary(
        run="",
        split="",
        task=task,
        kind=kind,
        n=len(own),
        groups=len(set(groups.tolist())),
        scores=scores,
        constant=constant.scores,
        majority_source=constant.source,
        majority_label=constant.prediction,
        unanswered=unanswered,
        small_classes=small,
        classes=occurring,
        few_errors=few_errors,
        metrics=metrics,
        thin_classes=0 if small else thin,
    )


def _few_losses(score: Score, groups: NDArray[Any]) -> int:
    """How many groups make half of a loss, if they are few."""
    return few_large_errors(np.sqrt(score.statistic.scores), groups) if isinstance(score.statistic, Mean) else 0


def _cells(summary: TaskSummary) -> list[str]:
    baseline = [share(summary.majority)] if summary.kind == "single_label" else []
    return [
        summary.run,
        summary.split,
        summary.task,
        str(summary.n),
        str(summary.groups),
        *baseline,
        *(score_text(name, summary.scores.get(name, _NOTHING)) for name in shown(summary.kind, summary.metrics)),
        summary.note,
    ]


def _constant_cells(summary: TaskSummary) -> list[str]:
    return [number_text(name, summary.constant.get(name, math.nan)) for name in shown(summary.kind, summary.metrics)]


def number_text(name: str, value: float) -> str:
    """Return a score as text: errors in the units of the data with four digits, others with three decimals."""
    return share(value) if name not in IN_UNITS or math.isnan(value) else f"{value:.4g}"


def score_text(name: str, score: Estimate) -> str:
    """Return a score and its interval, where there is one, as text."""
    value, (low, high) = score
    if math.isnan(value) or math.isnan(low):
        return number_text(name, value)
    return f"{number_text(name, value)} [{number_text(name, low)}, {number_text(name, high)}]"


def share(value: float) -> str:
    """Return three decimals, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def with_interval(value: float, interval: Interval) -> str:
    """Return a share and its interval, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def task_heading(summaries: Sequence[TaskSummary]) -> str:
    """Return a task with split and n, where all these summaries of it have the same, otherwise without n."""
    split = {summary.split for summary in summaries}
    first = summaries[0]
    score = [] if first.kind in CLASS_KINDS else [heading(first.main)]
    title = ", ".join([first.task, *score, *(split if len(split) == 1 else [])])
    sizes = {(summary.n, summary.groups) for summary in summaries}
    if len(sizes) > 1:
        return title
    ((n, groups),) = sizes
    return f"{title} (n {n}{'' if n == groups else f', {groups} objects'})"


def wide_table(summaries: Sequence[TaskSummary]) -> Table:
    """Return one row per run and one column per task: main scores, below the constant prediction if all runs share it.

    A run whose n is another than that of the rest has it in its cell.
    """
    tasks = {task: [one for one in summaries if one.task == task] for task in dict.fromkeys(s.task for s in summaries)}
    headings = ["run", *(f"{task_heading(own)} [95 %]" for own in tasks.values())]
    rows = []
    baselines = [{(one.majority, one.majority_label) for one in own} for own in tasks.values()]
    if all(len(found) == 1 for found in baselines):
        one_class = all(own[0].kind in CLASS_KINDS for own in tasks.values())
        rows.append(["majority" if one_class else "constant prediction", *map(_baseline, tasks.values())])
    for run in dict.fromkeys(summary.run for summary in summaries):
        rows.append([run, *(_wide_cell(run, own) for own in tasks.values())])
    return Table(headings, rows, None)


def _baseline(of_task: Sequence[TaskSummary]) -> str:
    """The majority baseline, and where its class does not come from training."""
    value = number_text(of_task[0].main, of_task[0].majority)
    of_split = any(one.n and one.majority_source == "split" for one in of_task)
    return f"{value} (of the split itself)" if of_split else value


def _wide_cell(run: str, of_task: Sequence[TaskSummary]) -> str:
    found = next((summary for summary in of_task if summary.run == run), None)
    if found is None:
        return "–"
    cell = score_text(found.main, found.main_score)
    cell = f"{cell}, checkpoint {found.checkpoint}" if found.checkpoint else cell
    return cell if len({summary.n for summary in of_task}) == 1 else f"{cell}, n {found.n}"


_ARROWS = {"image_to_text": "image → text", "text_to_image": "text → image"}


class RunScores(NamedTuple):
    """Retrieval scores that a run's test or validation has written."""

    run: str
    split: str
    rows: list[Row]


def read_retrieval(run: Path, split: str) -> RunScores:
    """Read ``reports/<split>_retrieval.csv`` of a run directory.

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
    """Return one row per run and direction; the one number of both directions together is left out."""
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


_JOINED_COLUMNS = (
    "experiment",
    "runs",
    "split",
    "task",
    "n",
    "groups",
    "majority",
    "score",
    "mean ± sd",
    "[95 %], runs",
    "pooled [95 %], groups",
    "note",
)

_CHANCE = {"seed_everything", "seed", "fold"}
"""Last parts of keys in which the runs of one experiment differ."""

_MAY_DIFFER = {*_CHANCE, "name", "runs", "config", "ckpt_path", "weights_only", "test_best"}
"""Last parts of keys that identify a run and do not change how it is made."""

_NOT_OF_THE_EXPERIMENT = ("wandb", "trainer.logger", "trainer.enable_", "trainer.default_root_dir", "trainer.log_every")


@dataclass(frozen=True)
class JoinedSummary:
    """One task of several runs of one experiment.

    Attributes:
        experiment: names of the runs' experiments.
        split: that was predicted.
        majority: main score of always predicting the same, chosen on each run's own train split: accuracy of the
            majority class.
        joined: scores, and what the runs have in common.
        note: what a reader must know next to the numbers.
        constant: scores of always predicting the same, by name; NaN where there are none.
        metrics: scores that were asked for; none for the usual ones.
    """

    experiment: str
    split: str
    majority: float
    joined: JoinedRuns
    note: str
    constant: Mapping[str, float] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()

    def values(self) -> dict[str, Any]:
        """Return the numbers for JSON; each score is a key of ``joined``."""
        own = asdict(self)
        return {**own, "joined": {**own["joined"], **own["joined"].pop("scores")}}


def join_summaries(
    paths: Sequence[Path], split: str = "test", metrics: Sequence[str] = (), *, calibrated: bool = False
) -> list[JoinedSummary]:
    """Join runs of one experiment that differ in seed, in fold, or in both; a row for each task.

    Arguments are as of ``summarise_run``.

    Raises:
        UserError: fewer than two runs, a run without usable predictions, configurations that differ in more than
            seed or fold, or in neither, or as ``join_runs``.
    """
    runs = [Run(path) for path in paths]
    if len({run.path.resolve() for run in runs}) < len(runs) or len(runs) < 2:
        raise UserError("summary --join: name at least two runs, each once")
    predictions = [predictions_of(run, split, calibrated=calibrated) for run in runs]
    compared = refuse_other_configurations(runs)
    counts = [train_targets_of(run, part.tasks) for run, part in zip(runs, predictions, strict=True)]
    return [
        _row(runs, split, task, predictions, [of_run.get(task, TrainTargets()) for of_run in counts], compared, metrics)
        for task in predictions[0].tasks
    ]


def joined_table(rows: Sequence[JoinedSummary]) -> Table:
    """Return two rows per task."""
    left = ("experiment", "runs", "split", "task", "score", "note")
    unbroken = [column for column in _JOINED_COLUMNS if column not in left or column == "score"]
    return Table(_JOINED_COLUMNS, _joined_cells(rows), left, unbroken=unbroken, values=[row.values() for row in rows])


def _row(
    runs: Sequence[Run],
    split: str,
    task: str,
    predictions: Sequence[Predictions],
    counts: Sequence[TrainTargets],
    compared: bool,
    metrics: Sequence[str],
) -> JoinedSummary:
    joined = join_runs(predictions, task, [run.name for run in runs], metrics=metrics)
    total, constants, sources = 0, dict.fromkeys(joined.scores, 0.0), set()
    for part, of_run in zip(predictions, counts, strict=True):
        if n := len(part.known(task)):
            found = constant_prediction(part, task, of_run)
            total += n
            sources.add(found.source)
            constants = {name: sum_ + n * found.scores.get(name, math.nan) for name, sum_ in constants.items()}
    constant = {name: sum_ / total if total else math.nan for name, sum_ in constants.items()}
    main, one_class = joined.main, joined.task_kind in CLASS_KINDS
    baseline, (low, high) = constant[main], joined.scores[main].pooled.interval
    notes = [] if total else ["no known targets"]
    if total and not (high < baseline if main in LOWER_IS_BETTER else low > baseline):
        notes.append("not above majority" if one_class else "not better than constant prediction")
    if total and "split" in sources:
        notes.append(f"{'majority' if one_class else 'constant prediction'} of the split itself")
    without = sum(math.isnan(value) for value in joined.scores[main].values)
    if total and without:
        notes.append(f"{without} of {len(runs)} runs without known targets")
    if total and joined.groups == 1:
        notes.append("one group: its interval is a guess")
    if others := [run.name for run in runs if run.other_checkpoint(split)]:
        notes.append(f"not of the best checkpoint: {', '.join(others)}")
    if not compared:
        notes.append("configurations not compared")
    experiments = dict.fromkeys(run.path.resolve().parent.name for run in runs)
    undefined = [heading(name) for name in metrics if not is_defined(name, joined.task_kind)]
    notes += [f"no {', '.join(undefined)} of {joined.task_kind} tasks"] if undefined else []
    return JoinedSummary(" + ".join(experiments), split, baseline, joined, "; ".join(notes), constant, tuple(metrics))


def predictions_of(run: Run, split: str, *, calibrated: bool = False) -> Predictions:
    """Return the predictions of a run's split, calibrated if asked.

    Raises:
        UserError: there are none, they cannot be read, or nothing was calibrated.
    """
    found = run.predictions(split)
    if found is None:
        raise UserError(f"{run.path}: {run.problem_of(split)}")
    return run.calibrated(found, split) if calibrated else found


def refuse_other_configurations(runs: Sequence[Run], command: str = "summary") -> bool:
    """Refuse runs that are not of one experiment; return False where a configuration is not there to be compared."""
    everything = [{key: value for key, value in flattened(run.config).items() if value != {}} for run in runs]
    if not all(everything):
        return False
    configs = [{key: value for key, value in config.items() if _is_of_experiment(key)} for config in everything]
    # Two runs with the same seed and fold are equal, or differ in rounding, and would hide the spread.
    seen: dict[tuple[tuple[str, str], ...], str] = {}
    for run, config in zip(runs, everything, strict=True):
        chance = {key: str(value) for key, value in config.items() if key.rpartition(".")[2] in _CHANCE}
        identity = tuple(sorted(chance.items()))
        if identity in seen:
            raise UserError(
                f"{command} --join: {seen[identity]} and {run.name} have the same seed and fold, so they show nothing "
                "of the spread; leave one out"
            )
        seen[identity] = run.name
    for run, config in zip(runs[1:], configs[1:], strict=True):
        differs = sorted(key for key in configs[0].keys() | config.keys() if configs[0].get(key) != config.get(key))
        if differs:
            key = differs[0]
            raise UserError(
                f"{command} --join: {runs[0].name} and {run.name} are not of one experiment: {key} is "
                f"{configs[0].get(key)!r} and {config.get(key)!r}"
                + (f" (and {len(differs) - 1} more keys)" if len(differs) > 1 else "")
                + "; join runs that differ in seed or fold only"
            )
    return True


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values of nested mappings and of lists of mappings by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            flat |= flattened({str(place): item for place, item in enumerate(value)}, f"{key}.")
        elif isinstance(value, dict) and value:
            flat |= flattened(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def _is_of_experiment(key: str) -> bool:
    return key.rpartition(".")[2] not in _MAY_DIFFER and not key.startswith(_NOT_OF_THE_EXPERIMENT)


def _joined_cells(rows: Sequence[JoinedSummary]) -> list[list[str]]:
    cells = []
    for row in rows:
        joined = row.joined
        for place, name in enumerate(shown(joined.task_kind, row.metrics)):
            score, is_main = joined.scores[name], name == joined.main
            baseline = row.constant.get(name, math.nan)
            own = [row.experiment, f"{len(joined.runs)} ({joined.kind})", row.split, joined.task]
            own += [str(joined.n), str(joined.groups)]
            own.append(number_text(name, baseline) if is_main or not math.isnan(baseline) else "")
            interval = f"[{number_text(name, score.interval.low)}, {number_text(name, score.interval.high)}]"
            own += [heading(name), f"{number_text(name, score.mean)} ± {number_text(name, score.std)}", interval]
            cells.append([*own, score_text(name, score.pooled), "" if place else row.note])
    return cells
