"""The workers of a sweep: threads that take trials, run each as a ``fit`` in a process of its own, and record the end.

A trial is watched through the files of its run directory. Its log begins with its command and is locked as long as any
of its processes lives, so that a later attempt knows whether it is the same training and whether it still writes.
"""

from __future__ import annotations

import csv
import io
import math
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from optuna.trial import TrialState

from experiments.launch.study import (
    BEST_VALUE,
    CONFIG,
    EPOCHS,
    ERROR,
    NAME,
    RUN,
    SLOT,
    Claim,
    Outcome,
    SweepStudy,
    best_trial,
    value_of,
)
from experiments.launch.sweep_file import Metric, slug_of
from vitrail.config import dump_yaml
from vitrail.files import write_text_atomically
from vitrail.runs import Run, is_run
from vitrail.runtime import STOP_TIMEOUT, start_process, stop_process

if TYPE_CHECKING:
    from rich.console import Console

_LOOK_SECONDS = 1.0
_POLL_SECONDS = 0.5
_SECONDS_TO_AGREE = 3.0
"""A scheduler that ends a job sends SIGTERM to all its processes, and a trial may be quicker than its sweep."""
_TERMINATED = {-signal.SIGTERM, 128 + signal.SIGTERM}
_STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


@dataclass(frozen=True)
class Job:
    """What a trial runs.

    Attributes:
        place: directory of its runs, the last part is their name.
        arguments: after ``python -m experiments``.
        metric: what is watched.
        log: file for what the process prints.
        environment: what is different in the process's environment.
        is_fresh: whether an earlier run of the same arguments is not continued.
    """

    place: Path
    arguments: Sequence[str]
    metric: Metric
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    is_fresh: bool = False

    @property
    def name(self) -> str:
        """The run's name."""
        return self.place.name


class Watch:
    """Reports a trial's epochs to the study."""

    def __init__(self, study: SweepStudy, claim: Claim, console: Console) -> None:
        self._study, self._claim, self._console = study, claim, console
        self._best = math.inf

    def resumed(self, checkpoint: Path) -> None:
        """The trial goes on from a checkpoint."""
        name = checkpoint.parents[2].name
        line = f"{name} goes on from {checkpoint}"
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def epoch(self, number: int, value: float) -> bool:
        """Report a value; return whether the trial should stop."""
        rule, sign = self._study.sweep.early_stopping, self._study.sweep.metric.sign
        self._best = min(self._best, sign * value) if not math.isnan(value) else self._best
        if rule is not None and not rule.strict and math.isfinite(self._best):
            value = sign * self._best
        return self._study.report(self._claim.trial, number, value)

    def beat(self) -> None:
        """The trial is alive; called about twice a second."""
        self._study.beat(self._claim.trial)


Runner = Callable[[Job, Watch, threading.Event], Outcome]


def run_trial(job: Job, watch: Watch, stop: threading.Event) -> Outcome:
    """Run a trial until it ends, the watch stops it, or the event is set.

    It is a process of its own, because the ranks of one training must not sample values of their own.
    """
    before = set(job.place.glob("*/"))
    with _locked(job.log, watch, stop) as (log, is_free):
        checkpoint = _checkpoint(job, log) if is_free else None
        place = ["--name", job.name, "--runs", str(job.place.parent)]
        if checkpoint is not None:
            place += ["--ckpt_path", str(checkpoint)]
            watch.resumed(checkpoint)
            before.discard(checkpoint.parents[1])
        else:
            log.truncate(0)
            log.write(_first_line(job))
        log.flush()
        process = start_process(["experiments", *job.arguments, *place], log, environment=job.environment)
    reported = 0
    try:
        while process.poll() is None:
            watch.beat()
            values = logged_values(_run_directory(job, before), job.metric.name)
            for number in range(reported, len(values)):
                reported = number + 1
                if watch.epoch(reported, values[number]) and process.poll() is None:
                    stop_process(process)
                    return ended(job, "pruned", before)
            if stop.wait(_POLL_SECONDS):
                stop_process(process)
                return ended(job, "stopped", before)
    finally:
        stop_process(process)
    if process.returncode in _TERMINATED and stop.wait(_SECONDS_TO_AGREE):
        return ended(job, "stopped", before)
    if process.returncode != 0:
        return ended(job, "failed", before, error=last_error(job.log, process.returncode))
    outcome = ended(job, "complete", before)
    # The last epochs may have come between two looks; an ended trial is not pruned any more.
    for number, value in enumerate(logged_values(outcome.run, job.metric.name)[reported:], reported + 1):
        watch.epoch(number, value)
    if outcome.value is None:
        error = f"{job.metric.name} was never logged as a finite number; see {outcome.run}"
        return ended(job, "failed", before, error=error)
    return outcome


