"""Trials in the database: each slot is run once, by whatever process, whatever was killed meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from experiments.launch import study as sweep_study
from experiments.launch.study import ERROR, SLOT, Claim, SweepStudy
from experiments.launch.sweep_file import SweepFile, read_sweep
from tests.experiments.launch.test_sweep_file import written
from tests.support.forks import run_program
from vitrail.errors import UserError

GRID = {"model.lr": {"values": [0.1, 0.2, 0.3]}, "model.label_smoothing": {"values": [0, [1, 2]]}}
RANGES = {"model.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1}, "a": {"distribution": "normal"}}


def opened(folder: Path, sweep: SweepFile, seed: int = 1) -> SweepStudy:
    """A study in a file of the folder, or in the database of the environment, where each folder has its own."""
    url = os.environ.get("SWEEP_DATABASE")
    return SweepStudy(url or f"sqlite:///{folder / 'sweep.db'}", os.environ.get("SWEEP_NAME", "sweep"), sweep, seed)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where this process and those that it starts keep a study: a file, or a real database server."""
    if request.param == "postgresql":
        monkeypatch.setenv("SWEEP_DATABASE", request.getfixturevalue("postgresql_server"))
        monkeypatch.setenv("SWEEP_NAME", request.node.name)
    return str(request.param)


def grid(folder: Path, **changes: Any) -> SweepFile:
    return read_sweep(written(folder, **{"parameters": GRID, **changes}))


def taken(study: SweepStudy, count: int = 6) -> Claim:
    claim = study.take(count)
    assert claim is not None
    return claim


def finish(study: SweepStudy, value: float = 0.5, count: int = 6) -> dict[str, Any] | None:
    """Take one trial and end it."""
    if (claim := study.take(count)) is None:
        return None
    study.end(claim.trial, TrialState.COMPLETE, value, {})
    return claim.values


def all_values(study: SweepStudy, count: int = 6) -> list[dict[str, Any]]:
    values = []
    while (one := finish(study, count=count)) is not None:
        values.append(one)
    return values


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The database's clock counts seconds; so times are short, not fractions."""
    monkeypatch.setattr(sweep_study, "BEAT_SECONDS", 1)
    monkeypatch.setattr(sweep_study, "GRACE_SECONDS", 2)


def test_every_point_of_a_grid_is_taken_once_in_its_order(tmp_path: Path) -> None:
    sweep = grid(tmp_path)
    assert all_values(opened(tmp_path, sweep)) == sweep.grid()
    # A second start changes nothing.
    assert opened(tmp_path, sweep).take(6) is None


@pytest.mark.slow
@pytest.mark.usefixtures("database")
def test_several_processes_share_a_grid(tmp_path: Path) -> None:
    run_program("tests.experiments.launch.sweep_processes", str(tmp_path), "share")
    found = [values for number in range(2) for values in json.loads((tmp_path / str(number) / "taken").read_text())]
    assert Counter(map(str, found)) == Counter(map(str, grid(tmp_path).grid()))


def test_two_machines_that_take_the_last_point_at_once_run_it_once(tmp_path: Path) -> None:
    study = opened(tmp_path, grid(tmp_path))
    assert len(all_values(study)) == 6
    # As a database server lets it happen, where each has counted before the other one began.
    assert study.take(7) is None
    assert len(study.trials()) == 6
    assert opened(tmp_path, grid(tmp_path)).take(6) is None


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_a_sweep_that_was_interrupted_samples_the_same(tmp_path: Path, method: str) -> None:
    sweep = grid(tmp_path, method=method, parameters=RANGES)
    folders = [tmp_path / name for name in ("once", "resumed", "other")]
    for folder in folders:
        folder.mkdir()
    once = all_values(opened(folders[0], sweep), 14)
    assert len({values["model.lr"] for values in once}) == 14
    resumed = []
    # TPE begins after ten.
    for count in (10, 2, 2):
        study = opened(folders[1], sweep)
        resumed += [finish(study, count=14) for _ in range(count)]
    assert resumed == once
    assert finish(opened(folders[2], sweep, seed=2)) != once[0]


