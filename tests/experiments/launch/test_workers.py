"""One trial as a process: how it is started, watched, ended. ``experiments`` is a stand-in that starts at once."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest

from experiments.launch import workers
from experiments.launch.sweep_file import Metric
from experiments.launch.workers import Job, Watch, last_error, logged_values, run_trial

STAND_IN = r"""
import os, pathlib, sys, time
arguments = sys.argv[1:]
run = pathlib.Path(arguments[arguments.index("--runs") + 1], arguments[arguments.index("--name") + 1], "now")
run.mkdir(parents=True)
values, wait = arguments[1].split(","), float(arguments[2])
print("OMP", os.environ.get("OMP_NUM_THREADS"), os.environ.get("LOCAL_RANK"), os.getpid(), flush=True)
with (run / "metrics.csv").open("w") as file:
    file.write("epoch,val/loss,step\n")
    for epoch, value in enumerate(values):
        if value == "error":
            sys.exit("error: the key is wrong")
        file.write(f"{epoch},,1\n{epoch},{value},1\n")
        file.flush()
        time.sleep(wait)
"""


class Noted(Watch):
    """Keeps what is reported; stops a trial at a value."""

    def __init__(self, stop_at: float | None = None) -> None:
        self.reported: list[tuple[int, float]] = []
        self.checkpoint: Path | None = None
        self.stop_at = stop_at

    def resumed(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint

    def epoch(self, number: int, value: float) -> bool:
        self.reported.append((number, value))
        return value == self.stop_at

    def beat(self) -> None:
        pass


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiments.py").write_text(STAND_IN)
    # Python looks for modules where it is started.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "3")


def job(tmp_path: Path, values: str, wait: float = 0.0, goal: str = "minimize") -> Job:
    metric = Metric("val/loss", goal)  # type: ignore[arg-type]  # one of the two
    place, log = tmp_path / "sweep" / "trials" / "trial-0007", tmp_path / "sweep" / "logs" / "trial-0007.log"
    return Job(place, ["fit", values, str(wait)], metric, log, {"OMP_NUM_THREADS": "5"})


@pytest.mark.usefixtures("stand_in")
def test_a_trial_ends_with_its_best_epoch(tmp_path: Path) -> None:
    watch = Noted()
    outcome = run_trial(job(tmp_path, "0.5,0.2,nan,0.3"), watch, threading.Event())
    assert (outcome.state, outcome.value, outcome.epochs) == ("complete", 0.2, 4)
    assert outcome.run == tmp_path / "sweep" / "trials" / "trial-0007" / "now"
    assert [number for number, _ in watch.reported] == [1, 2, 3, 4]
    assert watch.reported[1] == (2, 0.2)
    # Its share of the machine, and nothing of a launcher around it.
    assert "OMP 5 None" in (tmp_path / "sweep" / "logs" / "trial-0007.log").read_text()


@pytest.mark.usefixtures("stand_in")
def test_higher_is_better_where_that_is_the_goal(tmp_path: Path) -> None:
    assert run_trial(job(tmp_path, "0.5,0.2", goal="maximize"), Noted(), threading.Event()).value == 0.5


@pytest.mark.usefixtures("stand_in")
def test_a_weak_trial_is_ended(tmp_path: Path) -> None:
    outcome = run_trial(job(tmp_path, "0.9,0.8,0.7", wait=30), Noted(stop_at=0.9), threading.Event())
    assert (outcome.state, outcome.epochs) == ("pruned", 1)
    # A trial that has ended anyway is complete.
    outcome = run_trial(job(tmp_path / "other", "0.9,0.8"), Noted(stop_at=0.8), threading.Event())
    assert outcome.state == "complete"


@pytest.mark.usefixtures("stand_in")
def test_failures_have_a_reason(tmp_path: Path) -> None:
    outcome = run_trial(job(tmp_path, "0.5,error"), Noted(), threading.Event())
    assert outcome.state == "failed"
    assert outcome.error == "exit code 1: the key is wrong"
    outcome = run_trial(job(tmp_path / "other", "nan"), Noted(), threading.Event())
    assert outcome.state == "failed"
    assert outcome.error is not None
    assert outcome.error.startswith("val/loss was never logged as a finite number")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("with_its_sweep", [True, False])
def test_a_terminated_trial_is_stopped_if_its_sweep_is_terminated_too(
    tmp_path: Path, with_its_sweep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_SECONDS_TO_AGREE", 0.5)
    stop, the_job = threading.Event(), job(tmp_path, "0.9,0.8", wait=30)

    class Scheduler(Noted):
        """Ends the trial first, as it may happen, and then its sweep."""

        def epoch(self, number: int, value: float) -> bool:
            process = int(the_job.log.read_text().split()[-1])
            os.kill(process, signal.SIGTERM)
            while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                threading.Event().wait(0.02)
            if with_its_sweep:
                threading.Timer(0.1, stop.set).start()
            return False

    # The handler of `fit` ends with 143; the stand-in has none.
    outcome = run_trial(the_job, Scheduler(), stop)
    assert outcome.state == ("stopped" if with_its_sweep else "failed")
    assert str(outcome.error).startswith("None" if with_its_sweep else "SIGTERM: OMP 5 None")


@pytest.mark.usefixtures("stand_in")
def test_an_interrupted_trial_goes_on_in_its_directory(tmp_path: Path) -> None:
    one = job(tmp_path, "0.9")
    stopped = threading.Event()
    stopped.set()
    assert run_trial(one, Noted(), stopped).state == "stopped"
    run = one.place / "earlier"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.csv").write_text("epoch,val/loss,step\n0,0.4,1\n")
    checkpoint = run / "checkpoints" / "last.ckpt"
    checkpoint.touch()
    (tmp_path / "experiments.py").write_text("import sys; print(sys.argv[-2:])")
    watch = Noted()
    outcome = run_trial(one, watch, threading.Event())
    assert (outcome.state, outcome.run, outcome.value, watch.checkpoint) == ("complete", run, 0.4, checkpoint)
    assert f"['--ckpt_path', '{checkpoint}']" in one.log.read_text()
    # Where `fit` began a run of its own, because the experiment is not the same any more, that is what counts.
    (tmp_path / "experiments.py").write_text(STAND_IN)
    outcome = run_trial(one, Noted(), threading.Event())
    assert (outcome.run, outcome.value) == (one.place / "now", 0.9)


def _refuse(source: Path, target: Path) -> None:
    """As Windows does, where a process has the file open."""
    assert source == target
    raise PermissionError(13, "used by another process")


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    "why", ["failed before", "failed, then killed early", "other arguments", "still running", "open on Windows"]
)
def test_a_trial_begins_again_where_it_cannot_go_on(tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "STOP_TIMEOUT", 0.5)
    one = job(tmp_path, "0.9")
    run = one.place / "earlier"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    (run / "metrics.csv").write_text("epoch,val/loss,step\n0,0.4,1\n")
    if why == "failed, then killed early":
        (one.place / "later").mkdir()
        (one.place / "later" / "metrics.csv").write_text("epoch,val/loss,step\n")
    one.log.parent.mkdir()
    one.log.write_text(f"$ python -m experiments fit {'0.8' if why == 'other arguments' else '0.9'} 0.0\n")
    with one.log.open("a") as file:
        writer = subprocess.Popen(["sleep", "60"], stdout=file) if why == "still running" else None
        if writer is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
    if why == "open on Windows":
        monkeypatch.setitem(sys.modules, "fcntl", cast("ModuleType", None))
        monkeypatch.setattr(os, "rename", _refuse)
    watch = Noted()
    try:
        outcome = run_trial(replace(one, is_fresh=why == "failed before"), watch, threading.Event())
    finally:
        if writer is not None:
            writer.kill()
            writer.wait()
    # What the earlier attempt logged is not taken for this one's.
    assert (watch.checkpoint, outcome.run, watch.reported) == (None, one.place / "now", [(1, 0.9)])


@pytest.mark.usefixtures("stand_in")
def test_a_sweep_that_stops_ends_its_trials(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    assert run_trial(job(tmp_path, "0.9", wait=30), Noted(), stop).state == "stopped"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
@pytest.mark.usefixtures("stand_in")
def test_a_trial_ends_with_its_killed_sweep(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    root = Path(__file__).parents[3]
    script.write_text(
        # The stand-in is for the trial only.
        f"import sys, threading; sys.path[0] = {str(root)!r}\n"
        "from pathlib import Path\n"
        "from tests.experiments.launch.test_workers import Noted, job\n"
        "from experiments.launch.workers import run_trial\n"
        f"run_trial(job(Path({str(tmp_path)!r}), '0.9', wait=60), Noted(), threading.Event())\n"
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
