"""Several runs, or experiments of several runs each, next to each other: scores, paired differences to one, cost.

Their evaluations on other data sets (``vitrail evaluate``) follow their own results, each compared where the samples
are the same. Every comparison of a table counts as one of several: their p-values are corrected together (Holm).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.efficiency import cpu_latency, read_efficiency
from evaluation.report.sections import stage_minutes
from evaluation.statistics.calibration import joined_calibration_error
from evaluation.statistics.intervals import Estimate, Interval
from evaluation.statistics.paired import PairedComparison, PairedScore, compare_joined, holm
from evaluation.statistics.pooled import JoinedRuns, join_runs
from evaluation.statistics.scores import IN_UNITS, LOWER_IS_BETTER, heading
from evaluation.tables.summary import (
    number_text,
    predictions_of,
    refuse_other_configurations,
    score_text,
    shown,
    with_interval,
)
from vitrail.errors import UserError
from vitrail.predictions import Predictions
from vitrail.runs import Run
from vitrail.types import CLASS_KINDS, TaskKind

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Side:
    """One run, or the runs of one experiment, with the predictions of each, as trained or calibrated."""

    name: str
    runs: list[Run]
    predictions: list[Predictions]
    calibrated: bool = False


@dataclass(frozen=True)
class Cost:
    """What a side costs, mean over its runs; NaN where not known.

    Attributes:
        parameters: number of the model's.
        trainable: of these, those that the last phase of the training trained.
        minutes: of training, all fits of a run together.
        latency: milliseconds an image on the CPU one by one, median.
    """

    parameters: float
    trainable: float
    minutes: float
    latency: float


@dataclass(frozen=True)
class ComparedRow:
    """One side on one task.

    Attributes:
        side: name.
        data: name of the other data set that it was evaluated on; empty for its own results.
        note: what a reader must know next to the numbers: classes that the model was restricted to, or why the side is
            not compared; empty where there is nothing.
        reference: whether the others of this data set are compared with it.
        joined: its scores.
        comparison: with the reference, this side first; None for the reference itself.
        p_value: of the test by group, corrected for all comparisons of the table; NaN for the reference.
        mcnemar_p: of McNemar's test, corrected likewise; NaN where a side is several runs.
        calibration: ECE without a temperature; NaN of multi-label and regression tasks.
        calibrated: ECE with the temperatures that ``calibrate`` fitted; None where some run has none.
        p_values: of the tests of all scores that have one, each corrected for all comparisons of the table.
    """

    side: str
    joined: JoinedRuns
    comparison: PairedComparison | None
    p_value: float
    mcnemar_p: float
    calibration: Estimate
    calibrated: Estimate | None
    data: str = ""
    note: str = ""
    reference: bool = False
    p_values: Mapping[str, float] = field(default_factory=dict)

    def score(self, name: str) -> PairedScore | None:
        """The comparison of one score; None where there is none."""
        return None if self.comparison is None else self.comparison.scores.get(name)

    @property
    def verdict(self) -> str:
        """A few words."""
        if self.reference:
            return "reference"
        if self.comparison is None:
            return "not compared"
        if not self.comparison.n:
            return "no known targets"
        if not self.comparison.differs(self.p_value):
            return "no clear difference"
        found = "better" if self.comparison.first_is_better else "worse"
        return f"{found} model, one seed" if self.comparison.single else found


def sides_of(paths: Sequence[Path], split: str, join: bool, *, calibrated: bool = False) -> list[Side]:
    """Read the runs, and put those of one experiment together where asked.

    Args:
        paths: run directories, each once.
        split: whose predictions are read.
        join: whether runs of the same name are seeds or folds of one experiment.
        calibrated: whether outputs are calibrated before.

    Raises:
        UserError: fewer than two sides, a run without usable predictions, or runs of one name that are not of one
            experiment.
    """
    runs = [Run(path) for path in paths]
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise UserError("compare: name every run once")
    experiments = [str(run.record.get("name") or run.path.resolve().parent.name) for run in runs]
    members: dict[str, list[Run]] = {}
    for run, experiment in zip(runs, experiments, strict=True):
        members.setdefault(experiment if join or experiments.count(experiment) == 1 else run.name, []).append(run)
    for own in members.values():
        if len(own) > 1:
            refuse_other_configurations(own, "compare")
    if len(members) < 2:
        all_of_one = f"all {len(runs)} runs are of experiment {next(iter(members))!r}"
        raise UserError(f"compare: {all_of_one if len(runs) > 1 else 'there is one run'}; name at least two to compare")
    return [
        Side(name, own, [predictions_of(run, split, calibrated=calibrated) for run in own], calibrated)
        for name, own in members.items()
    ]


@dataclass(frozen=True)
class Evaluation:
    """Sides that were evaluated on another data set, or on several of one name.

    Attributes:
        data: its name.
        sides: with the names that they have in the comparison of their own results.
    """

    data: str
    sides: list[Side]


def evaluations_of(sides: Sequence[Side], *, calibrated: bool = False) -> tuple[list[Evaluation], list[str]]:
    """Read what ``vitrail evaluate`` left in the sides' runs, calibrated if asked.

    Returns:
        Data sets by name, and what is left out, a sentence each.
    """
    found: list[Evaluation] = []
    left_out: list[str] = []
    for data in sorted({name for side in sides for run in side.runs for name in run.evaluations}):
        members = []
        for side in sides:
            runs = [run.evaluations[data] for run in side.runs if data in run.evaluations]
            predictions = [one for run in runs if (one := run.predictions("test")) is not None]
            if calibrated:
                predictions = [run.calibrated(one) for run, one in zip(runs, predictions, strict=True)]
            if len(predictions) == len(side.runs):
                try:
                    for task in predictions[0].tasks:
                        join_runs(predictions, task, [run.name for run in runs], n_resamples=1)
                except UserError as error:
                    left_out.append(f"{side.name} on {data}: left out, {error}.")
                else:
                    members.append(Side(side.name, runs, predictions))
            elif runs and len(runs) < len(side.runs):
                left_out.append(
                    f"{side.name} on {data}: left out, only {len(runs)} of its {len(side.runs)} runs have it."
                )
            elif runs:
                left_out.append(f"{side.name} on {data}: left out, it has no predictions of labels.")
        if members:
            found.append(Evaluation(data, members))
    return found, left_out


def common_tasks(sides: Sequence[Side], task: str | None = None) -> list[str]:
    """Return the tasks that all sides predict, in the order of the first, or only the one that is wanted.

    Raises:
        UserError: there is none, or not the one that is wanted.
    """
    every = [set(run.tasks) for side in sides for run in side.predictions]
    tasks = [name for name in sides[0].predictions[0].tasks if all(name in own for own in every)]
    if task is not None and task not in tasks:
        raise UserError(
            f"--task {task}: not all runs predict it; all predict {', '.join(tasks) or 'no task in common'}"
        )
    if not tasks:
        each = "; ".join(f"{side.name} predicts {', '.join(side.predictions[0].tasks)}" for side in sides)
        raise UserError(f"compare: the runs have no task in common: {each}")
    return tasks if task is None else [task]


def compare_sides(
    sides: Sequence[Side],
    tasks: Sequence[str],
    reference: str = "first",
    n_resamples: int = 5_000,
    *,
    split: str = "test",
    evaluations: Sequence[Evaluation] = (),
    metrics: Sequence[str] = (),
) -> list[ComparedRow]:
    """Compare every side with the reference on every task.

    Args:
        sides: at least two.
        tasks: that all of them predict.
        reference: ``first`` for the first side, ``best`` for the one with the best main score on the first task that
            has known targets (the first side where there is none).
        n_resamples: of the bootstrap.
        split: that the predictions are of.
        evaluations: of these sides on other data sets, where the reference is the same side, or the first that has
            the task there. What cannot be compared has a note.
        metrics: scores next to the main ones, by default the usual ones.

    Returns:
        Rows by data set, the sides' own first, then by task, then in the order of the sides.

    Raises:
        UserError: the sides' own test samples, targets or classes are not the same.
    """
    base = sides[0]
    for task in tasks:
        # First of all, so that what cannot be compared is refused before anything takes time.
        for side in sides[1:]:
            compare_joined(side.predictions, base.predictions, task, (side.name, base.name), n_resamples=1)
    if reference == "best":
        base = _best(sides, tasks)
    rows = [row for task in tasks for row in _compared(sides, task, base.name, (n_resamples, split, metrics))]
    for one in evaluations:
        for task in tasks:
            own = [side for side in one.sides if all(task in part.tasks for part in side.predictions)]
            rows += _compared(own, task, base.name, (n_resamples, split, metrics), one.data)
    return _corrected([row for row in rows if row.joined.n or not row.data])


def _best(sides: Sequence[Side], tasks: Sequence[str]) -> Side:
    """The side with the best main score on the first task that has known targets."""
    for task in tasks:
        joined = [join_runs(side.predictions, task, [run.name for run in side.runs], n_resamples=1) for side in sides]
        if joined[0].n:
            sign = -1.0 if joined[0].main in LOWER_IS_BETTER else 1.0
            values = [sign * one.main_score.pooled.value for one in joined]
            return sides[int(np.argmax(np.nan_to_num(values, nan=-np.inf)))]
    return sides[0]


def _compared(
    sides: Sequence[Side], task: str, reference: str, how: tuple[int, str, Sequence[str]], data: str = ""
) -> list[ComparedRow]:
    """Rows of one task and data set, with p-values that are not corrected yet."""
    n_resamples, split, metrics = how
    base = next((side for side in sides if side.name == reference), sides[0] if sides else None)
    rows = []
    for side in sides:
        made, problem = None, ""
        if side is not base and base is not None:
            names = (f"{side.name} on {data}", f"{base.name} on {data}") if data else (side.name, base.name)
            try:
                made = compare_joined(
                    side.predictions, base.predictions, task, names, n_resamples=n_resamples, metrics=metrics
                )
            except UserError as error:
                if not data:
                    raise
                problem = f"not compared: {error}"
        restricted = side.runs[0].restricted_to.get(task)
        notes = [f"restricted to {len(restricted)} of its classes"] if restricted else []
        rows.append(
            ComparedRow(
                side.name,
                join_runs(
                    side.predictions, task, [run.name for run in side.runs], n_resamples=n_resamples, metrics=metrics
                ),
                made,
                math.nan if made is None else made.p_value,
                math.nan if made is None else made.mcnemar_p,
                *_calibration(side, task, split, n_resamples),
                data=data,
                note="; ".join([*notes, *([problem] if problem else [])]),
                reference=side is base and len(sides) > 1,
            )
        )
    return rows


def _corrected(rows: Sequence[ComparedRow]) -> list[ComparedRow]:
    """The rows with their p-values corrected for all comparisons together."""
    p_values, mcnemar = holm([row.p_value for row in rows]), holm([row.mcnemar_p for row in rows])
    names = dict.fromkeys(name for row in rows if row.comparison is not None for name in row.comparison.scores)
    further = {
        name: holm([math.nan if (one := row.score(name)) is None else one.p_value for row in rows]) for name in names
    }
    return [
        replace(row, p_value=p, mcnemar_p=m, p_values={name: own[place] for name, own in further.items()})
        for place, (row, p, m) in enumerate(zip(rows, p_values, mcnemar, strict=True))
    ]


def cost_of(side: Side) -> Cost:
    """Return a side's cost by its records."""
    return Cost(*(_mean([read(run) for run in side.runs]) for read in (_parameters, _trainable, _minutes, _latency)))