def logged_values(run: Path | None, metric: str) -> list[float]:
    """Return all values of a metric in a run's ``metrics.csv`` until now, in the order of time; none without a file.

    A line that is just being written is left for the next look.
    """
    path = run / Run.METRICS if run else None
    if path is None or not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    return [float(row[metric]) for row in rows if row.get(metric)]


def last_error(log: Path, code: int) -> str:
    """Return the line with the reason why a process failed: its last ``error: …``, or its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    others = [line for line in lines if not line.startswith("$ ")]
    reason = (errors or others or [f"nothing was printed; see {log}"])[-1]
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"{how}: {reason}"[:500]


def ended(
    job: Job,
    state: Literal["complete", "pruned", "failed", "stopped"],
    before: set[Path],
    error: str | None = None,
) -> Outcome:
    """Return how a trial ended."""
    run = _run_directory(job, before)
    values = logged_values(run, job.metric.name)
    finite = [value for value in values if math.isfinite(value)]
    best = min(finite, key=lambda value: job.metric.sign * value, default=None)
    return Outcome(state, best, len(values), run, error)


def _run_directory(job: Job, before: set[Path]) -> Path | None:
    """Where the run writes; None before it has begun. A continued run whose experiment has changed makes a new one."""
    return max(set(job.place.glob("*/")) - before, key=lambda path: path.stat().st_mtime, default=None)


@contextmanager
def _locked(path: Path, watch: Watch, stop: threading.Event) -> Iterator[tuple[IO[bytes], bool]]:
    """A trial's log, and whether no process of an earlier attempt writes any more; one that was asked to end may."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def wait_for(is_free: Callable[[], bool]) -> bool:
        until = time.monotonic() + STOP_TIMEOUT
        while not (found := is_free()) and time.monotonic() < until and not stop.is_set():
            watch.beat()
            stop.wait(_POLL_SECONDS)
        return found

    is_closed = wait_for(lambda: _is_closed(path))
    with path.open("a+b") as log:
        yield log, is_closed and wait_for(lambda: _try_lock(log))


def _is_closed(path: Path) -> bool:
    """Windows has no locks that are inherited, but renames no file that a process has open; others do not mind."""
    try:
        path.rename(path)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    return True


