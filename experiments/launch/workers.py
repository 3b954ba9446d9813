"""The workers of a sweep: threads that take trials, run them and record how they ended.

One trial of a sweep: a ``fit`` in a process of its own, watched through the files of its run directory.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial, TrialState

from experiments.launch.study import (
    BEAT,
    BEAT_SECONDS,
    ERROR,
    SLOT,
    Claim,
    Outcome,
    SweepStudy,
    is_gone,
    name_of,
    trial_name,
)
from experiments.launch.sweep_file import Metric
from experiments.launch.sweep_report import BEST_VALUE, CONFIG, EPOCHS, RUN, best_trial, value_of
from vitrail.runs import Run
from vitrail.runtime import STOP_TIMEOUT, start_process, stop_process

if TYPE_CHECKING:
    from rich.console import Console


_POLL_SECONDS = 0.5
_TERMINATED = {-signal.SIGTERM, 128 + signal.SIGTERM}
_SECONDS_TO_AGREE = 3.0
"""A scheduler that ends a job sends SIGTERM to all its processes, and a trial may be quicker than its sweep."""


@dataclass(frozen=True)
class Job:
    """What a trial runs.

    Attributes:
        number: of the trial.
        arguments: after ``python -m experiments``.
        metric: what is watched.
        folder: of the sweep; the run goes to ``trials/trial-<number>/<time>``, what it prints to ``logs/``.
        environment: what is different in the process's environment.
        resumes: last checkpoint of an interrupted run with the same arguments, which goes on in its own directory.
    """

    number: int
    arguments: Sequence[str]
    metric: Metric
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    resumes: Path | None = None

    @property
    def name(self) -> str:
        """The run's name."""
        return trial_name(self.number)

    @property
    def log(self) -> Path:
        """What the process prints."""
        return self.folder / "logs" / f"{self.name}.log"


class Watch(Protocol):
    """Who is told how a trial goes on."""

    def started(self, process: int) -> None:
        """The trial has a process of this number."""

    def epoch(self, number: int, value: float) -> bool:
        """A value came; whether the trial should stop early."""

    def beat(self) -> None:
        """The trial is alive; called about twice a second."""


