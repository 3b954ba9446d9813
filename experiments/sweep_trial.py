"""One trial of a sweep: a ``fit`` in a process of its own, watched through the files of its run directory."""

from __future__ import annotations

import csv
import io
import math
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from experiments.sweep_file import Metric
from vitrail.errors import EXIT_USER_ERROR
from vitrail.runtime import begin_process, end_process

_POLL_SECONDS = 0.5
_TERMINATED = {-signal.SIGTERM, 128 + signal.SIGTERM}
_REFUSED = f"exit code {EXIT_USER_ERROR}: "
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


def trial_name(number: int) -> str:
    """Name of a trial's run."""
    return f"trial-{number:04d}"


def run_trial(job: Job, watch: Watch, stop: threading.Event) -> Outcome:
    """Run a trial as a process of its own, because the ranks of one training must not draw values of their own."""
    place = ["--name", job.name, "--runs", str(job.folder / "trials")]
    if job.resumes is not None:
        place += ["--ckpt_path", str(job.resumes)]
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        process = begin_process(["experiments", *job.arguments, *place], log, environment=job.environment)
    told = 0
    try:
        watch.started(process.pid)
        while process.poll() is None:
            watch.beat()
            values = logged_values(_run_directory(job), job.metric.name)
            for number in range(told, len(values)):
                told = number + 1
                if watch.epoch(told, values[number]) and process.poll() is None:
                    end_process(process)
                    return _ended(job, "pruned")
            if stop.wait(_POLL_SECONDS):
                end_process(process)
                return _ended(job, "stopped")
    finally:
        end_process(process)
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
    path = run / "metrics.csv" if run else None
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
