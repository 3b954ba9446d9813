"""One trial as a process: how it is started, watched, ended. ``experiments`` is a stand-in that starts at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.launch import workers as sweep_trial
from experiments.launch.sweep_file import Metric
from experiments.launch.workers import Job, last_error, logged_values, run_trial

STAND_IN = r"""
import os, pathlib, sys, time
arguments = sys.argv[1:]
run = pathlib.Path(arguments[arguments.index("--runs") + 1], arguments[arguments.index("--name") + 1], "now")
run.mkdir(parents=True)
values, wait = arguments[1].split(","), float(arguments[2])
print("OMP", os.environ.get("OMP_NUM_THREADS"), os.environ.get("LOCAL_RANK"))
with (run / "metrics.csv").open("w") as file:
    file.write("epoch,val/loss,step\n")
    for epoch, value in enumerate(values):
        if value == "error":
            sys.exit("error: the key is wrong")
        file.write(f"{epoch},,1\n{epoch},{value},1\n")
        file.flush()
        time.sleep(wait)
"""


class Watch:
    """Keeps what it is told; stops a trial at a value."""

    def __init__(self, stop_at: float | None = None) -> None:
        self.told: list[tuple[int, float]] = []
        self.process = 0
        self.beats = 0
        self.stop_at = stop_at

    def started(self, process: int) -> None:
        self.process = process

    def epoch(self, number: int, value: float) -> bool:
        self.told.append((number, value))
        return value == self.stop_at

    def beat(self) -> None:
        self.beats += 1


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiments.py").write_text(STAND_IN)
    # Python looks for modules where it is started.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "3")


def job(tmp_path: Path, values: str, wait: float = 0.0, goal: str = "minimize") -> Job:
    metric = Metric("val/loss", goal)  # type: ignore[arg-type]  # one of the two
    return Job(7, ["fit", values, str(wait)], metric, tmp_path / "sweep", {"OMP_NUM_THREADS": "5"})


@pytest.mark.usefixtures("stand_in")
def test_a_trial_ends_with_its_best_epoch(tmp_path: Path) -> None:
    watch = Watch()
    outcome = run_trial(job(tmp_path, "0.5,0.2,nan,0.3"), watch, threading.Event())
    assert (outcome.state, outcome.value, outcome.epochs) == ("complete", 0.2, 4)
    assert outcome.run == tmp_path / "sweep" / "trials" / "trial-0007" / "now"
    assert [number for number, _ in watch.told] == [1, 2, 3, 4]
    assert watch.told[1] == (2, 0.2)
    # Its share of the machine, and nothing of a launcher around it.
    assert "OMP 5 None" in (tmp_path / "sweep" / "logs" / "trial-0007.log").read_text()


@pytest.mark.usefixtures("stand_in")
def test_higher_is_better_where_that_is_the_goal(tmp_path: Path) -> None:
    assert run_trial(job(tmp_path, "0.5,0.2", goal="maximize"), Watch(), threading.Event()).value == 0.5


@pytest.mark.usefixtures("stand_in")
def test_a_trial_that_is_not_worth_it_is_ended(tmp_path: Path) -> None:
    outcome = run_trial(job(tmp_path, "0.9,0.8,0.7", wait=30), Watch(stop_at=0.9), threading.Event())
    assert (outcome.state, outcome.epochs) == ("pruned", 1)
    # A trial that has ended anyway is complete.
    outcome = run_trial(job(tmp_path / "other", "0.9,0.8"), Watch(stop_at=0.8), threading.Event())
    assert outcome.state == "complete"


@pytest.mark.usefixtures("stand_in")
def test_failures_say_why(tmp_path: Path) -> None:
    outcome = run_trial(job(tmp_path, "0.5,error"), Watch(), threading.Event())
    assert outcome.state == "failed"
    assert outcome.error == "exit code 1: the key is wrong"
    outcome = run_trial(job(tmp_path / "other", "nan"), Watch(), threading.Event())
    assert outcome.state == "failed"
    assert outcome.error is not None
    assert outcome.error.startswith("val/loss was never logged as a finite number")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("sweep_is_told_too", [True, False])
def test_a_trial_that_is_told_to_end_is_stopped_if_its_sweep_is_told_too(
    tmp_path: Path, sweep_is_told_too: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_trial, "_SECONDS_TO_AGREE", 0.5)
    stop = threading.Event()

    class Scheduler(Watch):
        """Ends the trial first, as it may happen, and then its sweep."""

        def epoch(self, number: int, value: float) -> bool:
            os.kill(self.process, signal.SIGTERM)
            while Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                threading.Event().wait(0.02)
            if sweep_is_told_too:
                threading.Timer(0.1, stop.set).start()
            return False

    # The handler of `fit` ends with 143; the stand-in has none.
    outcome = run_trial(job(tmp_path, "0.9,0.8", wait=30), Scheduler(), stop)
    assert outcome.state == ("stopped" if sweep_is_told_too else "failed")
    assert outcome.error == (None if sweep_is_told_too else "SIGTERM: OMP 5 None")


@pytest.mark.usefixtures("stand_in")
def test_a_trial_goes_on_in_the_directory_of_the_interrupted_one(tmp_path: Path) -> None:
    run = tmp_path / "sweep" / "trials" / "trial-0003" / "now"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.csv").write_text("epoch,val/loss,step\n0,0.4,1\n")
    checkpoint = run / "checkpoints" / "last.ckpt"
    wait = STAND_IN.replace("run.mkdir(parents=True)", "print(arguments[-2:]); sys.exit(0)")
    (tmp_path / "experiments.py").write_text(wait)
    resumed = replace(job(tmp_path, "0.9"), resumes=checkpoint)
    outcome = run_trial(resumed, Watch(), threading.Event())
    assert (outcome.state, outcome.run, outcome.value) == ("complete", run, 0.4)
    assert f"['--ckpt_path', '{checkpoint}']" in resumed.log.read_text()
    # Where `fit` began a run of its own, because the experiment is not the same any more, that is what counts.
    (tmp_path / "experiments.py").write_text(STAND_IN)
    outcome = run_trial(resumed, Watch(), threading.Event())
    assert outcome.value == 0.9
    assert outcome.run == tmp_path / "sweep" / "trials" / "trial-0007" / "now"


@pytest.mark.usefixtures("stand_in")
def test_a_sweep_that_stops_ends_its_trials(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    assert run_trial(job(tmp_path, "0.9", wait=30), Watch(), stop).state == "stopped"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
@pytest.mark.usefixtures("stand_in")
def test_a_trial_ends_with_its_killed_sweep(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    root = Path(__file__).parents[3]
    script.write_text(
        # The stand-in is for the trial only.
        f"import sys, threading; sys.path[0] = {str(root)!r}\n"
        "from pathlib import Path\n"
        "from tests.experiments.launch.test_workers import Watch, job\n"
        "from experiments.launch.workers import run_trial\n"
        f"run_trial(job(Path({str(tmp_path)!r}), '0.9', wait=60), Watch(), threading.Event())\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)])
    try:
        child = None
        while child is None and parent.poll() is None:
            children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
            started = (tmp_path / "sweep" / "trials" / "trial-0007" / "now" / "metrics.csv").exists()
            child = int(children[0]) if children and started else None
        assert child is not None
    finally:
        parent.kill()
        parent.wait()
    assert _ended(child)


def _ended(process: int) -> bool:
    for _ in range(200):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        threading.Event().wait(0.05)
    return False


def test_a_half_written_line_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert logged_values(None, "val/loss") == []
    assert logged_values(tmp_path, "val/loss") == []
    path.write_text("epoch,val/loss\n0,0.5\n1,\n1,0.2")
    assert logged_values(tmp_path, "val/loss") == [0.5]
    path.write_text("epoch,val/loss\n0,0.5\n1,\n1,0.25\n")
    assert logged_values(tmp_path, "val/loss") == [0.5, 0.25]
    assert logged_values(tmp_path, "val/f1") == []


def test_the_last_error_is_found(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("epoch 1\nerror: model.lr: must be a number\nbye\n\n")
    assert last_error(log, 2) == "exit code 2: model.lr: must be a number"
    log.write_text("Traceback\nValueError: no\n")
    assert last_error(log, -signal.SIGKILL) == "SIGKILL: ValueError: no"
    log.write_text("")
    assert "nothing was printed" in last_error(log, 1)