class Runner(Protocol):
    """Runs a trial to its end."""

    def __call__(self, job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        """Run it, until it ends, the watch says so, or ``stop`` is set."""


def run_trial(job: Job, watch: Watch, stop: threading.Event) -> Outcome:
    """Run a trial as a process of its own, because the ranks of one training must not draw values of their own."""
    place = ["--name", job.name, "--runs", str(job.folder / "trials")]
    if job.resumes is not None:
        place += ["--ckpt_path", str(job.resumes)]
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        process = start_process(["experiments", *job.arguments, *place], log, environment=job.environment)
    told = 0
    try:
        watch.started(process.pid)
        while process.poll() is None:
            watch.beat()
            values = logged_values(_run_directory(job), job.metric.name)
            for number in range(told, len(values)):
                told = number + 1
                if watch.epoch(told, values[number]) and process.poll() is None:
                    stop_process(process)
                    return _ended(job, "pruned")
            if stop.wait(_POLL_SECONDS):
                stop_process(process)
                return _ended(job, "stopped")
    finally:
        stop_process(process)
    if process.returncode in _TERMINATED and stop.wait(_SECONDS_TO_AGREE):
        return _ended(job, "stopped")
    if process.returncode != 0:
        return _ended(job, "failed", error=last_error(job.log, process.returncode))
    ended = _ended(job, "complete")
    # The last epochs may have come between two looks; an ended trial is not pruned any more.
    for number, value in enumerate(logged_values(ended.run, job.metric.name)[told:], told + 1):
        watch.epoch(number, value)
    if ended.value is None:
        return _ended(job, "failed", error=f"{job.metric.name} was never logged as a finite number; see {ended.run}")
    return ended


def logged_values(run: Path | None, metric: str) -> list[float]:
    """All values of a metric in a run's ``metrics.csv`` until now, in the order of time; none where there is no file.

    A line that is just being written is left for the next look.
    """
    path = run / Run.METRICS if run else None
    if path is None or not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    return [float(row[metric]) for row in rows if row.get(metric)]


def last_error(log: Path, code: int) -> str:
    """The line that says why a process failed: its last ``error: …``, or else its last line at all."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = (errors or lines or [f"nothing was printed; see {log}"])[-1]
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"{how}: {said}"[:500]


def _ended(job: Job, state: Literal["complete", "pruned", "failed", "stopped"], error: str | None = None) -> Outcome:
    run = _run_directory(job)
    values = logged_values(run, job.metric.name)
    finite = [value for value in values if math.isfinite(value)]
    best = min(finite, key=lambda value: job.metric.sign * value, default=None)
    return Outcome(state, best, len(values), run, error)


def _run_directory(job: Job) -> Path | None:
    """Where the run writes; None before it has begun. A trial has one run only, and its own name."""
    own = next(iter((job.folder / "trials" / job.name).glob("*/")), None)
    # An interrupted run whose experiment has been changed since does not go on: `fit` makes a new one.
    return own or (job.resumes.parent.parent if job.resumes else None)


_LOOK_SECONDS = 1.0
_PROCESS, _ARGUMENTS, _RESUMES = "process", "arguments", "resumes"
_STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


class Workers:
    """Run a sweep's trials, several at once.

    Args:
        study: where trials come from.
        folder: of the sweep.
        runner: runs one trial.
        more: arguments for every trial.
        console: is told how it goes.
    """

    def __init__(self, study: SweepStudy, folder: Path, runner: Runner, more: list[str], console: Console) -> None:
        self._study = study
        self._folder = folder
        self._runner = runner
        self._more = more
        self._console = console
        self._stop = threading.Event()
        self._count = 0
        self._refusal = ""
        self._at_work: set[int] = set()

    @property
    def refusal(self) -> str:
        """Why the sweep was ended: a mistake that stopped every trial so far; empty where some trial has begun well."""
        return "" if self._study.has_progress() else self._refusal

    def run(self, count: int, workers: int, gpus: list[str]) -> signal.Signals | None:
        """Run until no trial waits.

        Args:
            count: of trials in all.
            workers: how many at once.
            gpus: one for each worker in turn.

        Returns:
            The signal that stopped it before, if any: Ctrl-C or SIGTERM.
        """
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._count = count
        came: signal.Signals | None = None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress, ThreadPoolExecutor(workers) as pool:
            bar = progress.add_task("sweep", total=count)
            at_work = [pool.submit(self._work, self._environment(index, workers, gpus)) for index in range(workers)]
            before = signal.signal(signal.SIGTERM, _terminate)
            try:
                while any(not worker.done() for worker in at_work):
                    progress.update(bar, description=self._described(), completed=self._ended())
                    _wait(at_work)
            except KeyboardInterrupt as stopped:
                came = signal.SIGTERM if isinstance(stopped, _Terminated) else signal.SIGINT
                self._console.print("Stopping: the trials that run are asked to save and to end.")
                self._stop.set()
            finally:
                signal.signal(signal.SIGTERM, before)
            progress.update(bar, description=self._described(), completed=self._ended())
        for worker in at_work:
            worker.result()
        return came

    def _work(self, environment: dict[str, str]) -> None:
        waiting_for: set[int] = set()
        try:
            while not self._stop.is_set() and not self._study.target_reached():
                if self.refusal:
                    # Others may be of a part of the space that is all right: only what runs is waited for.
                    if not self._at_work:
                        return
                    self._stop.wait(_LOOK_SECONDS)
                    continue
                if (claim := self._study.take(self._count)) is not None:
                    self._run(claim, environment)
                    continue
                if self._study.find_lost():
                    self._study.ask_for(self._count)
                    continue
                elsewhere = {trial.number for trial in self._study.running_elsewhere()}
                if not elsewhere:
                    return
                if elsewhere - waiting_for:
                    names = ", ".join(map(trial_name, sorted(elsewhere)))
                    self._console.print(f"Waiting for {names} of another process; Ctrl-C ends this one only.")
                    waiting_for |= elsewhere
                self._stop.wait(_LOOK_SECONDS)
        except BaseException:
            # The others must not go on for hours before this is told.
            self._stop.set()
            raise

    def _run(self, claim: Claim, environment: dict[str, str]) -> None:
        trial, metric = claim.trial, self._study.sweep.metric
        # The epoch that is kept is the one that the sweep judges by.
        monitor = [f"--checkpoint.monitor={metric.name}", f"--checkpoint.mode={metric.goal[:3]}"]
        arguments = self._study.sweep.arguments(claim.values, [*self._more, *monitor])
        outcome: Outcome | None = None
        self._at_work.add(trial.number)
        try:
            job = Job(trial.number, arguments, metric, self._folder, environment, self._to_go_on_with(trial, arguments))
            outcome = self._runner(job, _Watch(self._study, trial), self._stop)
        except BaseException:
            self._hand_back(trial)
            raise
        finally:
            # Before it counts as ended nobody may take the sweep for refused, and after it nobody may wait for it.
            if outcome is not None and outcome.state != "stopped":
                self._study.tell(trial, _STATES[outcome.state], outcome.value, _facts(outcome))
                self._refusal = self._refusal or outcome.refusal
            self._at_work.discard(trial.number)
        if outcome.state == "stopped":
            self._hand_back(trial)
            return
        values = " ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in claim.values.items()
        )
        # A training that has diverged may be stopped before it has shown any number.
        value = "nan" if outcome.value is None else f"{outcome.value:.4g}"
        result = outcome.error or f"{metric.name} {value}"
        line = f"{job.name} {outcome.state}: {values}: {result}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _hand_back(self, trial: Trial) -> None:
        """Let somebody else run a trial: another machine, or this one later."""
        self._study.give_up(trial)
        self._study.ask_for(self._count)

    def _to_go_on_with(self, trial: Trial, arguments: list[str]) -> Path | None:
        """Last checkpoint of the lost trial that this one replaces, where it lies here and nobody writes there."""
        trial.set_user_attr(_ARGUMENTS, arguments)
        before = self._study.lost_before(trial)
        if before is None or before.user_attrs.get(_ARGUMENTS) != arguments or _PROCESS not in before.user_attrs:
            return None
        # When its sweep was killed, it was asked to end, and may still be writing.
        until = time.monotonic() + STOP_TIMEOUT
        while (gone := is_gone(before.user_attrs[_PROCESS])) is False and time.monotonic() < until:
            self._stop.wait(_LOOK_SECONDS)
        found = self._folder.glob(f"trials/{trial_name(before.number)}/*/{Run.LAST}")
        path = next(found, None) or Path(before.user_attrs.get(_RESUMES, ""))
        if not gone or not path.is_file():
            return None
        trial.set_user_attr(_RESUMES, str(path))
        self._console.print(
            f"{trial_name(trial.number)} goes on from {path}", highlight=False, soft_wrap=True, markup=False
        )
        return path

    def _described(self) -> str:
        trials = self._study.trials()
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        best = best_trial(trials, self._study.sweep.metric)
        return f"{running} running" + (f", best {value_of(best):.4g}" if best else "")

    def _ended(self) -> int:
        trials = [trial for trial in self._study.trials() if trial.user_attrs[SLOT] < self._count]
        # One that failed may be there again.
        open_slots = {trial.user_attrs[SLOT] for trial in trials if not trial.state.is_finished()}
        return len({trial.user_attrs[SLOT] for trial in trials} - open_slots)

    @staticmethod
    def _environment(index: int, workers: int, gpus: list[str]) -> dict[str, str]:
        """A worker's share of the machine."""
        environment = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}
        if workers > 1 and "OMP_NUM_THREADS" not in os.environ:
            # Each process would take all cores, and they would stand in each other's way.
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
        return environment


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which asks for the same as Ctrl-C."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


