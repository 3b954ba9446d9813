"""``python -m experiments sweep``: from the file to the best configuration.

What depends on trials' results is tested with trials that are computed at once; ``test_sweep_resume.py`` trains.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from experiments.launch.study import Outcome
from experiments.launch.workers import Job, Watch
from tests.experiments.conftest import error_line, launch
from tests.experiments.launch.test_sweep_file import written

ROOT = Path(__file__).parents[3]
LR = {"model.lr": {"values": [0.1, 0.2, 0.3, 0.4]}}


class Trials:
    """Trials whose metric is a function of the learning rate; notes what it was asked for."""

    def __init__(self, epochs: int = 3, wrong: tuple[float, ...] = (), code: int = 2) -> None:
        self.jobs: list[Job] = []
        self.epochs = epochs
        self.wrong = wrong
        self.code = code

    def __call__(self, job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        self.jobs.append(job)
        flags = dict(argument[2:].split("=", 1) for argument in job.arguments if "=" in argument)
        lr = float(flags["model.lr"])
        if lr in self.wrong:
            return Outcome("failed", error=f"exit code {self.code}: model.lr: {lr} is wrong")
        run = job.place / "now"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump({"name": job.name, "runs": "x", "model": {"lr": lr}}))
        value = (lr - 0.31) ** 2
        for epoch in range(1, self.epochs + 1):
            if watch.epoch(epoch, value + 1 / epoch):
                return Outcome("pruned", value, epoch, run)
        return Outcome("complete", value, self.epochs, run)


def sweep(folder: Path, *arguments: str, trials: Trials | None = None, **changes: Any) -> int:
    path = written(folder, **{"parameters": LR, **changes})
    return launch("sweep", str(path), "--runs", str(folder / "runs"), *arguments, runner=trials or Trials())


def table(folder: Path, name: str = "sweep") -> pd.DataFrame:
    return pd.read_csv(folder / "runs" / "sweeps" / name / "sweep.csv")


def test_a_grid_ends_with_table_importance_and_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = Trials()
    parameters = {**LR, "trainer.max_epochs": {"values": [1, 2]}, "data.init_args.image.size": {"value": 32}}
    assert sweep(tmp_path, trials=trials, parameters=parameters) == 0
    frame = table(tmp_path)
    assert len(frame) == 8
    assert frame["state"].tolist() == ["complete"] * 8
    assert frame["val/loss"].is_monotonic_increasing
    assert frame["model.lr"].tolist()[:2] == [0.3, 0.3]
    folder = tmp_path / "runs" / "sweeps" / "sweep"
    shares = pd.read_csv(folder / "importance.csv").set_index("parameter")["importance"]
    # The metric depends on the learning rate alone.
    assert shares["model.lr"] > 0.95
    assert (folder / "importance.png").stat().st_size > 1000
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best == {"name": "sweep_best", "runs": str(tmp_path / "runs"), "model": {"lr": 0.3}}
    captured = capsys.readouterr()
    assert "grid, 8 trials" in captured.err
    assert "trial-0004" in captured.out
    assert f"fit --config {folder / 'best.yaml'}" in captured.out
    # Each trial gets the constant too, and keeps the epoch that the sweep compares.
    for flag in ("--data.init_args.image.size=32", "--checkpoint.monitor=val/loss", "--checkpoint.mode=min"):
        assert flag in trials.jobs[0].arguments


def test_workers_share_trials_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    trials = Trials()
    met = threading.Barrier(2, timeout=60)

    def together(job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        met.wait()
        return trials(job, watch, stop)

    path = written(tmp_path, parameters=LR)
    arguments = [str(path), "--runs", str(tmp_path / "runs"), "--workers", "2", "--gpus", "0", "3", "--", "--x=1"]
    assert launch("sweep", *arguments, runner=together) == 0
    assert sorted(table(tmp_path)["model.lr"]) == [0.1, 0.2, 0.3, 0.4]
    assert {job.environment["CUDA_VISIBLE_DEVICES"] for job in trials.jobs} == {"0", "3"}
    assert {job.environment["OMP_NUM_THREADS"] for job in trials.jobs} == {"4"}
    assert all("--x=1" in job.arguments for job in trials.jobs)


def test_a_failed_trial_is_reported_and_the_sweep_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, trials=Trials(wrong=(0.2, 0.3))) == 0
    frame = table(tmp_path)
    assert frame["state"].tolist() == ["complete", "complete", "failed", "failed"]
    assert frame["error"].tolist()[2] == "exit code 2: model.lr: 0.2 is wrong"
    assert "model.lr: 0.2 is wrong" in capsys.readouterr().err
    again = Trials()
    assert sweep(tmp_path, trials=again) == 0
    assert again.jobs == []
    capsys.readouterr()
    assert sweep(tmp_path, "--retry-failed", trials=again) == 0
    assert len(again.jobs) == 2
    # Points that are done, not attempts at them.
    assert "4/4" in capsys.readouterr().err
    assert table(tmp_path)["model.lr"].tolist()[0] == 0.3


def test_a_sweep_without_a_success_ends_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Of an earlier sweep.
    (tmp_path / "runs" / "sweeps" / "sweep").mkdir(parents=True)
    (tmp_path / "runs" / "sweeps" / "sweep" / "best.yaml").write_text("name: old\n")
    assert sweep(tmp_path, trials=Trials(wrong=(0.1, 0.2, 0.3, 0.4), code=1)) == 2
    line = error_line(capsys)
    assert "no trial of 4 was a success; the last error: exit code 1: model.lr: 0.4 is wrong" in line
    assert not (tmp_path / "runs" / "sweeps" / "sweep" / "best.yaml").exists()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_first_trial_that_is_refused_ends_the_sweep_with_its_line(
    tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = Trials(wrong=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8))
    parameters = {"model.lr": {"values": list(trials.wrong)}}
    assert sweep(tmp_path, "--workers", str(workers), trials=trials, parameters=parameters) == 2
    line = error_line(capsys)
    assert line.startswith("error: model.lr: 0.")
    # Those that had begun alongside it, and no more.
    assert 1 <= len(trials.jobs) <= workers
    assert set(table(tmp_path)["state"].dropna()) <= {"failed", "waiting"}
    # Once the mistake is mended, the same command runs all of them.
    mended = Trials()
    assert sweep(tmp_path, "--workers", str(workers), trials=mended, parameters=parameters) == 0
    frame = table(tmp_path)
    assert sorted(frame["model.lr"][frame["state"] == "complete"]) == list(trials.wrong)
    # Those that fail alongside others that work are left as they are.
    assert sweep(tmp_path, trials=mended, parameters=parameters) == 0
    assert len(mended.jobs) == len(trials.wrong)


def test_a_first_trial_that_crashes_is_run_again_only_if_asked(tmp_path: Path) -> None:
    assert sweep(tmp_path, "--count", "1", trials=Trials(wrong=(0.1,), code=1)) == 2
    again = Trials()
    assert sweep(tmp_path, "--count", "2", trials=again) == 0
    assert len(again.jobs) == 1
    assert sweep(tmp_path, "--count", "2", "--retry-failed", trials=again) == 0
    assert len(again.jobs) == 2


def test_the_refusal_of_a_first_trial_waits_for_those_that_run_at_the_same_time(tmp_path: Path) -> None:
    trials, refused = Trials(wrong=(0.1,)), threading.Event()

    def alongside(job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        is_first = job.name == "trial-0000"
        if not is_first:
            refused.wait(60)
        outcome = trials(job, watch, stop)
        if is_first:
            threading.Timer(1.5, refused.set).start()  # later than the refusal has been noted
        return outcome

    path = written(tmp_path, parameters=LR)
    assert launch("sweep", str(path), "--runs", str(tmp_path / "runs"), "--workers", "2", runner=alongside) == 0
    assert table(tmp_path)["state"].tolist() == ["complete"] * 3 + ["failed"]


def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, "--name", "../../x") == 2
    assert capsys.readouterr().err.startswith("error: --name")
    assert not (tmp_path / "runs").exists()


def test_hyperband_stops_the_weak_ones_and_records_it(tmp_path: Path) -> None:
    rule = {"type": "hyperband", "min_iter": 2, "eta": 2}
    parameters = {"model.lr": {"values": [0.9, 0.4, 0.1, 0.3, 0.5]}}
    assert sweep(tmp_path, early_terminate=rule, parameters=parameters) == 0
    frame = table(tmp_path).set_index("model.lr")
    # Each is the best so far but 0.1, the second of three, and 0.5, the third of five.
    states = {0.9: "complete", 0.4: "complete", 0.1: "pruned", 0.3: "complete", 0.5: "pruned"}
    assert frame["state"].to_dict() == states
    assert frame["epochs"].to_dict() == {lr: 3 if state == "complete" else 2 for lr, state in states.items()}


def test_a_diverged_trial_is_stopped_before_it_has_shown_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverging(job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        if job.name == "trial-0000":
            return Trials()(job, watch, stop)
        assert watch.epoch(1, float("nan"))
        return Outcome("pruned", None, 1)

    rule = {"type": "hyperband", "min_iter": 1, "eta": 3}
    path = written(tmp_path, parameters={"model.lr": {"values": [0.3, 0.4]}}, early_terminate=rule)
    assert launch("sweep", str(path), "--runs", str(tmp_path / "runs"), runner=diverging) == 0
    assert table(tmp_path)["state"].tolist() == ["complete", "pruned"]
    assert "trial-0001 pruned: model.lr=0.4: val/loss nan" in capsys.readouterr().err


def test_a_target_ends_the_sweep(tmp_path: Path) -> None:
    trials = Trials()
    assert sweep(tmp_path, trials=trials, metric={"name": "val/loss", "target": 0.02}) == 0
    assert len(trials.jobs) == 2
    assert table(tmp_path)["state"].tolist() == ["complete", "complete"]


def test_machines_share_a_sweep_by_its_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    folders = [tmp_path / name for name in ("near", "far")]
    trials = [Trials(), Trials()]
    for folder, of_machine in zip(folders, trials, strict=True):
        folder.mkdir()
        # The first one runs two, the second one the rest.
        count = ["--count", "2"] if of_machine is trials[0] else []
        assert sweep(folder, "--storage", url, *count, trials=of_machine) == 0
    assert [len(of_machine.jobs) for of_machine in trials] == [2, 2]
    assert not (folders[1] / "runs" / "sweeps" / "sweep" / "sweep.db").exists()
    assert sorted(table(folders[1])["model.lr"]) == [0.1, 0.2, 0.3, 0.4]
    # The last one has the best configuration, also of a trial whose directory it cannot see.
    assert sweep(folders[0], "--storage", url) == 0
    for folder in folders:
        best = yaml.safe_load((folder / "runs" / "sweeps" / "sweep" / "best.yaml").read_text())
        assert best["model"] == {"lr": 0.3}
        assert best["runs"] == str(folder / "runs")


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_more_trials_can_be_asked_for_later(tmp_path: Path, method: str) -> None:
    changes: dict[str, Any] = {"method": method, "parameters": {"model.lr": {"min": 0.0, "max": 1.0}}}
    assert sweep(tmp_path, run_cap=2, **changes) == 0
    assert len(table(tmp_path)) == 2
    assert sweep(tmp_path, "--count", "3", run_cap=2, **changes) == 0
    assert len(table(tmp_path)) == 3


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_a_search_without_an_end_is_refused(tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, method=method) == 2
    assert f"method: {method} has no end of its own; give --count N, or run_cap: N" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_trials_and_the_same_command_goes_on_with_them(
    tmp_path: Path, number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        if job.name != "trial-0001":
            return Trials()(job, watch, stop)
        os.kill(os.getpid(), number)
        assert stop.wait(60)
        return Outcome("stopped")

    path = written(tmp_path, parameters=LR)
    arguments = [str(path), "--runs", str(tmp_path / "runs")]
    before = signal.getsignal(signal.SIGTERM)
    assert launch("sweep", *arguments, runner=interrupted) == code
    assert signal.getsignal(signal.SIGTERM) is before
    assert "The same command goes on." in capsys.readouterr().out
    assert table(tmp_path)["state"].tolist() == ["complete", "waiting"]
    rest = Trials()
    assert launch("sweep", *arguments, "--count", "2", runner=rest) == 0
    [job] = rest.jobs
    # In the same place, so that it goes on with its run.
    assert (job.name, job.is_fresh) == ("trial-0001", False)
    assert "--model.lr=0.2" in job.arguments
    assert table(tmp_path)["state"].tolist() == ["complete", "complete"]
    assert launch("sweep", *arguments, runner=rest) == 0
    assert sorted(table(tmp_path)["model.lr"]) == [0.1, 0.2, 0.3, 0.4]


def test_importance_says_why_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, "--count", "1") == 0
    assert "one complete trial does not show what matters" in capsys.readouterr().out
    same = {"model.lr": {"values": [0.21, 0.41]}}
    assert sweep(tmp_path, "--name", "same", parameters=same, trials=Trials()) == 0
    capsys.readouterr()
    equal = {"model.lr": {"value": 0.1}, "trainer.max_epochs": {"values": [1, 2]}}
    assert sweep(tmp_path, "--name", "equal", parameters=equal) == 0
    assert "val/loss is the same in all complete trials" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "sweeps" / "equal" / "importance.png").exists()


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--workers", "none"], ["--cuont", "1"]])
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        sweep(tmp_path, *arguments)
    assert stopped.value.code == 2


def test_help_names_the_program_and_needs_neither_optuna_nor_torch() -> None:
    code = (
        "import sys; sys.argv = ['bin/vitrail', 'sweep', '--help']\n"
        "from vitrail.programs import main\n"
        "try: main('vitrail')\n"
        "except SystemExit: print('optuna' in sys.modules, 'lightning' in sys.modules)"
    )
    message = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert message.startswith("usage: vitrail sweep FILE [options] [-- ARGUMENT …]")
    assert "--workers" in message
    assert message.splitlines()[-1] == "False False"