def test_a_trial_that_is_handed_back_comes_first_with_the_same_values(tmp_path: Path) -> None:
    study = opened(tmp_path, grid(tmp_path, method="random", parameters=RANGES))
    lost = taken(study, 3)
    study.hand_back(lost.trial)
    again = taken(study, 3)
    assert (again.slot, again.values, again.is_fresh) == (lost.slot, lost.values, False)
    assert taken(study, 3).slot == 1
    # No more are taken than are asked for.
    taken(study, 3)
    assert study.take(3) is None
    assert taken(study, 4).slot == 3


@pytest.mark.slow
def test_tpe_looks_where_it_was_good(tmp_path: Path) -> None:
    study = opened(tmp_path, grid(tmp_path, method="bayes", parameters={"a": {"min": 0.0, "max": 1.0}}))
    tried = []
    while (claim := study.take(40)) is not None:
        tried.append(claim.values["a"])
        study.end(claim.trial, TrialState.COMPLETE, (claim.values["a"] - 0.8) ** 2, {})
    late = [abs(value - 0.8) for value in tried[25:]]
    early = [abs(value - 0.8) for value in tried[:10]]
    assert sum(late) / len(late) < 0.5 * sum(early) / len(early)


@pytest.mark.usefixtures("impatient", "database")
@pytest.mark.parametrize("when", ["killed", pytest.param("killed_early", marks=pytest.mark.slow)])
def test_the_trials_of_a_killed_process_are_run_again(tmp_path: Path, when: str) -> None:
    sweep = grid(tmp_path)
    run_program("tests.experiments.launch.sweep_processes", str(tmp_path), when, code=-signal.SIGKILL)
    study = opened(tmp_path, sweep)
    assert len(study.running_elsewhere()) == 2
    values: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60
    while len(values) < 6 and time.monotonic() < deadline:
        values += all_values(study)
        time.sleep(0.3)
    assert sorted(map(str, values)) == sorted(map(str, sweep.grid()))
    assert sorted(trial.user_attrs[SLOT] for trial in study.trials()) == list(range(6))
    assert study.running_elsewhere() == []


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_living_process_keeps_its_trials_and_a_silent_one_loses_them(tmp_path: Path) -> None:
    far, near = (opened(tmp_path, grid(tmp_path)) for _ in range(2))
    claim = taken(far)
    for _ in range(8):
        time.sleep(0.4)
        far.beat(claim.trial)
        assert near.take(0) is None
    assert [trial.number for trial in near.running_elsewhere()] == [claim.trial.number]
    time.sleep(4)
    assert near.take(0) is None
    # It was only slow: what it reports afterwards does not count, and its slot is run again.
    assert near.running_elsewhere() == []
    assert far.report(claim.trial, 1, 0.5)
    far.end(claim.trial, TrialState.COMPLETE, 0.1, {})
    assert len(all_values(near)) == 6
    assert [trial.value for trial in near.trials()] == [0.5] * 6


def test_failed_trials_are_run_again_only_if_asked(tmp_path: Path) -> None:
    study = opened(tmp_path, grid(tmp_path))
    claim = taken(study, 2)
    study.end(claim.trial, TrialState.FAIL, None, {ERROR: "exit code 1: no"})
    finish(study, count=2)
    study.retry_failed(refused_only=True)
    assert opened(tmp_path, grid(tmp_path)).take(2) is None
    for _ in range(2):
        study.retry_failed(refused_only=False)
    again = taken(study, 2)
    assert (again.values, again.is_fresh) == (claim.values, True)
    study.end(again.trial, TrialState.COMPLETE, 0.1, {})
    assert study.take(2) is None
    assert len(study.trials()) == 2