class _Watch:
    """Report a trial's epochs to the study and ask whether it is worth going on."""

    def __init__(self, study: SweepStudy, trial: Trial) -> None:
        self._study = study
        self._trial = trial
        self._beats = 0
        self._next = time.monotonic() + BEAT_SECONDS

    def started(self, process: int) -> None:
        """Note the process, because whoever runs the trial again must know whether it still writes."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._trial.set_user_attr(_PROCESS, name_of(process))

    def epoch(self, number: int, value: float) -> bool:
        """Report a value; whether hyperband ends the trial."""
        try:
            self._trial.report(value, step=number)
        except UpdateFinishedTrialError:
            # Others took it for lost and run it again.
            return True
        return self._study.should_stop(self._trial)

    def beat(self) -> None:
        """Say from time to time that the trial is alive."""
        if time.monotonic() >= self._next:
            self._beats += 1
            self._next = time.monotonic() + BEAT_SECONDS
            with contextlib.suppress(UpdateFinishedTrialError):
                self._trial.set_user_attr(BEAT, self._beats)


def _facts(outcome: Outcome) -> dict[str, Any]:
    facts: dict[str, Any] = {EPOCHS: outcome.epochs}
    if outcome.run is not None:
        facts[RUN] = str(outcome.run)
        # In the database, because other machines may not see the directory.
        if (config := outcome.run / Run.CONFIG).is_file():
            facts[CONFIG] = config.read_text(encoding="utf-8")
    if outcome.error is not None:
        facts[ERROR] = outcome.error
    if outcome.value is not None:
        facts[BEST_VALUE] = outcome.value
    return facts


def _wait(at_work: list[Future[None]]) -> None:
    for worker in at_work:
        if not worker.done():
            try:
                worker.exception(timeout=_LOOK_SECONDS / len(at_work))
            except TimeoutError:
                continue
