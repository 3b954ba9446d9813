"""The table of results: per run and task n, groups, majority baseline, accuracy and macro F1 with intervals by group.

A result whose interval does not lie above the majority baseline has a note. Runs of one experiment that differ in seed
or fold can be joined (see ``statistics.pooled`` for their two intervals).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.retrieval import BOTH, Row, read_report
from evaluation.retrieval import with_interval as score_with_interval
from evaluation.statistics import intervals as statistics
from evaluation.statistics import kinds
from evaluation.statistics.intervals import Estimate, Interval
from evaluation.statistics.pooled import JoinedRuns, join_runs
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.predictions import Predictions, other_kinds, read_predictions
from vitrail.runs import Run, read_class_counts
from vitrail.types import CLASS_KINDS, UNKNOWN, TaskKind

COLUMNS = ("run", "split", "task", "n", "groups", "majority", "accuracy [95 %]", "macro F1 [95 %]", "note")


@dataclass(frozen=True)
class TaskSummary:
    """What is known of one task of one run; shares are 0 to 1, higher is better, NaN where nothing is known.

    Attributes:
        run: name of the experiment and of the run directory.
        split: that was predicted.
        task: its name.
        n: samples with a known target.
        groups: different groups (objects, products) among them; the intervals rest on these.
        majority: accuracy of always predicting the majority class.
        majority_source: split whose class counts chose the majority class.
        majority_label: name of that class, empty where n is 0.
        accuracy: share of right predictions; the intervals are by group, see ``statistics.intervals``.
        f1_macro: mean F1 over classes.
        f1_weighted: mean F1 weighted by support.
        top3_accuracy: share of samples whose target is among the three largest logits.
        unanswered: samples with a known target for which the model predicts no class; they count as wrong.
        checkpoint: name of the checkpoint that was evaluated where it is another one than ``best``, else empty.
        restricted: number of classes that the model was restricted to (``evaluate --restrict-classes``); 0 for all.
        small_classes: classes that too few groups show for the interval of macro F1 to hold its level.
        classes: classes among the targets.
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
    f1_macro: float
    f1_macro_interval: Interval
    f1_weighted: float
    f1_weighted_interval: Interval
    top3_accuracy: float
    top3_interval: Interval
    unanswered: int
    checkpoint: str = ""
    restricted: int = 0
    small_classes: int = 0
    classes: int = 0

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
        if self.small_classes:
            notes.append(small_classes_note(self.small_classes, self.classes))
        if self.checkpoint:
            notes.append(f"of checkpoint {self.checkpoint}, not best")
        if self.restricted:
            notes.append(f"restricted to {self.restricted} of its classes")
        return "; ".join(notes)


def small_classes_note(small: int, classes: int) -> str:
    """Return what to know of the interval of macro F1 where ``small`` of the classes have few groups."""
    return (
        f"{small} of {classes} classes have fewer than {statistics.FEW_GROUPS} groups: the interval of macro F1 may be "
        "too narrow"
    )


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
        predictions: of one split.
        class_counts: samples of each class in the train split, by task; a task may be missing.
        run: name for the table.
        split: name for the table.
        n_resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    return [
        _summarise_task(predictions, task, class_counts.get(task), run=run, split=split, bootstrap=(n_resamples, seed))
        for task in predictions.of_kinds(*CLASS_KINDS).tasks
    ]


SCORE_COLUMNS = ("run", "split", "task", "kind", "n", "groups", "score", "value [95 %]", "baseline", "note")

_SCORE_RESAMPLES = 1_000
_LOWER_IS_BETTER = ("MAE",)


