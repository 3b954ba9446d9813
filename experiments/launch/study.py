"""A sweep's trials in Optuna's database: an SQLite file, or any database that SQLAlchemy knows.

Optuna samples, prunes, keeps heartbeats and queues a trial again whose sweep was killed. What is ours is the slot: the
rank of a trial among those that are no retry. It decides the point of a grid and the seed of a sample, so that no point
is lost or run twice, on however many machines, and a sweep that was interrupted samples what an undisturbed one does.
(``GridSampler`` shuffles the grid, takes a failed point for done, and may give two machines the same one.)

Also what a sweep writes: a table, ``sweep.csv``, ``importance.png``, and the best trial's configuration to fit again.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import optuna
import yaml
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import SuccessiveHalvingPruner
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from evaluation.statistics.base_to_novel import over_seeds
from evaluation.statistics.intervals import half_width
from evaluation.statistics.pooled import JoinedScore, join_runs
from experiments.launch.sweep_file import EarlyStopping, Metric, SweepFile
from vitrail.config import load_dumped
from vitrail.console import Table
from vitrail.errors import EXIT_USER_ERROR, UserError, without_passwords
from vitrail.files import lock, write_csv, write_text_atomically
from vitrail.runs import Run, class_counts_of
from vitrail.types import LABEL_TASK

if TYPE_CHECKING:
    import pandas as pd


BEAT_SECONDS = 5
"""How often a trial is reported to be alive."""
GRACE_SECONDS = 30
"""A trial that was silent for longer is run again."""
_WAIT_FOR_LOCK = 120.0
"""Seconds that one writer of an SQLite file waits for another one."""

SLOT, NAME, VALUES, ERROR, RUN = "slot", "name", "values", "error", "run"
_SWEEP, _SURPLUS, _BEGUN = "sweep", "surplus", "begun"
_REFUSED = f"exit code {EXIT_USER_ERROR}: "


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        state: ``stopped`` means from outside: it is to be run again.
        value: best value of the metric over the epochs, that of the run's best checkpoint.
        epochs: number of epochs for which the metric was logged.
        run: the run directory.
        error: why it failed, in one line.
    """

    state: Literal["complete", "pruned", "failed", "stopped"]
    value: float | None = None
    epochs: int = 0
    run: Path | None = None
    error: str | None = None

    @property
    def refusal(self) -> str:
        """What the user has to mend, in one line, where the trial ended with exit code 2; else empty."""
        error = self.error or ""
        return error.removeprefix(_REFUSED) if self.state == "failed" and error.startswith(_REFUSED) else ""


class Claim(NamedTuple):
    """A trial that this process runs.

    Attributes:
        trial: takes the values that are reported.
        slot: its number among all trials that are no retry.
        values: of the searched parameters, as the command line is given them.
        is_fresh: whether it must not continue an earlier run: that one has failed.
    """

    trial: Trial
    slot: int
    values: dict[str, Any]
    is_fresh: bool