def caveats(sides: Sequence[Side], split: str = "test") -> list[str]:
    """Return what a reader must know of the runs next to their numbers, one sentence each."""
    notes = [
        f"{run.name} was interrupted: its numbers are those of an unfinished training."
        for side in sides
        for run in side.runs
        if run.interrupted
    ]
    notes += [
        f"{run.name}: its predictions are of checkpoint {other}, not of the best one."
        for side in sides
        for run in side.runs
        if (other := run.other_checkpoint(split))
    ]
    hardware = [run.record.get("hardware") for side in sides for run in side.runs]
    if any(own != hardware[0] for own in hardware):
        notes.append("The runs were made on different machines or numbers of threads: training times do not compare.")
    if len({first for side in sides for run in side.runs[:1] if (first := _measured_with(run))}) > 1:
        notes.append(
            "Latencies were not measured together, so they may differ by what else the machine did: name all runs in "
            "one `python -m evaluation efficiency`."
        )
    return notes


def _calibration(side: Side, task: str, split: str, n_resamples: int) -> tuple[Estimate, Estimate | None]:
    """Calibration error as trained, and with the runs' temperatures where all have one."""
    if side.predictions[0].kind(task) not in CLASS_KINDS:
        return Estimate(math.nan, Interval(math.nan, math.nan)), None
    predictions = [predictions_of(run, split) for run in side.runs] if side.calibrated else side.predictions
    names = [run.name for run in side.runs]
    own = [run.temperatures_for(split) for run in side.runs]
    fitted = [temperatures[task] for temperatures in own if task in temperatures]
    raw = joined_calibration_error(predictions, task, names, n_resamples=n_resamples)
    if len(fitted) < len(side.runs):
        return raw, None
    return raw, joined_calibration_error(predictions, task, names, fitted, n_resamples)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values and not np.isnan(values).any() else math.nan


