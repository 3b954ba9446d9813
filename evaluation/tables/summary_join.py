"""``summary --join``: runs of one experiment that differ in seed or fold, as mean, spread and interval.

See ``joining`` for what the two intervals mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.statistics.intervals import Interval, known, majority_baseline
from evaluation.statistics.pooled import JoinedRuns, JoinedScore, join_runs
from evaluation.tables.summary import share, with_interval
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.predictions import Predictions
from vitrail.runs import Run

COLUMNS = (
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
"""Last parts of keys that tell the runs of one experiment apart."""

_MAY_DIFFER = {*_CHANCE, "name", "runs", "config", "ckpt_path", "weights_only", "test_best"}
"""Last parts of keys that say which run it is, not how it was made."""

_NOT_OF_THE_EXPERIMENT = ("wandb", "trainer.logger", "trainer.enable_", "trainer.default_root_dir", "trainer.log_every")


@dataclass(frozen=True)
class JoinedSummary:
    """One task of several runs of one experiment.

    Attributes:
        experiment: names of the runs' experiments.
        split: that was predicted.
        majority: accuracy of always answering the majority class of each run's own train split; 0 to 1.
        joined: scores, and what the runs have in common.
        note: what a reader must know next to the numbers.
    """

    experiment: str
    split: str
    majority: float
    joined: JoinedRuns
    note: str


def join_summaries(paths: Sequence[Path], split: str = "test") -> list[JoinedSummary]:
    """Join runs of one experiment.

    Args:
        paths: run directories that differ in seed, in fold, or in both.
        split: whose predictions are read.

    Returns:
        A row for each task.

    Raises:
        UserError: fewer than two runs, a run without usable predictions, configurations that differ in more than
            seed or fold, or in neither, or as ``join_runs``.
    """
    runs = [Run(path) for path in paths]
    if len({run.path.resolve() for run in runs}) < len(runs) or len(runs) < 2:
        raise UserError("summary --join: name at least two runs, each once")
    predictions = [_predictions(run, split) for run in runs]
    compared = refuse_other_configurations(runs)
    counts = [run.class_counts(part.tasks) for run, part in zip(runs, predictions, strict=True)]
    return [
        _row(runs, split, task, predictions, [of_run.get(task) for of_run in counts], compared)
        for task in predictions[0].tasks
    ]


def joined_table(rows: Sequence[JoinedSummary]) -> Table:
    """Two rows per task."""
    left = ("experiment", "runs", "split", "task", "score", "note")
    unbroken = [column for column in COLUMNS if column not in left or column == "score"]
    return Table(COLUMNS, _cells(rows), left, unbroken=unbroken, values=[asdict(row) for row in rows])


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
        targets = part.targets[task][known(part.targets[task])]
        if len(targets):
            hits += majority_baseline(targets, of_run).accuracy * len(targets)
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


def _predictions(run: Run, split: str) -> Predictions:
    found = run.predictions(split)
    if found is None:
        raise UserError(f"{run.path}: {run.problem_of(split)}")
    return found


def refuse_other_configurations(runs: Sequence[Run], command: str = "summary") -> bool:
    """Refuse runs that are not of one experiment; False where some configuration is not there to be compared."""
    everything = [_flat(run.config) for run in runs]
    if not all(everything):
        return False
    configs = [{key: value for key, value in config.items() if _is_of_experiment(key)} for config in everything]
    _refuse_repeated(runs, everything, command)
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


def _refuse_repeated(runs: Sequence[Run], configs: Sequence[Mapping[str, Any]], command: str) -> None:
    """Refuse two runs with the same seed and fold: they are equal, or differ in rounding, and would hide the spread."""
    seen: dict[tuple[tuple[str, str], ...], str] = {}
    for run, config in zip(runs, configs, strict=True):
        chance = {key: str(value) for key, value in config.items() if key.rpartition(".")[2] in _CHANCE}
        identity = tuple(sorted(chance.items()))
        if identity in seen:
            raise UserError(
                f"{command} --join: {seen[identity]} and {run.name} have the same seed and fold, so they say nothing "
                "of the spread; leave one out"
            )
        seen[identity] = run.name


def _is_of_experiment(key: str) -> bool:
    return key.rpartition(".")[2] not in _MAY_DIFFER and not key.startswith(_NOT_OF_THE_EXPERIMENT)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    values: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            values |= _flat(value, f"{key}.")
        else:
            values[key] = value
    return values


def _cells(rows: Sequence[JoinedSummary]) -> list[list[str]]:
    cells = []
    for row in rows:
        joined = row.joined
        for name, score in (("accuracy", joined.accuracy), ("macro F1", joined.f1_macro)):
            own = [row.experiment, f"{len(joined.runs)} ({joined.kind})", row.split, joined.task]
            own += [str(joined.n), str(joined.groups), share(row.majority) if name == "accuracy" else ""]
            own += [name, _mean(score), _interval(score.interval), with_interval(*score.pooled)]
            cells.append([*own, row.note if name == "accuracy" else ""])
    return cells


def _mean(score: JoinedScore) -> str:
    return f"{share(score.mean)} ± {share(score.std)}"


def _interval(interval: Interval) -> str:
    return f"[{share(interval.low)}, {share(interval.high)}]"