@dataclass(frozen=True)
class ScoreSummary:
    """One score of a task whose targets are labels, numbers or an ordered scale; NaN where nothing is known.

    Attributes:
        run: name of the experiment and of the run directory.
        split: that was predicted.
        task: its name.
        kind: of the task.
        n: samples with a known target.
        groups: different groups (objects, products) among them; the interval rests on these.
        score: name, ``mAP``, ``F1 micro``, ``exact match``, ``MAE``, ``R²`` or ``quadratic kappa``.
        value: of the score, ``MAE`` in the units of the data or in classes.
        interval: by group bootstrap, percentiles.
        baseline: the score without looking at images: the labels' frequency for ``mAP``, always predicting the mean of
            training, or its most frequent class; NaN where there is none to compare with.
        checkpoint: name of the checkpoint that was evaluated where it is another one than ``best``, else empty.
    """

    run: str
    split: str
    task: str
    kind: TaskKind
    n: int
    groups: int
    score: str
    value: float
    interval: Interval
    baseline: float
    checkpoint: str = ""

    @property
    def better(self) -> bool:
        """Whether the whole interval is better than the baseline."""
        if self.score in _LOWER_IS_BETTER:
            return self.interval.high < self.baseline
        return self.interval.low > self.baseline

    @property
    def note(self) -> str:
        """What a reader must know next to the number, empty where there is nothing."""
        if not self.n:
            return "no known targets"
        notes = [] if self.better or math.isnan(self.baseline) else ["not better than the baseline"]
        if self.groups == 1:
            notes.append("one group: its interval is a guess")
        if self.checkpoint:
            notes.append(f"of checkpoint {self.checkpoint}, not best")
        return "; ".join(notes)


def summarise_scores(
    predictions: Predictions,
    class_counts: Mapping[str, Sequence[int]],
    target_stats: Mapping[str, Sequence[float]],
    run: str,
    split: str,
    *,
    seed: int = 0,
) -> list[ScoreSummary]:
    """Summarise each multi-label, ordinal and regression task, a row for each score.

    Args:
        predictions: of one split.
        class_counts: samples of each class in the train split, by task; a task may be missing.
        target_stats: mean and standard deviation of training targets, by task; a task may be missing.
        run: name for the table.
        split: name for the table.
        seed: of the bootstrap.
    """
    rows = []
    for task in predictions.tasks:
        kind, known = predictions.kind(task), predictions.known(task)
        if kind == "single_label":
            continue
        groups = predictions.groups[known]
        number = len(set(groups.tolist()))
        found = _scores_of(predictions, task, known, class_counts.get(task), target_stats.get(task))
        for score, (statistic, baseline) in found.items():
            value = Estimate(math.nan, Interval(math.nan, math.nan))
            if len(known):
                value = statistics.estimate(statistic, groups, _SCORE_RESAMPLES, seed=seed, percentiles=True)
            rows.append(
                ScoreSummary(run, split, task, kind, len(known), number, score, value.value, value.interval, baseline)
            )
    return rows


def _scores_of(
    predictions: Predictions,
    task: str,
    known: NDArray[np.int64],
    counts: Sequence[int] | None,
    stats: Sequence[float] | None,
) -> dict[str, tuple[statistics.Statistic, float]]:
    """Statistics of a task by name, each with its baseline."""
    targets = predictions.targets[task][known]
    if predictions.kind(task) == "multi_label":
        probabilities = predictions.label_probabilities(task)[known]
        marked = predictions.predicted_labels(task)[known]
        right = ((marked == (targets == 1)) | (targets == UNKNOWN)).all(axis=1)
        of_labels = (targets == 1).sum(axis=0) / np.maximum((targets != UNKNOWN).sum(axis=0), 1)
        frequency = float(of_labels[of_labels > 0].mean()) if (of_labels > 0).any() else math.nan
        return {
            "mAP": (kinds.mean_average_precision(targets, probabilities), frequency),
            "F1 micro": (kinds.micro_f1(targets, marked), math.nan),
            "exact match": (statistics.share_statistic(right), math.nan),
        }
    if predictions.kind(task) == "regression":
        numbers, values = targets.astype(np.float64), predictions.values(task)[known]
        mean = float(stats[0]) if stats else float(numbers.mean()) if len(numbers) else math.nan
        return {
            "MAE": (kinds.mean_error(values - numbers), _mean_distance(numbers, mean)),
            "R²": (kinds.explained_variance(numbers, values), 0.0),
        }
    predicted = predictions.predicted(task)[known]
    last = len(predictions.tasks[task]) - 1
    predicted = np.where(predicted == UNKNOWN, np.where(targets * 2 > last, 0, last), predicted)
    majority = statistics.majority_baseline(targets, counts).label if len(targets) else 0
    return {
        "MAE": (kinds.mean_error(predicted - targets), _mean_distance(targets, majority)),
        "quadratic kappa": (kinds.quadratic_kappa(targets, predicted), 0.0),
    }


def _mean_distance(targets: NDArray[Any], constant: float) -> float:
    return float(np.abs(targets - constant).mean()) if len(targets) else math.nan