def _parameters(run: Run) -> float:
    model: Any = run.record.get("model")
    count = model.get("parameters") if isinstance(model, dict) else None
    return float(count) if isinstance(count, int) else math.nan


def _trainable(run: Run) -> float:
    model: Any = run.record.get("model")
    counts = [stage["trainable"] for stage in run.stages if isinstance(stage.get("trainable"), int)]
    count = counts[-1] if counts else model.get("trainable") if isinstance(model, dict) else None
    return float(count) if isinstance(count, int) else math.nan


def _minutes(run: Run) -> float:
    fits = [stage_minutes(stage) for stage in run.stages if stage.get("stage") == "fit"]
    return float(sum(fits)) if fits else math.nan


def _latency(run: Run) -> float:
    found = read_efficiency(run)
    return math.nan if isinstance(found, str) else cpu_latency(found[1])


def _measured_with(run: Run) -> str:
    """Name of the first model of the session in which the run's latency was measured; empty where it was not."""
    found = read_efficiency(run)
    return "" if isinstance(found, str) or found[1] is None else found[1].first


def values_of(row: ComparedRow) -> dict[str, Any]:
    """Return the numbers of a row for JSON: of each score its value, and the difference to the reference."""
    scores: dict[str, dict[str, Any]] = {}
    for name, own in row.joined.scores.items():
        scores[name] = {"value": own.pooled.value, "interval": own.pooled.interval}
        if (made := row.score(name)) is not None:
            scores[name] |= {"difference": made.difference.value, "difference_interval": made.difference.interval}
            scores[name] |= {"p_value": row.p_values.get(name, math.nan)}
    fixed = {"run": row.side, "data": row.data, "task": row.joined.task, "runs": list(row.joined.runs)}
    sizes = {"n": row.joined.n, "groups": row.joined.groups, "reference": row.reference}
    return {**fixed, **sizes, "scores": scores, "p_value": row.p_value, "verdict": row.verdict, "note": row.note}