class _Halving(SuccessiveHalvingPruner):
    """Compares the last trial of each slot.

    A trial that is run again keeps the marks of the comparisons that it has passed, since it goes on from its
    checkpoint, and so does the trial that it replaces: Optuna would count both.
    """

    def __init__(self, rule: EarlyStopping, trials: Callable[[], list[FrozenTrial]]) -> None:
        super().__init__(min_resource=rule.first, reduction_factor=rule.eta)
        self._trials = trials

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether the trial should stop."""
        study = copy.copy(study)
        study.get_trials = lambda *args, **kwargs: self._trials()  # type: ignore[method-assign]
        return super().prune(study, trial)


class SweepStudy:
    """The trials of one sweep; several threads, processes and machines may have one each.

    Args:
        url: of the database, such as ``sqlite:///sweep.db`` or ``postgresql://user@host/database``.
        name: of the sweep in it.
        sweep: what is searched.
        seed: of the samples.

    Raises:
        UserError: the database cannot be used, or has another sweep of this name.
    """

    def __init__(self, url: str, name: str, sweep: SweepFile, seed: int) -> None:
        self.sweep = sweep
        self.seed = seed
        self._name = name
        self._threads = threading.Lock()
        path = url.removeprefix("sqlite:///").partition("?")[0]
        self._file = Path(path) if url.startswith("sqlite:///") and path else None
        self._running: dict[int, float] = {}
        self._adopted: set[int] = set()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used")
        self._retry = RetryHeartbeatStaleTrialCallback()
        try:
            if self._file is not None and not self._file.parent.is_dir():
                raise FileNotFoundError(f"there is no folder {self._file.parent}")
            with self._alone():
                self._rdb = self._connected(url)
                # With a cache of what cannot change any more.
                self._storage = optuna.storages.get_storage(self._rdb)
                self.study = self._opened()
                self._requeue_lost()
        except (StorageInternalError, SQLAlchemyError, ImportError, OSError) as error:
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise UserError(
                f"--storage {without_passwords(url)}: {reason}; give a URL such as sqlite:///sweep.db or postgresql://user@host/database"
            ) from error

    def trials(self) -> list[FrozenTrial]:
        """Return the last trial of each slot, in order of slots."""
        all_trials = self.study.get_trials(deepcopy=False)
        replaced = {number for trial in all_trials for number in self._retry.retry_history(trial)}
        current = [t for t in all_trials if t.number not in replaced and not t.user_attrs.get(_SURPLUS)]
        return sorted(current, key=lambda trial: (self._retry.retry_history(trial) or [trial.number])[0])

    def take(self, count: int) -> Claim | None:
        """Begin a trial: the first that waits to be run again, or a new one; None where ``count`` have begun."""
        with self._alone():
            self._retry_silent()
            if sum(trial.state != TrialState.WAITING for trial in self.trials()) >= count:
                return None
            study = optuna.load_study(
                storage=self._storage,
                study_name=self._name,
                sampler=optuna.samplers.RandomSampler(),
                pruner=_Halving(rule, self.trials) if (rule := self.sweep.early_stopping) else None,
            )
            trial = study.ask()
            self._rdb.record_heartbeat(trial._trial_id)
            trial.set_user_attr(_BEGUN, trial.number)
            slot = self._slot(trial)
            grid = self.sweep.grid() if self.sweep.method == "grid" else None
            if grid is not None and slot >= len(grid):
                # Another machine has taken the last point at the same moment.
                trial.set_user_attr(_SURPLUS, True)
                self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                return None
            study.sampler = self._sampler(slot, grid)
            values = {p.name: p.suggest(trial, p.grid() if grid else None) for p in self.sweep.searched}
            claim = Claim(trial, slot, values, bool(trial.user_attrs.get(ERROR)))
            name = self.sweep.place(slot, values).name
            for key, fact in {SLOT: slot, NAME: name, VALUES: values, ERROR: None}.items():
                trial.set_user_attr(key, fact)
            self._running[trial._trial_id] = time.monotonic()
            return claim

    def beat(self, trial: Trial) -> None:
        """Report from time to time that a trial is alive."""
        if time.monotonic() - self._running.get(trial._trial_id, 0.0) >= BEAT_SECONDS:
            self._running[trial._trial_id] = time.monotonic()
            self._rdb.record_heartbeat(trial._trial_id)

    def report(self, trial: Trial, epoch: int, value: float) -> bool:
        """Report a trial's value; return whether it should stop, because it is weak or another process runs it."""
        try:
            trial.report(value, step=epoch)
        except UpdateFinishedTrialError:
            return True
        rule = self.sweep.early_stopping
        return rule is not None and not 0 < rule.last <= epoch and trial.should_prune()

    def end(self, trial: Trial, state: TrialState, value: float | None, facts: Mapping[str, Any]) -> None:
        """Record how a trial ended; nothing where it was given up meanwhile."""
        with contextlib.suppress(UpdateFinishedTrialError):
            for key, fact in facts.items():
                trial.set_user_attr(key, fact)
            values = [value] if state == TrialState.COMPLETE and value is not None else None
            self._storage.set_trial_state_values(trial._trial_id, state, values)
        self._running.pop(trial._trial_id, None)

    def hand_back(self, trial: Trial) -> None:
        """Let a running trial be run again, here or elsewhere."""
        self._running.pop(trial._trial_id, None)
        with self._alone(), contextlib.suppress(UpdateFinishedTrialError):  # others have taken it for lost
            self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            self._retry(self.study, copy.deepcopy(self._storage.get_trial(trial._trial_id)))

    def retry_failed(self, *, refused_only: bool) -> None:
        """Queue failed trials again, or only those that the user's input stopped."""
        with self._alone():
            for trial in self.trials():
                error = trial.user_attrs.get(ERROR)
                if trial.state == TrialState.FAIL and (not refused_only or Outcome("failed", error=error).refusal):
                    failed = copy.deepcopy(trial)  # Optuna changes its list of retries in place
                    # It begins again, so it has passed no epoch of a comparison yet.
                    for key in [key for key in failed.system_attrs if key.startswith("completed_rung_")]:
                        del failed.system_attrs[key]
                    self._retry(self.study, failed)

    def running_elsewhere(self) -> list[FrozenTrial]:
        """Return trials that other processes run."""
        return [t for t in self.trials() if t.state == TrialState.RUNNING and t._trial_id not in self._running]

    def has_progress(self) -> bool:
        """Return whether some trial has trained for an epoch or more."""
        ended_well = (TrialState.COMPLETE, TrialState.PRUNED)
        trials = self.study.get_trials(deepcopy=False)
        return any(trial.state in ended_well or trial.intermediate_values for trial in trials)

    def target_reached(self) -> bool:
        """Return whether some trial has reached the metric's target."""
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return any(trial.value is not None and self.sweep.metric.reached(trial.value) for trial in done)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread meanwhile, and no other process where the database is a file: SQLite has no row locks."""
        with self._threads:
            if self._file is None:
                yield
            else:
                with lock(self._file.with_name(f"{self._file.name}.lock")):
                    yield

    def _connected(self, url: str) -> RDBStorage:
        wait = {"connect_args": {"timeout": _WAIT_FOR_LOCK}} if url.startswith("sqlite") else {"pool_pre_ping": True}

        def connect() -> RDBStorage:
            return RDBStorage(
                url,
                engine_kwargs=wait,
                heartbeat_interval=BEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=self._retry,
            )

        try:
            return connect()
        except (IntegrityError, OperationalError, ProgrammingError):
            # Two machines that begin at the same moment both make the tables of a new database.
            time.sleep(2.0)
            return connect()

    def _opened(self) -> optuna.Study:
        made = _definition(self.sweep, self.seed)
        try:
            study = optuna.create_study(storage=self._storage, study_name=self._name, direction=self.sweep.metric.goal)
            study.set_user_attr(_SWEEP, made)
        except DuplicatedStudyError:
            study = optuna.load_study(storage=self._storage, study_name=self._name)
        # Another machine may have made it a moment ago and not have described it yet.
        saved = study.user_attrs.get(_SWEEP, made)
        for key, value in made.items():
            if saved.get(key) != value:
                raise UserError(
                    f"{self._name}: the database has a sweep of this name with another {key}: "
                    f"{_short(saved.get(key))} there, {_short(value)} here; give this one another --name"
                )
        return study

    def _retry_silent(self) -> None:
        """Queue trials of sweeps that were killed."""
        for own in list(self._running):
            self._rdb.record_heartbeat(own)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # Its sweep was killed before the first heartbeat, and Optuna would wait for that forever.
            if trial.user_attrs.get(_BEGUN) != trial.number and trial.number not in self._adopted:
                self._adopted.add(trial.number)
                self._rdb.record_heartbeat(trial._trial_id)
        optuna.storages.fail_stale_trials(self.study)
        self._requeue_lost()

    def _requeue_lost(self) -> None:
        """Queue trials of sweeps that were killed between giving a trial up and queueing it."""
        for trial in self.trials():
            if trial.state == TrialState.FAIL and not trial.user_attrs.get(ERROR):
                self._retry(self.study, copy.deepcopy(trial))

    def _slot(self, trial: Trial) -> int:
        """Rank among the trials that are no retry, of the first trial where this is one."""
        all_trials = self.study.get_trials(deepcopy=False)
        first = (self._retry.retry_history(all_trials[trial.number]) or [trial.number])[0]
        return sum(not self._retry.retry_history(other) for other in all_trials[:first])

    def _sampler(self, slot: int, grid: list[dict[str, Any]] | None) -> optuna.samplers.BaseSampler:
        seed = int(np.random.SeedSequence([self.seed, slot]).generate_state(1)[0])
        if self.sweep.method == "bayes":
            # Trials that still run count as bad ones, or several workers would try the same.
            return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        random = optuna.samplers.RandomSampler(seed=seed)
        if grid is None:
            return random
        point = {name: json.dumps(value) for name, value in grid[slot].items()}
        return optuna.samplers.PartialFixedSampler(point, random)


def _definition(sweep: SweepFile, seed: int) -> dict[str, Any]:
    """What must be the same for trials to belong together."""
    return {
        "format": 2,
        "method": sweep.method,
        "metric": [sweep.metric.name, sweep.metric.goal],
        "parameters": {p.name: [p.kind, dict(p.options)] for p in sweep.parameters},
        "command": list(sweep.fit),
        "seed": seed,
    }


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:119]}…"


SEED = "seed_everything"
"""The parameter whose values are repetitions of the others'."""