def _try_lock(file: IO[bytes]) -> bool:
    """The lock is the open file's, which the trial's processes inherit, so it ends with the last of them."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        return not isinstance(error, BlockingIOError)
    return True


def _first_line(job: Job) -> bytes:
    return f"$ python -m experiments {shlex.join(job.arguments)}\n".encode()


def _checkpoint(job: Job, log: IO[bytes]) -> Path | None:
    """Last checkpoint of an interrupted attempt with the same arguments."""
    log.seek(0)
    if job.is_fresh or log.readline() != _first_line(job):
        return None
    # Of the newest run alone: one before it may have failed, and been begun again.
    newest = max((path for path in job.place.glob("*/") if is_run(path)), default=None)
    return newest / Run.LAST if newest is not None and (newest / Run.LAST).is_file() else None


class Workers:
    """Run a sweep's trials, several at once."""

    def __init__(self, study: SweepStudy, folder: Path, runner: Runner, more: Sequence[str], console: Console) -> None:
        self._study, self._folder, self._runner, self._more, self._console = study, folder, runner, more, console
        self._stop = threading.Event()
        self._count = 0
        self._refusal = ""
        self._at_work: set[int] = set()

    @property
    def refusal(self) -> str:
        """The mistake that stopped every trial so far, which ends the sweep; empty where some trial has begun well."""
        return "" if self._study.has_progress() else self._refusal

    def run(self, count: int, workers: int, gpus: list[str]) -> int:
        """Run until no trial is left.

        Returns:
            The signal that stopped it before, SIGINT or SIGTERM; 0 for none.
        """
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._count = count
        for name, changes in self._study.sweep.overlays.items():
            write_text_atomically(self._folder / "overlays" / f"{slug_of(name)}.yaml", dump_yaml(changes))
        came = [0]

        def stopped(number: int, frame: object) -> None:
            came[0] = number
            self._stop.set()

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=self._console) as progress, ThreadPoolExecutor(workers) as pool:
            bar = progress.add_task("sweep", total=count)
            handlers = {number: signal.signal(number, stopped) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                running = {pool.submit(self._work, self._environment(index, workers, gpus)) for index in range(workers)}
                at_work = running
                while at_work:
                    progress.update(bar, description=self._description(), completed=self._ended())
                    at_work = wait(at_work, _LOOK_SECONDS).not_done
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
            progress.update(bar, description=self._description(), completed=self._ended())
        for worker in running:
            worker.result()
        return came[0]

    def _work(self, environment: dict[str, str]) -> None:
        waiting_for: set[str] = set()
        try:
            while not self._stop.is_set() and not self._study.target_reached():
                if self.refusal:
                    # Others may be in a part of the space that is valid: only what runs is waited for.
                    if not self._at_work:
                        return
                elif (claim := self._study.take(self._count)) is not None:
                    self._run(claim, environment)
                    continue
                elif not (elsewhere := self._study.running_elsewhere()):
                    return
                elif names := {trial.user_attrs.get(NAME, "a trial") for trial in elsewhere} - waiting_for:
                    waiting_for |= names
                    self._console.print(
                        f"Waiting for {', '.join(sorted(names))} of another process; Ctrl-C ends this one only."
                    )
                self._stop.wait(_LOOK_SECONDS)
        except BaseException:
            # The others must not go on for hours before this is shown.
            self._stop.set()
            raise

    def _run(self, claim: Claim, environment: dict[str, str]) -> None:
        trial, sweep = claim.trial, self._study.sweep
        metric, place = sweep.metric, sweep.place(claim.slot, claim.values)
        # The epoch that is kept is the one that the sweep selects by.
        monitor = [f"--checkpoint.monitor={metric.name}", f"--checkpoint.mode={metric.goal[:3]}"]
        arguments = sweep.arguments(claim.values, [*self._more, *monitor], self._folder / "overlays")
        log = self._folder / "logs" / f"{place.name}.log"
        job = Job(self._folder / place, arguments, metric, log, environment, claim.is_fresh)
        outcome = Outcome("stopped")
        self._at_work.add(trial.number)
        try:
            outcome = self._runner(job, Watch(self._study, claim, self._console), self._stop)
        finally:
            # Before it counts as ended the sweep must not count as refused, and after it nothing may wait for it.
            if outcome.state == "stopped":
                self._study.hand_back(trial)
            else:
                self._study.end(trial, _STATES[outcome.state], outcome.value, _facts(outcome))
                self._refusal = self._refusal or outcome.refusal
            self._at_work.discard(trial.number)
        if outcome.state == "stopped":
            return
        values = " ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in claim.values.items()
        )
        # A training that has diverged may be stopped before it has shown any number.
        value = "nan" if outcome.value is None else f"{outcome.value:.4g}"
        line = f"{job.name} {outcome.state}: {values}: {outcome.error or f'{metric.name} {value}'}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _description(self) -> str:
        trials = self._study.trials()
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        best = best_trial(trials, self._study.sweep.metric)
        return f"{running} running" + (f", best {value_of(best):.4g}" if best else "")

    def _ended(self) -> int:
        trials = self._study.trials()
        return sum(trial.state.is_finished() and trial.user_attrs.get(SLOT, 0) < self._count for trial in trials)

    @staticmethod
    def _environment(index: int, workers: int, gpus: list[str]) -> dict[str, str]:
        """A worker's share of the machine."""
        environment = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}
        if workers > 1 and "OMP_NUM_THREADS" not in os.environ:
            # Each process would take all cores, and slow the others down; num_workers: auto goes by the second one.
            share = str(max(1, (os.cpu_count() or 1) // workers))
            environment |= {"OMP_NUM_THREADS": share, "LOKY_MAX_CPU_COUNT": share}
        return environment


def _facts(outcome: Outcome) -> dict[str, Any]:
    config = outcome.run / Run.CONFIG if outcome.run else None
    facts = {
        EPOCHS: outcome.epochs,
        RUN: outcome.run and str(outcome.run),
        # In the database, because other machines may not see the directory.
        CONFIG: config.read_text(encoding="utf-8") if config and config.is_file() else None,
        ERROR: outcome.error,
        BEST_VALUE: outcome.value,
    }
    return {key: fact for key, fact in facts.items() if fact is not None}
