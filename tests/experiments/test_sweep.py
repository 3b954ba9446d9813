"""``python -m experiments sweep``: from the file to the best configuration.

What depends on trials' results is tested with trials that are computed at once; one sweep trains in real processes, is
killed in the middle and goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from experiments.cli import main as experiments
from experiments.sweep import main
from experiments.sweep_trial import Job, Outcome, Watch
from tests.experiments.conftest import TINY
from tests.experiments.test_sweep_file import written

ROOT = Path(__file__).parents[2]
LR = {"model.lr": {"values": [0.1, 0.2, 0.3, 0.4]}}


class Trials:
    """Trials whose metric is a function of the learning rate; notes what it was asked for."""

    def __init__(self, epochs: int = 3, wrong: tuple[float, ...] = ()) -> None:
        self.jobs: list[Job] = []
        self.epochs = epochs
        self.wrong = wrong

    def __call__(self, job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        self.jobs.append(job)
        flags = dict(argument[2:].split("=", 1) for argument in job.arguments if "=" in argument)
        lr = float(flags["model.lr"])
        if lr in self.wrong:
            return Outcome("failed", error=f"exit code 2: model.lr: {lr} is wrong")
        run = job.folder / "trials" / job.name / "now"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump({"name": job.name, "runs": "x", "model": {"lr": lr}}))
        value = (lr - 0.31) ** 2
        for epoch in range(1, self.epochs + 1):
            if watch.epoch(epoch, value + 1 / epoch):
                return Outcome("pruned", value, epoch, run)
        return Outcome("complete", value, self.epochs, run)


def sweep(folder: Path, *arguments: str, trials: Trials | None = None, **changes: Any) -> int:
    path = written(folder, **{"parameters": LR, **changes})
    return main([str(path), "--runs", str(folder / "runs"), *arguments], trials or Trials())


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
    # Each trial gets the constant too, and keeps the epoch that the sweep judges by.
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
    assert main(arguments, together) == 0
    assert sorted(table(tmp_path)["model.lr"]) == [0.1, 0.2, 0.3, 0.4]
    assert {job.environment["CUDA_VISIBLE_DEVICES"] for job in trials.jobs} == {"0", "3"}
    assert {job.environment["OMP_NUM_THREADS"] for job in trials.jobs} == {"4"}
    assert all("--x=1" in job.arguments for job in trials.jobs)


def test_a_failed_trial_is_told_and_the_sweep_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, trials=Trials(wrong=(0.2, 0.3))) == 0
    frame = table(tmp_path)
    assert frame["state"].tolist() == ["complete", "complete", "failed", "failed"]
    assert frame["error"].tolist()[2] == "exit code 2: model.lr: 0.2 is wrong"
    assert "model.lr: 0.2 is wrong" in capsys.readouterr().err
    again = Trials()
    assert sweep(tmp_path, trials=again) == 0
    assert again.jobs == []
    assert sweep(tmp_path, "--retry-failed", trials=again) == 0
    assert len(again.jobs) == 2
    assert table(tmp_path)["model.lr"].tolist()[0] == 0.3


def test_a_sweep_without_a_success_ends_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, trials=Trials(wrong=(0.1, 0.2, 0.3, 0.4))) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "no trial of 4 was a success; the last one said: exit code 2: model.lr: 0.4 is wrong" in line
    assert not (tmp_path / "runs" / "sweeps" / "sweep" / "best.yaml").exists()


def test_hyperband_stops_the_weak_ones_and_records_it(tmp_path: Path) -> None:
    rule = {"type": "hyperband", "min_iter": 2, "eta": 2}
    parameters = {"model.lr": {"values": [0.3, 0.4, 0.1, 0.5, 0.9]}}
    assert sweep(tmp_path, early_terminate=rule, parameters=parameters) == 0
    frame = table(tmp_path).set_index("model.lr")
    # Of two nobody is in the worse half; then 0.1 is the last of three, 0.5 the third of four, 0.9 the last of five.
    assert frame["state"].to_dict() == {
        0.3: "complete",
        0.4: "complete",
        0.1: "pruned",
        0.5: "complete",
        0.9: "pruned",
    }
    assert frame["epochs"].to_dict() == {0.3: 3, 0.4: 3, 0.1: 2, 0.5: 3, 0.9: 2}


def test_a_target_leaves_the_rest_waiting(tmp_path: Path) -> None:
    trials = Trials()
    assert sweep(tmp_path, trials=trials, metric={"name": "val/loss", "target": 0.02}) == 0
    assert len(trials.jobs) == 2
    assert table(tmp_path)["state"].tolist() == ["complete", "complete", "waiting", "waiting"]


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


def test_ctrl_c_ends_trials_and_the_same_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        if job.number == 1:
            os.kill(os.getpid(), signal.SIGINT)
            stop.wait(60)
            return Outcome("stopped")
        return Trials()(job, watch, stop)

    path = written(tmp_path, parameters=LR)
    assert main([str(path), "--runs", str(tmp_path / "runs")], interrupted) == 130
    assert "The same command goes on." in capsys.readouterr().out
    assert table(tmp_path)["state"].tolist() == ["complete", "waiting", "waiting"]
    rest = Trials()
    assert sweep(tmp_path, trials=rest) == 0
    assert len(rest.jobs) == 3
    assert sorted(table(tmp_path)["model.lr"]) == [0.1, 0.2, 0.3, 0.4]


def test_importance_says_why_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, "--count", "1") == 0
    assert "one complete trial says nothing" in capsys.readouterr().out
    same = {"model.lr": {"values": [0.21, 0.41]}}
    assert sweep(tmp_path, "--name", "same", parameters=same, trials=Trials()) == 0
    capsys.readouterr()
    equal = {"model.lr": {"value": 0.1}, "trainer.max_epochs": {"values": [1, 2]}}
    assert sweep(tmp_path, "--name", "equal", parameters=equal) == 0
    assert "val/loss is the same in all trials" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "sweeps" / "equal" / "importance.png").exists()


@pytest.mark.parametrize("arguments", [["--count", "0"], ["--workers", "none"], ["--cuont", "1"]])
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        sweep(tmp_path, *arguments)
    assert stopped.value.code == 2


def test_help_needs_neither_optuna_nor_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = ['x', 'sweep', '--help']\n"
        "try: runpy.run_module('experiments', run_name='__main__')\n"
        "except SystemExit: print('optuna' in sys.modules, 'lightning' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--workers" in said
    assert said.splitlines()[-1] == "False False"


def test_a_killed_sweep_of_real_trainings_goes_on_and_its_best_can_be_repeated(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.replace("max_epochs: 2", "max_epochs: 1").replace("n_samples: 60", "n_samples: 30"))
    command = ["${env}", "python", "-m", "experiments", "fit", "--config", str(config), "${args}"]
    path = written(tmp_path, command=command, parameters={"model.lr": {"values": [0.001, 0.01]}})
    runs = tmp_path / "runs"
    started = [sys.executable, "-m", "experiments", "sweep", str(path), "--runs", str(runs)]
    folder = runs / "sweeps" / "sweep"
    killed = subprocess.Popen(started, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        # The second trial has begun: the first one is complete.
        while not (folder / "logs" / "trial-0001.log").exists():
            assert killed.poll() is None
            time.sleep(0.1)
    finally:
        killed.kill()
        killed.wait()
    assert not (folder / "sweep.csv").exists()

    assert main([str(path), "--runs", str(runs)]) == 0
    frame = table(tmp_path)
    # No point is lost, none is run twice; the lost trial's number is not used again.
    assert frame["state"].tolist() == ["complete", "complete"]
    assert sorted(frame["model.lr"]) == [0.001, 0.01]
    assert sorted(frame["trial"]) == ["trial-0000", "trial-0002"]
    for run, value, lr in zip(frame["run"], frame["val/loss"], frame["model.lr"], strict=True):
        assert pd.read_csv(Path(run) / "metrics.csv")["val/loss"].min() == value
        assert yaml.safe_load((Path(run) / "config.yaml").read_text())["model"]["init_args"]["lr"] == lr

    assert experiments(["fit", "--config", str(folder / "best.yaml")]) == 0
    [again] = (runs / "sweep_best").glob("*")
    assert pd.read_csv(again / "metrics.csv")["val/loss"].min() == pytest.approx(frame["val/loss"][0])
