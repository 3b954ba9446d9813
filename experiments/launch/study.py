"""A sweep's trials in Optuna's database: an SQLite file, or any database that SQLAlchemy knows.

Optuna samples, prunes, keeps heartbeats and queues a trial again whose sweep was killed. What is ours is the slot: the
rank of a trial among those that are no retry. It decides the point of a grid and the seed of a sample, so that no point
is lost or run twice, on however many machines, and a sweep that was interrupted samples what an undisturbed one does.
(``GridSampler`` shuffles the grid, takes a failed point for done, and may give two machines the same one.)
"""

from __future__ import annotations

import contextlib
import copy
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import SuccessiveHalvingPruner
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from experiments.launch.sweep_file import EarlyStopping, SweepFile
from vitrail.errors import EXIT_USER_ERROR, UserError, without_passwords
from vitrail.files import lock

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