COST_COLUMNS = ("parameters", "trainable", "train min", "ms/image")
"""Those of ``comparison_frame`` that are the same for all tasks."""


def comparison_frames(
    rows: Sequence[ComparedRow], costs: dict[str, Cost], metrics: Sequence[str] = ()
) -> dict[TaskKind, pd.DataFrame]:
    """Return ``comparison_frame`` of the tasks of each kind, whose scores differ."""
    kinds = dict.fromkeys(row.joined.task_kind for row in rows)
    return {
        kind: comparison_frame([row for row in rows if row.joined.task_kind == kind], costs, metrics) for kind in kinds
    }


def comparison_frame(rows: Sequence[ComparedRow], costs: dict[str, Cost], metrics: Sequence[str] = ()) -> pd.DataFrame:
    """Return rows of one kind as texts, for terminal, Markdown and page, without columns that are empty in all rows."""
    import pandas as pd

    frame = pd.DataFrame([_cells(row, costs[row.side], metrics) for row in rows])
    frame = frame.loc[:, (frame != "–").any()]
    if not any(row.data for row in rows):
        frame = frame.drop(columns="data")
    return frame.drop(columns="runs") if (frame["runs"] == "1").all() else frame


def _cells(row: ComparedRow, cost: Cost, metrics: Sequence[str]) -> dict[str, str]:
    joined, made = row.joined, row.comparison
    main, several = joined.main, len(joined.runs) > 1
    own = joined.main_score
    spread = f"{number_text(main, own.mean)} ± {number_text(main, own.std)}" if several else "–"
    # Where all of a model is trained the number would only be there twice; without such a model there is no column.
    is_part = cost.trainable < cost.parameters
    costs = (
        _number(cost.parameters, ",.0f"),
        _number(cost.trainable, ",.0f") if is_part else "–",
        _number(cost.minutes, ".1f"),
        _number(cost.latency, ".2f"),
    )
    others: dict[str, str] = {}
    for name in shown(joined.task_kind, metrics):
        if name != main:
            others[f"{heading(name)} [95 %]"] = score_text(name, joined.scores[name].pooled)
            its = "its" if name == "f1_macro" else f"{heading(name)}:"
            others[f"{its} difference [95 %]"] = (
                "–" if made is None else difference_text(name, made.scores[name].difference)
            )
            if name in metrics:
                others[f"{heading(name)}: p"] = _number(row.p_values.get(name, math.nan), ".3g")
    return {
        "run": row.side,
        "data": row.data or "own",
        "runs": f"{len(joined.runs)} ({joined.kind})" if several else "1",
        "task": joined.task,
        "n": str(joined.n),
        "groups": str(joined.groups),
        "no prediction": f"{joined.unanswered:g}" if joined.unanswered else "–",
        f"{heading(main)} [95 %]": score_text(main, own.pooled),
        "mean ± sd of runs": spread,
        "difference [95 %]": "–" if made is None else difference_text(main, made.difference),
        "over seeds [95 %]": "–" if made is None else _signed(main, made.over_seeds),
        "p": _number(row.p_value, ".3g"),
        "McNemar p": _number(row.mcnemar_p, ".3g"),
        "verdict": row.verdict,
        "note": row.note or "–",
        **others,
        "ECE [95 %]": _error(row.calibration),
        "calibrated ECE [95 %]": "–" if row.calibrated is None else _error(row.calibrated),
        **dict(zip(COST_COLUMNS, costs, strict=True)),
    }


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