@pytest.mark.parametrize("strict", [True, False])
def test_early_stopping_compares_all_trials(tmp_path: Path, strict: bool) -> None:
    rule = {"type": "hyperband", "max_iter": 4, "s": 1, "eta": 2, "strict": strict}
    metric = {"name": "val/class/accuracy", "goal": "maximize"}
    study = opened(tmp_path, grid(tmp_path, early_terminate=rule, metric=metric))
    trials = [taken(study).trial for _ in range(4)]
    for trial, value in zip(trials, (0.5, 0.9, 0.2, 0.7), strict=True):
        assert not study.report(trial, 1, value)
    assert [study.report(t, 2, v) for t, v in zip(trials, (0.5, 0.9, 0.2, 0.7), strict=True)] == [
        *(False, False, True, False)
    ]
    # From its last epoch on nothing is stopped.
    assert not study.report(trials[0], 4, 0.0)


def test_a_trial_that_is_run_again_competes_once(tmp_path: Path) -> None:
    rule = {"type": "hyperband", "min_iter": 1, "eta": 2}
    study = opened(tmp_path, grid(tmp_path, early_terminate=rule))
    good = taken(study)
    assert not study.report(good.trial, 1, 0.1)
    study.hand_back(good.trial)
    good = taken(study)
    # It has passed this epoch before, and goes on from its checkpoint.
    assert not study.report(good.trial, 1, 0.1)
    for value in (0.3, 0.4):
        assert study.report(taken(study).trial, 1, value)
    # The second of four.
    assert not study.report(taken(study).trial, 1, 0.2)


def test_a_failed_trial_that_is_run_again_competes_from_the_start(tmp_path: Path) -> None:
    rule = {"type": "hyperband", "min_iter": 1, "eta": 2}
    study = opened(tmp_path, grid(tmp_path, early_terminate=rule))
    failed = taken(study)
    assert not study.report(failed.trial, 1, 0.1)
    study.end(failed.trial, TrialState.FAIL, None, {ERROR: "exit code 1: no"})
    study.retry_failed(refused_only=False)
    again = taken(study)
    assert again.is_fresh
    assert not study.report(again.trial, 1, 0.5)
    assert not study.report(taken(study).trial, 1, 0.2)


def test_a_target_ends_the_search(tmp_path: Path) -> None:
    study = opened(tmp_path, grid(tmp_path, metric={"name": "val/loss", "target": 0.3}))
    finish(study, 0.4)
    assert not study.target_reached()
    finish(study, 0.2)
    assert study.target_reached()


def test_another_sweep_of_the_same_name_is_refused(tmp_path: Path) -> None:
    opened(tmp_path, grid(tmp_path))
    with pytest.raises(UserError, match=r"with another parameters: .* give this one another --name"):
        opened(tmp_path, grid(tmp_path, parameters={"model.lr": {"values": [0.1]}}))
    with pytest.raises(UserError, match="with another seed"):
        opened(tmp_path, grid(tmp_path), seed=5)


@pytest.mark.parametrize(
    "url", ["nonsense", "sqlite:////no/such/folder/sweep.db", "mysql+nodriver://me:secret@host/db"]
)
def test_a_database_that_cannot_be_used_is_reported_in_one_line(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="--storage") as raised:
        SweepStudy(url, "sweep", grid(tmp_path), 1)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.slow
def test_what_a_database_server_refuses_is_one_line_without_the_password(
    tmp_path: Path, postgresql_server: str
) -> None:
    away = re.sub(r":\d+/", ":9/", postgresql_server)
    for url in (f"{postgresql_server}_which_is_not_there", away):
        with pytest.raises(UserError, match=r"--storage postgresql.*://vitrail:\*\*\*@127") as raised:
            SweepStudy(url, "sweep", grid(tmp_path), 1)
        assert "\n" not in str(raised.value)
        assert "secret" not in str(raised.value)