def scores_of_run(run: Path, split: str = "test") -> list[ScoreSummary]:
    """Summarise the tasks of ``predictions/<split>.parquet`` that are not single-label, see ``summarise_scores``.

    Raises:
        UserError: as ``summarise_run``.
    """
    predictions = read_predictions(run / Run.PREDICTIONS / f"{split}.parquet")
    opened = Run(run)
    data = opened.record.get("data") or {}
    counts = read_class_counts(run / Run.RECORD, predictions.tasks)
    rows = summarise_scores(predictions, counts, data.get("target_stats") or {}, opened.name, split)
    return [replace(row, checkpoint=opened.other_checkpoint(split)) for row in rows]


def scores_table(summaries: Sequence[ScoreSummary]) -> Table:
    """Return one row per run, task and score."""
    cells = [
        [
            *(one.run, one.split, one.task, one.kind, str(one.n), str(one.groups), one.score),
            with_interval(one.value, one.interval),
            share(one.baseline),
            one.note,
        ]
        for one in summaries
    ]
    values = [{**asdict(one), "better": one.better} for one in summaries]
    return Table(SCORE_COLUMNS, cells, ("run", "split", "task", "kind", "score", "note"), values=values)


def summarise_run(run: Path, split: str = "test") -> list[TaskSummary]:
    """Summarise ``predictions/<split>.parquet`` of a run directory, with the class counts of its ``run.json``.

    Raises:
        UserError: The directory or its predictions are missing, or a file cannot be read.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run directory; give the directory that `fit` or `test` printed")
    predictions = read_predictions(run / Run.PREDICTIONS / f"{split}.parquet")
    counts = read_class_counts(run / Run.RECORD, predictions.tasks)
    opened = Run(run)
    rows = summarise(predictions, counts, opened.name, split)
    restricted = {task: len(names) for task, names in opened.restricted_to.items()}
    other = opened.other_checkpoint(split)
    return [replace(row, checkpoint=other, restricted=restricted.get(row.task, 0)) for row in rows]


def summary_table(summaries: Sequence[TaskSummary]) -> Table:
    """Return one row per run and task."""
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
    scores = [Estimate(math.nan, Interval(math.nan, math.nan))] * 4
    if len(rows):
        baseline = statistics.majority_baseline(targets, counts)
        functions = (
            statistics.accuracy_statistic(targets, predicted),
            statistics.f1_statistic(targets, predicted),
            statistics.f1_statistic(targets, predicted, "weighted"),
            statistics.share_statistic(statistics.in_top_k(targets, logits, 3)),
        )
        scores = [statistics.estimate(one, groups, bootstrap[0], seed=bootstrap[1]) for one in functions]
    accuracy, f1_macro, f1_weighted, top3 = scores
    small, occurring = statistics.small_classes(targets, groups)
    return TaskSummary(
        run=run,
        split=split,
        task=task,
        n=len(rows),
        groups=len(set(groups.tolist())),
        majority=baseline.accuracy,
        majority_source=baseline.source,
        majority_label=str(predictions.tasks[task][baseline.label]) if len(rows) else "",
        accuracy=accuracy.value,
        accuracy_interval=accuracy.interval,
        f1_macro=f1_macro.value,
        f1_macro_interval=f1_macro.interval,
        f1_weighted=f1_weighted.value,
        f1_weighted_interval=f1_weighted.interval,
        top3_accuracy=top3.value,
        top3_interval=top3.interval,
        unanswered=int((predicted == UNKNOWN).sum()),
        small_classes=small,
        classes=occurring,
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
    """Return three decimals, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def with_interval(value: float, interval: Interval) -> str:
    """Return a share and its interval, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def task_heading(summaries: Sequence[TaskSummary]) -> str:
    """Return a task with split and n, where all these summaries of it have the same, otherwise without n."""
    split = {summary.split for summary in summaries}
    heading = ", ".join([summaries[0].task, *(split if len(split) == 1 else [])])
    sizes = {(summary.n, summary.groups) for summary in summaries}
    if len(sizes) > 1:
        return heading
    ((n, groups),) = sizes
    return f"{heading} (n {n}{'' if n == groups else f', {groups} objects'})"


def wide_table(summaries: Sequence[TaskSummary]) -> Table:
    """Return one row per run and one column per task: accuracies, below the majority baseline if all runs share it.

    A run whose n is another than that of the rest has it in its cell.
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
    value = share(of_task[0].majority)
    of_split = any(one.n and one.majority_source == "split" for one in of_task)
    return f"{value} (of the split itself)" if of_split else value


