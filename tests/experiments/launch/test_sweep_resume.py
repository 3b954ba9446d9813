"""A sweep that trains in real processes, is killed in the middle and goes on.

Each part of it has its fast tests: a process per trial (``test_workers.py``), trials of a killed process
(``test_study.py``), a sweep that a signal ends (``test_sweep.py``), exact resume of a training.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from experiments.__main__ import main as experiments
from experiments.launch import study
from tests.experiments.launch.test_sweep import ROOT, table
from tests.experiments.launch.test_sweep_file import written
from tests.support.runs import TINY


@pytest.mark.slow
def test_a_killed_sweep_of_real_trainings_goes_on_and_its_best_can_be_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.replace("max_epochs: 2", "max_epochs: 3").replace("n_samples: 60", "n_samples: 40"))
    command = ["${env}", "python", "-m", "experiments", "fit", "--config", str(config), "${args}"]
    # The second one is the better: the first one goes astray.
    path = written(tmp_path, command=command, parameters={"model.lr": {"values": [0.3, 0.0001]}})
    runs = tmp_path / "runs"
    started = [sys.executable, "-m", "experiments", "sweep", str(path), "--runs", str(runs)]
    folder = runs / "sweeps" / "sweep"
    killed = subprocess.Popen(started, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        # The second trial has finished an epoch: the first one is complete.
        while not list(folder.glob("trials/trial-0001/*/checkpoints/last.ckpt")):
            assert killed.poll() is None
            time.sleep(0.05)
    finally:
        killed.kill()
        killed.wait()
    assert not (folder / "sweep.csv").exists()

    monkeypatch.setattr(study, "GRACE_SECONDS", 6)
    assert experiments(["sweep", str(path), "--runs", str(runs)]) == 0
    frame = table(tmp_path)
    # No point is lost, and none is run twice.
    assert frame["state"].tolist() == ["complete", "complete"]
    assert frame["model.lr"].tolist() == [0.0001, 0.3]
    assert frame["trial"].tolist() == ["trial-0001", "trial-0000"]
    assert frame["epochs"].tolist() == [3, 3]
    # It has gone on where it was interrupted.
    assert f"trial-0001 goes on from {frame['run'][0]}" in capsys.readouterr().err
    assert len(list(folder.glob("trials/*/*"))) == 2
    for run, value, lr in zip(frame["run"], frame["val/loss"], frame["model.lr"], strict=True):
        assert validations(Path(run))["val/loss"].min() == value
        assert validations(Path(run))["epoch"].tolist() == [0, 1, 2]
        assert yaml.safe_load((Path(run) / "config.yaml").read_text())["model"]["init_args"]["lr"] == lr

    assert experiments(["fit", "--config", str(folder / "best.yaml")]) == 0
    [again] = (runs / "sweep_best").glob("*")
    pd.testing.assert_series_equal(validations(again)["val/loss"], validations(Path(frame["run"][0]))["val/loss"])


def validations(run: Path) -> pd.DataFrame:
    frame = pd.read_csv(run / "metrics.csv")
    return frame[frame["val/loss"].notna()].reset_index(drop=True)
