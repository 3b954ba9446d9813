"""A sweep's trials in a database: which are to be run, which somebody runs, which have to be run again.

All trials of a sweep stand in the database from the start, as numbered slots that wait. A worker takes the first that
waits, wherever it runs. A slot whose trial was lost, because its sweep was killed, gets a new trial; so no point of a
grid is lost and none is run twice. What a slot draws depends on the seed, its number, and for TPE on the results until
then.

Where a sweep's trials are kept: an SQLite file, or any database that SQLAlchemy knows.

Who runs a trial, and whether he is still there: what tells a trial that goes on from one whose sweep was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from experiments.launch.sweep_file import SweepFile, suggested
from vitrail.errors import EXIT_USER_ERROR, UserError
from vitrail.files import lock

_FILE_URL = "sqlite:///"
_WAIT_FOR_LOCK = 120.0
"""Seconds that one writer of an SQLite file waits for another one."""


_REFUSED = f"exit code {EXIT_USER_ERROR}: "


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        state: ``stopped`` means from outside: it is to be run again.
        value: best value of the metric over the epochs, that of the run's best checkpoint.
        epochs: how often the metric was logged.
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


def trial_name(number: int) -> str:
    """Name of a trial's run."""
    return f"trial-{number:04d}"


class Database:
    """A database that several threads, processes and machines may use.

    Args:
        url: such as ``sqlite:///sweep.db`` or ``postgresql://user@host/database``.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._threads = threading.Lock()
        path = url.removeprefix(_FILE_URL).partition("?")[0]
        self._lock_file = Path(f"{path}.lock") if url.startswith(_FILE_URL) and path else None

    def __str__(self) -> str:
        """Without the password: a message may end in a log that others read."""
        return re.sub(r"(://[^:/@]+):[^@]+@", r"\1:***@", self._url)

    def storage(self) -> optuna.storages.BaseStorage:
        """Connect; tables are made if need be."""
        is_file = self._url.startswith("sqlite")
        wait = {"connect_args": {"timeout": _WAIT_FOR_LOCK}} if is_file else {"pool_pre_ping": True}
        try:
            storage = optuna.storages.RDBStorage(self._url, engine_kwargs=wait)
        except (IntegrityError, OperationalError, ProgrammingError):
            # Two machines that begin at the same moment both make the tables of a new database.
            time.sleep(2.0)
            storage = optuna.storages.RDBStorage(self._url, engine_kwargs=wait)
        # With a cache of what cannot change any more; one for all studies, or one would not know another's trials.
        return optuna.storages.get_storage(storage)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread meanwhile, and no other process where the database is a file: SQLite has no row locks."""
        with self._threads:
            if self._lock_file is None:
                yield
                return
            with lock(self._lock_file):
                yield


GRACE_SECONDS = 120.0
"""So long a trial on another machine may be silent."""
BEAT_SECONDS = 15.0
"""So often a trial says that it is alive."""


def name_of(process: int) -> str:
    """A process of this machine, told apart from all others, also from a later one with the same number."""
    return f"{_machine()} {process} {_started(process)}"


def is_gone(name: str) -> bool | None:
    """Whether a process has ended; None where it runs on another machine, so that nothing can be seen."""
    machine, number, started = name.rsplit(" ", 2)
    if machine != _machine():
        return None
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _started(int(number)) != started