def _error(estimate: Estimate) -> str:
    """With its interval, where there is one."""
    return _number(estimate.value, ".3f") if math.isnan(estimate.interval.low) else with_interval(*estimate)


def difference_text(name: str, estimate: Estimate) -> str:
    """Return the difference of a score with its sign and its interval, where there is one, as text."""
    if math.isnan(estimate.value):
        return "–"
    found = _signed(name, estimate.interval)
    return f"{estimate.value:{_form(name)}}{'' if found == '–' else f' {found}'}"


def _signed(name: str, interval: Interval) -> str:
    form = _form(name)
    return "–" if math.isnan(interval.low) else f"[{interval.low:{form}}, {interval.high:{form}}]"


def _form(name: str) -> str:
    return "+.4g" if name in IN_UNITS else "+.3f"


def parts(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return tables that a window has room for: accuracy and its verdict, the other scores, and cost, a row a run.

    Joined runs have more to show of both, so their differences are a table of their own.
    """
    names = list(frame.columns)
    end = names.index("note" if "note" in names else "verdict") + 1
    row = [name for name in ("run", "data", "task") if name in names]
    columns = {"accuracies": names[:end]}
    if "runs" in names:
        middle = names.index("mean ± sd of runs") + 1
        columns = {"accuracies": names[:middle], "differences": [*row, *names[middle:end]]}
    others = [name for name in names[end:] if name not in COST_COLUMNS]
    # More than two scores with their differences would not fit the window next to each other.
    for number, begin in enumerate(range(0, len(others), 4)):
        columns[f"other_scores{f'_{number + 1}' if number else ''}"] = [*row, *others[begin : begin + 4]]
    if cost := [name for name in names if name in COST_COLUMNS]:
        columns["cost"] = ["run", *cost]
    # A run's cost is the same on all tasks.
    return {part: frame[own].drop_duplicates() for part, own in columns.items()}