EPOCHS, CONFIG, BEST_VALUE = "epochs", "config", "best"
"""Names under which a trial keeps what is known of it."""

_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


def best_trial(trials: Sequence[FrozenTrial], metric: Metric) -> FrozenTrial | None:
    """Return the complete trial with the best metric, the earliest of equal ones; None where none is complete."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return min(complete, key=lambda trial: (metric.sign * value_of(trial), trial.number), default=None)


def value_of(trial: FrozenTrial) -> float:
    """Return the best value of the metric over a trial's epochs; NaN where it never came to one."""
    value = trial.value if trial.state == TrialState.COMPLETE else trial.user_attrs.get(BEST_VALUE)
    return float("nan") if value is None else float(value)


def sweep_frame(trials: Sequence[FrozenTrial], metric: Metric) -> pd.DataFrame:
    """Return one row a trial, complete ones first, the best first.

    Columns are ``trial``, ``state``, the metric, ``epochs``, the parameters, ``run`` and ``error``.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    ranks = list(_STATES)
    for trial in sorted(trials, key=lambda t: (ranks.index(t.state), metric.sign * value_of(t), t.number)):
        known = trial.user_attrs
        rows.append(
            {
                "trial": known.get(NAME),
                "state": _STATES[trial.state],
                metric.name: value_of(trial),
                "epochs": known.get(EPOCHS),
                **known.get(VALUES, {}),
                "run": known.get(RUN),
                "error": known.get(ERROR),
            }
        )
    frame = pd.DataFrame(rows)
    last = ["run", "error"]
    return frame[[*(column for column in frame.columns if column not in last), *last]] if rows else frame


def trials_table(frame: pd.DataFrame, title: str) -> Table:
    """Return the trials, the best one in bold; a failed one has the reason in place of its directory."""
    columns = [str(column) for column in frame.columns if column != "error"]
    records = frame.to_dict("records")
    for row in records:
        row["run"] = row["error"] if row["state"] == "failed" else row["run"]
    rows = [[_cell(row[column]) for column in columns] for row in records]
    styles = {number: "dim" for number, row in enumerate(records) if row["state"] != "complete"}
    return Table(columns, rows, ("trial", "state", "run"), title, styles={0: "bold", **styles} if rows else {})


def over_seeds_frame(trials: Sequence[FrozenTrial], metric: Metric) -> pd.DataFrame | None:
    """Return one row for each combination of the other parameters, where ``seed_everything`` is one of several.

    Columns are the parameters, ``seeds``, and for each score its mean, ``± seeds`` (half of Student's 95 % interval
    over seeds) and, of the test split, ``low`` and ``high`` (the 95 % interval by group). Trials that were tested have
    ``test``, the main score of the main task; those without training images of the second half of the classes also have
    ``base``, ``novel`` and ``harmonic_mean``.
    """
    import pandas as pd

    groups: dict[str, list[FrozenTrial]] = {}
    for trial in trials:
        values = dict(trial.user_attrs.get(VALUES, {}))
        if trial.state == TrialState.COMPLETE and values.pop(SEED, None) is not None:
            groups.setdefault(json.dumps(values, sort_keys=True), []).append(trial)
    if not any(len(members) > 1 for members in groups.values()):
        return None
    rows = []
    for key, members in groups.items():
        row = {**json.loads(key), "seeds": len(members)}
        own = [value_of(trial) for trial in members]
        row |= {metric.name: float(np.mean(own)), f"{metric.name} ± seeds": half_width(own)}
        for name, score in _tested_scores(members).items():
            low, high = score.pooled.interval
            row |= {name: score.mean, f"{name} ± seeds": half_width(score.values)}
            row |= {f"{name} low": low, f"{name} high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def _tested_scores(members: Sequence[FrozenTrial]) -> dict[str, JoinedScore]:
    """Scores of the test split over the seeds; none unless all trials were tested."""
    paths = [Path(trial.user_attrs[RUN]) for trial in members if trial.user_attrs.get(RUN)]
    runs = [Run(path) for path in paths if path.is_dir()]
    predictions = [found for run in runs if (found := run.predictions("test")) is not None]
    if not predictions or len(predictions) < len(members):
        return {}
    task = next(iter(predictions[0].tasks))
    scores = {"test": join_runs(predictions, task).main_score}
    classes = {task: list(predictions[0].tasks[task])}
    counts = (class_counts_of(runs[0].record, classes, str(runs[0].path)) or {}).get(task)
    base = (len(classes[task]) + 1) // 2
    if task == LABEL_TASK and counts and all(counts[:base]) and not any(counts[base:]):
        scores |= over_seeds(predictions, base)
    return scores


def write_reports(folder: Path, study: optuna.Study, trials: Sequence[FrozenTrial], metric: Metric, runs: Path) -> str:
    """Write ``sweep.csv``, ``best.yaml``, ``importance.csv`` and ``importance.png``, each atomically.

    Returns:
        Lines with their paths, or why one is missing.
    """
    write_csv(folder / "sweep.csv", sweep_frame(trials, metric))
    lines = [f"Table: {folder / 'sweep.csv'}"]
    if (seeds := over_seeds_frame(trials, metric)) is None:
        (folder / "seeds.csv").unlink(missing_ok=True)
    else:
        write_csv(folder / "seeds.csv", seeds)
        lines.append(f"Over seeds: {folder / 'seeds.csv'}")
    best = best_trial(trials, metric)
    path = folder / "best.yaml"
    if best is None:
        # Those of an earlier sweep may be there.
        for name in ("best.yaml", "importance.csv", "importance.png"):
            (folder / name).unlink(missing_ok=True)
        return "\n".join(lines)
    write_text_atomically(path, _best_config(best, folder.name, metric, runs))
    result = f"{best.user_attrs[NAME]}, {metric.name} {value_of(best):.4g}"
    lines.append(f"Best: {result}; python -m experiments fit --config {path}")
    why = _importance(folder, study, trials, metric)
    lines.append(f"Importance: {why or folder / 'importance.png'}")
    return "\n".join(lines)


def _best_config(best: FrozenTrial, name: str, metric: Metric, runs: Path) -> str:
    """The trial's whole configuration with a name of its own, so that its next run is not put among the trials."""
    config = load_dumped(best.user_attrs[CONFIG])
    config |= {"name": f"{name}_best", "runs": str(runs)}
    values = ", ".join(f"{key} {value}" for key, value in best.user_attrs[VALUES].items())
    head = f"# The best of the sweep {name}: {best.user_attrs[NAME]}, {metric.name} {value_of(best):.6g} with {values}."
    return f"{head}\n{yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}"