def _wide_cell(run: str, of_task: Sequence[TaskSummary]) -> str:
    found = next((summary for summary in of_task if summary.run == run), None)
    if found is None:
        return "–"
    cell = with_interval(found.accuracy, found.accuracy_interval)
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
        majority: accuracy of always predicting the majority class of each run's own train split; 0 to 1.
        joined: scores, and what the runs have in common.
        note: what a reader must know next to the numbers.
    """

    experiment: str
    split: str
    majority: float
    joined: JoinedRuns
    note: str


def join_summaries(paths: Sequence[Path], split: str = "test") -> list[JoinedSummary]:
    """Join runs of one experiment that differ in seed, in fold, or in both; a row for each task.

    Raises:
        UserError: fewer than two runs, a run without usable predictions, configurations that differ in more than
            seed or fold, or in neither, or as ``join_runs``.
    """
    runs = [Run(path) for path in paths]
    if len({run.path.resolve() for run in runs}) < len(runs) or len(runs) < 2:
        raise UserError("summary --join: name at least two runs, each once")
    predictions = [predictions_of(run, split) for run in runs]
    compared = refuse_other_configurations(runs)
    if left_out := other_kinds(predictions[0].tasks, predictions[0].kinds):
        sys.stderr.write(f"summary --join: left out {left_out}, which have no single class\n")
    counts = [run.class_counts(part.tasks) for run, part in zip(runs, predictions, strict=True)]
    return [
        _row(runs, split, task, predictions, [of_run.get(task) for of_run in counts], compared)
        for task in predictions[0].of_kinds(*CLASS_KINDS).tasks
    ]


def joined_table(rows: Sequence[JoinedSummary]) -> Table:
    """Return two rows per task."""
    left = ("experiment", "runs", "split", "task", "score", "note")
    unbroken = [column for column in _JOINED_COLUMNS if column not in left or column == "score"]
    return Table(_JOINED_COLUMNS, _joined_cells(rows), left, unbroken=unbroken, values=[asdict(row) for row in rows])


def _row(
    runs: Sequence[Run],
    split: str,
    task: str,
    predictions: Sequence[Predictions],
    counts: Sequence[Sequence[int] | None],
    compared: bool,
) -> JoinedSummary:
    joined = join_runs(predictions, task, [run.name for run in runs])
    hits, total = 0.0, 0
    for part, of_run in zip(predictions, counts, strict=True):
        targets = part.targets[task][statistics.known(part.targets[task])]
        if len(targets):
            hits += statistics.majority_baseline(targets, of_run).accuracy * len(targets)
            total += len(targets)
    majority = hits / total if total else float("nan")
    notes = [] if total else ["no known targets"]
    if total and not joined.accuracy.pooled.interval.low > majority:
        notes.append("not above majority")
    if total and any(not of_run or not any(of_run) for of_run in counts):
        notes.append("majority of the split itself")
    without = sum(math.isnan(value) for value in joined.accuracy.values)
    if total and without:
        notes.append(f"{without} of {len(runs)} runs without known targets")
    if total and joined.groups == 1:
        notes.append("one group: its interval is a guess")
    if others := [run.name for run in runs if run.other_checkpoint(split)]:
        notes.append(f"not of the best checkpoint: {', '.join(others)}")
    if not compared:
        notes.append("configurations not compared")
    experiments = dict.fromkeys(run.path.resolve().parent.name for run in runs)
    return JoinedSummary(" + ".join(experiments), split, majority, joined, "; ".join(notes))


def predictions_of(run: Run, split: str) -> Predictions:
    """Return the predictions of a run's split.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    found = run.predictions(split)
    if found is None:
        raise UserError(f"{run.path}: {run.problem_of(split)}")
    return found


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
        for name, score in (("accuracy", joined.accuracy), ("macro F1", joined.f1_macro)):
            own = [row.experiment, f"{len(joined.runs)} ({joined.kind})", row.split, joined.task]
            own += [str(joined.n), str(joined.groups), share(row.majority) if name == "accuracy" else ""]
            interval = f"[{share(score.interval.low)}, {share(score.interval.high)}]"
            own += [name, f"{share(score.mean)} ± {share(score.std)}", interval, with_interval(*score.pooled)]
            cells.append([*own, row.note if name == "accuracy" else ""])
    return cells