class Silence:
    """Finds trials on other machines that have not said anything for long.

    Only the own clock is used: clocks of several machines disagree.

    Args:
        grace: seconds of silence that are allowed.
        clock: seconds that pass.
    """

    def __init__(self, grace: float = GRACE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace = grace
        self._clock = clock
        self._heard: dict[int, tuple[int, float]] = {}

    def too_long(self, number: int, beat: int) -> bool:
        """Whether a trial's count of beats has not changed for too long.

        Args:
            number: of the trial.
            beat: its count now.
        """
        if number not in self._heard or self._heard[number][0] != beat:
            self._heard[number] = (beat, self._clock())
        return self._clock() - self._heard[number][1] > self._grace


def _machine() -> str:
    """Containers of one computer may have the same name, and count processes anew."""
    space = Path("/proc/self/ns/pid")
    return f"{platform.node()} {space.readlink() if space.is_symlink() else ''}".strip()


def _started(number: int) -> str:
    """When a process began, as the kernel counts; empty where that cannot be known."""
    try:
        stat = Path(f"/proc/{number}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    # The program's name stands in brackets and may hold anything; the start is field 22. A zombie has ended.
    fields = stat.rpartition(")")[2].split()
    return "ended" if fields[0] == "Z" else fields[19]


SLOT, ATTEMPT, OWNER, BEAT, LOST, VALUES, ERROR = "slot", "attempt", "owner", "beat", "lost", "values", "error"
_SWEEP = "sweep"


class Claim(NamedTuple):
    """A trial that this worker runs.

    Attributes:
        trial: takes the values that are reported.
        values: of the searched parameters, as the command line is given them.
    """

    trial: Trial
    values: dict[str, Any]


class SweepStudy:
    """The trials of one sweep; several threads, processes and machines may have one each.

    Args:
        url: of the database.
        name: of the sweep in it.
        sweep: what is searched.
        seed: of the values that are drawn.

    Raises:
        UserError: the database cannot be used, or has another sweep of this name.
    """

    def __init__(self, url: str, name: str, sweep: SweepFile, seed: int) -> None:
        self.sweep = sweep
        self.seed = seed
        self.owner = name_of(os.getpid())
        self._silence = Silence()
        self._database = Database(url)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=ExperimentalWarning)
        try:
            with self._database.alone():
                self._storage = self._database.storage()
                self._study = self._opened(name)
        except (StorageInternalError, SQLAlchemyError, ImportError, OSError) as error:
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise UserError(
                f"--storage {self._database}: {reason}; "
                "give a URL such as sqlite:///sweep.db or postgresql://user@host/database"
            ) from error
        self._study_id = self._storage.get_study_id_from_name(name)

    @property
    def study(self) -> optuna.Study:
        """For reading."""
        return self._study

    def trials(self) -> list[FrozenTrial]:
        """All trials that are not merely one that was lost or doubled, in order of their numbers."""
        return [trial for trial in self._study.get_trials(deepcopy=False) if not is_lost(trial)]

    def ask_for(self, count: int, *, retry_failed: bool = False, retry_refused: bool = False) -> None:
        """Make sure that the first ``count`` slots have a trial each.

        Args:
            count: of slots.
            retry_failed: whether slots whose trial has failed get a new one.
            retry_refused: whether those do whose trial has ended the sweep, because the user's input stopped it before
                any other had begun well.
        """
        retry_refused = retry_refused and not self.has_progress()
        grid = self.sweep.grid() if self.sweep.method == "grid" else None
        with self._database.alone():
            of_slot: dict[int, list[FrozenTrial]] = {}
            for trial in self._study.get_trials(deepcopy=False):
                of_slot.setdefault(trial.user_attrs[SLOT], []).append(trial)
            for slot in range(count):
                attempt = _needed_attempt(of_slot.get(slot, []), retry_failed, retry_refused)
                if attempt is not None:
                    fixed = {} if grid is None else {name: json.dumps(value) for name, value in grid[slot].items()}
                    self._study.enqueue_trial(fixed, user_attrs={SLOT: slot, ATTEMPT: attempt})

    def find_lost(self) -> int:
        """Give up the trials of sweeps that have been killed.

        Returns:
            How many were found.
        """
        found = 0
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            owner = trial.user_attrs.get(OWNER)
            gone = is_gone(owner) if owner else None
            if gone is None:
                gone = self._silence.too_long(trial.number, trial.user_attrs.get(BEAT, 0))
            if gone:
                self.give_up(trial)
                found += 1
        return found

    def give_up(self, trial: FrozenTrial | Trial) -> None:
        """Mark a running trial as one that counts for nothing, so that its slot gets a new one."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial._trial_id, LOST, True)
            self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def take(self, count: int | None = None) -> Claim | None:
        """Take the first trial that waits; None where none does.

        Args:
            count: only of the first so many slots; more may have been asked for before.
        """
        while (taken := self._taken(count)) is not None:
            if not self._is_double(taken):
                return self._drawn(taken)
            self.give_up(taken)
        return None

    def lost_before(self, trial: Trial) -> FrozenTrial | None:
        """The last lost trial of the same slot that had the same values; None where this is the first."""
        same = [(key, trial.user_attrs[key]) for key in (SLOT, ATTEMPT)]
        lost = [other for other in self._study.get_trials(deepcopy=False) if is_lost(other)]
        before = [other for other in lost if all(other.user_attrs[key] == value for key, value in same)]
        return max(before, key=lambda other: other.number, default=None)

    def running_elsewhere(self) -> list[FrozenTrial]:
        """Trials that other processes run."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial for trial in running if trial.user_attrs.get(OWNER) != self.owner]

    def has_progress(self) -> bool:
        """Whether some trial has trained for an epoch or more."""
        ended_well = (TrialState.COMPLETE, TrialState.PRUNED)
        trials = self._study.get_trials(deepcopy=False)
        return any(trial.state in ended_well or trial.intermediate_values for trial in trials)

    def target_reached(self) -> bool:
        """Whether some trial is as good as the metric's target."""
        done = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return any(trial.value is not None and self.sweep.metric.reached(trial.value) for trial in done)

    def should_stop(self, trial: Trial) -> bool:
        """Whether a running trial is worse than hyperband allows, by what all trials have reported."""
        if self.sweep.hyperband is None:
            return False
        sign = self.sweep.metric.sign
        histories = {
            other.number: [sign * value for _, value in sorted(other.intermediate_values.items())]
            for other in self._study.get_trials(deepcopy=False)
            if other.state != TrialState.WAITING and not is_lost(other)
        }
        return self.sweep.hyperband.stops(histories[trial.number], list(histories.values()))

    def tell(
        self, trial: Trial, state: TrialState, value: float | None = None, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Record how a trial ended; nothing where it was given up meanwhile.

        Args:
            trial: that was taken.
            state: how it ended.
            value: its metric, where it has one.
            facts: what else is to be known of it.
        """
        with contextlib.suppress(UpdateFinishedTrialError):
            for key, fact in (facts or {}).items():
                trial.set_user_attr(key, fact)
            values = [value] if value is not None and state == TrialState.COMPLETE else None
            self._storage.set_trial_state_values(trial._trial_id, state, values)

    def _opened(self, name: str) -> optuna.Study:
        direction = self.sweep.metric.goal
        made = _definition(self.sweep, self.seed)
        try:
            study = optuna.create_study(storage=self._storage, study_name=name, direction=direction)
            study.set_user_attr(_SWEEP, made)
        except DuplicatedStudyError:
            study = optuna.load_study(storage=self._storage, study_name=name)
        # Another machine may have made it a moment ago and not have said yet what it is.
        saved = study.user_attrs.get(_SWEEP, made)
        for key, value in made.items():
            if saved.get(key) != value:
                raise UserError(
                    f"{name}: the database has a sweep of this name with another {key}: {_short(saved.get(key))} "
                    f"there, {_short(value)} here; give this one another --name"
                )
        return study

    def _taken(self, count: int | None) -> FrozenTrial | None:
        with self._database.alone():
            waits = self._storage.get_all_trials(self._study_id, deepcopy=False, states=(TrialState.WAITING,))
            # By slot, so that what was interrupted comes first.
            for waiting in sorted(waits, key=lambda trial: (trial.user_attrs[SLOT], trial.number)):
                if count is not None and waiting.user_attrs[SLOT] >= count:
                    continue
                with contextlib.suppress(UpdateFinishedTrialError):
                    # A database server lets one of several through.
                    if self._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
                        self._storage.set_trial_user_attr(waiting._trial_id, OWNER, self.owner)
                        return waiting
        return None

    def _is_double(self, taken: FrozenTrial) -> bool:
        """Whether two processes that began at the same moment have asked for the same slot; the first one counts."""
        return any(
            other.number < taken.number
            and other.user_attrs[SLOT] == taken.user_attrs[SLOT]
            and other.user_attrs[ATTEMPT] == taken.user_attrs[ATTEMPT]
            and not is_lost(other)
            for other in self._study.get_trials(deepcopy=False)
        )

    def _drawn(self, taken: FrozenTrial) -> Claim:
        slot = taken.user_attrs[SLOT]
        # A study of its own for each trial: the sampler is the slot's, and studies are not for several threads.
        study = optuna.load_study(
            storage=self._storage, study_name=self._study.study_name, sampler=self._sampler(self.seed, slot)
        )
        trial = Trial(study, taken._trial_id)
        values = {}
        for parameter in self.sweep.searched:
            if self.sweep.method == "grid":
                options = CategoricalDistribution([json.dumps(value) for value in parameter.grid()])
                values[parameter.name] = json.loads(suggested(trial, parameter.name, options))
            else:
                values[parameter.name] = parameter.value(suggested(trial, parameter.name, parameter.distribution()))
        trial.set_user_attr(VALUES, values)
        return Claim(trial, values)

    def _sampler(self, seed: int, slot: int) -> optuna.samplers.BaseSampler:
        of_slot = int(np.random.SeedSequence([seed, slot]).generate_state(1)[0])
        if self.sweep.method == "bayes":
            # Trials that still run count as bad ones, or several workers would try the same.
            return optuna.samplers.TPESampler(seed=of_slot, constant_liar=True)
        return optuna.samplers.RandomSampler(seed=of_slot)


def is_lost(trial: FrozenTrial) -> bool:
    """Whether a trial ended without a result because its sweep was killed or stopped."""
    return trial.state == TrialState.FAIL and bool(trial.user_attrs.get(LOST))


def _is_refused(trial: FrozenTrial) -> bool:
    return bool(Outcome("failed", error=trial.user_attrs.get(ERROR)).refusal)


def _needed_attempt(trials: list[FrozenTrial], retry_failed: bool, retry_refused: bool) -> int | None:
    """Number of the attempt at a slot that is missing; None where none is."""
    kept = [trial for trial in trials if not is_lost(trial)]
    last = max((trial.user_attrs[ATTEMPT] for trial in kept or trials), default=0)
    if not kept:
        return int(last)
    again = all(
        trial.state == TrialState.FAIL and (retry_failed or (retry_refused and _is_refused(trial)))
        for trial in kept
        if trial.user_attrs[ATTEMPT] == last
    )
    return int(last) + 1 if again else None


def _definition(sweep: SweepFile, seed: int) -> dict[str, Any]:
    """What must be the same for trials to belong together."""
    return {
        "method": sweep.method,
        "metric": [sweep.metric.name, sweep.metric.goal],
        "parameters": {p.name: [p.kind, dict(p.options)] for p in sweep.parameters},
        "command": list(sweep.fit),
        "seed": seed,
    }


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:119]}…"