def _importance(folder: Path, study: optuna.Study, trials: Sequence[FrozenTrial], metric: Metric) -> str | None:
    """Write how much of the metric's variance each parameter explains; or return why there is none."""
    import pandas as pd
    from matplotlib.figure import Figure

    from evaluation.report.figures import plain, save_figure

    # Those of an earlier sweep may be there.
    for name in ("importance.csv", "importance.png"):
        (folder / name).unlink(missing_ok=True)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if len(complete) < 2:
        return "one complete trial does not show what matters, so there is no plot"
    if len({trial.value for trial in complete}) == 1:
        return f"{metric.name} is the same in all complete trials, so there is no plot"
    varied = [name for name in complete[0].params if len({trial.params.get(name) for trial in complete}) > 1]
    if not varied:
        return "all complete trials had the same values, so there is no plot"
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator, params=varied)
    except RuntimeError as error:
        # Optuna's word for values that differ by rounding only.
        if "zero total variance" not in str(error):
            raise
        return f"{metric.name} is the same in all complete trials, so there is no plot"
    frame = pd.DataFrame({"parameter": list(shares), "importance": list(shares.values())})
    write_csv(folder / "importance.csv", frame)
    figure = Figure(figsize=(6, 1.4 + 0.4 * len(frame)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh([plain(name) for name in frame["parameter"][::-1]], frame["importance"][::-1])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set(
        xlim=(0, 1.1), xlabel="share of the variance (fANOVA)", title=plain(f"{metric.name}, {len(complete)} trials")
    )
    save_figure(figure, folder / "importance.png")
    return None


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
