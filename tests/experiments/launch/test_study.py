"""Trials in the database: each slot is run once, by whomever, whatever was killed meanwhile.

Who is still there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from experiments.launch import study as sweep_owner
from experiments.launch.study import ATTEMPT, OWNER, SLOT, Silence, SweepStudy, is_gone, name_of
from experiments.launch.sweep_file import SweepFile, read_sweep
from tests.experiments.launch.test_sweep_file import written
from tests.support.forks import run_program
from vitrail.errors import UserError

GRID = {"model.lr": {"values": [0.1, 0.2, 0.3]}, "model.label_smoothing": {"values": [0, [1, 2]]}}
RANGES = {"model.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 0.1}, "a": {"distribution": "normal"}}


def opened(folder: Path, sweep: SweepFile, seed: int = 1) -> SweepStudy:
    return SweepStudy(f"sqlite:///{folder / 'sweep.db'}", "sweep", sweep, seed)


def grid(folder: Path, **changes: Any) -> SweepFile:
    return read_sweep(written(folder, **{"parameters": GRID, **changes}))


def finish(study: SweepStudy, value: float = 0.5) -> dict[str, Any] | None:
    """Take one trial and end it."""
    if (claim := study.take()) is None:
        return None
    study.tell(claim.trial, TrialState.COMPLETE, value)
    return claim.values


def all_values(study: SweepStudy) -> list[dict[str, Any]]:
    values = []
    while (taken := finish(study)) is not None:
        values.append(taken)
    return values


def test_every_point_of_a_grid_is_taken_once(tmp_path: Path) -> None:
    sweep = grid(tmp_path)
    study = opened(tmp_path, sweep)
    study.ask_for(6)
    # Asking again, as a second start does, changes nothing.
    opened(tmp_path, sweep).ask_for(6)
    assert all_values(study) == sweep.grid()
    assert study.take() is None


def test_several_processes_share_a_grid(tmp_path: Path) -> None:
    run_program("tests.experiments.sweep_processes", str(tmp_path), "share")
    found = [values for number in range(2) for values in json.loads((tmp_path / str(number) / "taken").read_text())]
    expected = grid(tmp_path).grid()
    assert Counter(map(str, found)) == Counter(map(str, expected))


@pytest.mark.parametrize("method", ["random", "bayes"])
def test_a_sweep_that_was_interrupted_draws_the_same(tmp_path: Path, method: str) -> None:
    sweep = grid(tmp_path, method=method, parameters=RANGES)
    folders = [tmp_path / name for name in ("once", "resumed", "other")]
    for folder in folders:
        folder.mkdir()
    study = opened(folders[0], sweep)
    study.ask_for(14)
    once = all_values(study)
    assert len({values["model.lr"] for values in once}) == 14
    resumed = []
    for _ in range(7):
        study = opened(folders[1], sweep)
        study.ask_for(14)
        resumed += [finish(study), finish(study)]
    assert resumed == once
    study = opened(folders[2], sweep, seed=2)
    study.ask_for(14)
    assert all_values(study)[0] != once[0]


def test_a_lost_slot_draws_the_same_again(tmp_path: Path) -> None:
    study = opened(tmp_path, grid(tmp_path, method="random", parameters=RANGES))
    study.ask_for(3)
    lost = study.take()
    assert lost is not None
    study.give_up(lost.trial)
    study.ask_for(3)
    # And before the others: what was interrupted comes first.
    again = study.take()
    assert again is not None
    assert again.values == lost.values
    assert (found := study.lost_before(again.trial)) is not None
    assert found.number == lost.trial.number
    other = study.take()
    assert other is not None
    assert study.lost_before(other.trial) is None


def test_no_more_slots_are_taken_than_are_asked_for_now(tmp_path: Path) -> None:
    study = opened(tmp_path, grid(tmp_path))
    study.ask_for(6)
    taken = [study.take(2) for _ in range(3)]
    assert [claim is None for claim in taken] == [False, False, True]
    assert study.take(3) is not None


def test_tpe_looks_where_it_was_good(tmp_path: Path) -> None:
    sweep = grid(tmp_path, method="bayes", parameters={"a": {"min": 0.0, "max": 1.0}})
    study = opened(tmp_path, sweep)
    study.ask_for(40)
    tried = []
    while (claim := study.take()) is not None:
        tried.append(claim.values["a"])
        study.tell(claim.trial, TrialState.COMPLETE, (claim.values["a"] - 0.8) ** 2)
    late = [abs(value - 0.8) for value in tried[25:]]
    early = [abs(value - 0.8) for value in tried[:10]]
    assert sum(late) / len(late) < 0.5 * sum(early) / len(early)


def test_the_trial_of_a_killed_process_is_run_again(tmp_path: Path) -> None:
    sweep = grid(tmp_path)
    run_program("tests.experiments.sweep_processes", str(tmp_path), "killed", code=-signal.SIGKILL)
    study = opened(tmp_path, sweep)
    assert [trial.state.name for trial in study.trials()] == ["RUNNING"] * 2 + ["WAITING"] * 4
    assert study.find_lost() == 2
    study.ask_for(6)
    values = all_values(study)
    assert sorted(map(str, values)) == sorted(map(str, sweep.grid()))
    assert sorted(trial.user_attrs[SLOT] for trial in study.trials()) == list(range(6))
    assert study.find_lost() == 0


def test_a_living_process_keeps_its_trials(tmp_path: Path) -> None:
    first, second = (opened(tmp_path, grid(tmp_path)) for _ in range(2))
    first.ask_for(6)
    claim = first.take()
    assert second.find_lost() == 0
    assert claim is not None
    first.tell(claim.trial, TrialState.COMPLETE, 0.1)
    assert second.trials()[0].value == 0.1


def test_a_silent_trial_on_another_machine_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far, near = (opened(tmp_path, grid(tmp_path)) for _ in range(2))
    far.owner = "another-machine pid:[1] 12 34"
    far.ask_for(6)
    claim = far.take()
    assert claim is not None
    seconds = [0.0]
    near._silence = sweep_owner.Silence(120, lambda: seconds[0])
    assert near.find_lost() == 0
    assert [trial.user_attrs[OWNER] for trial in near.running_elsewhere()] == [far.owner]
    seconds[0] = 100
    claim.trial.set_user_attr("beat", 1)
    assert near.find_lost() == 0
    seconds[0] = 200
    assert near.find_lost() == 0
    seconds[0] = 221
    assert near.find_lost() == 1
    # It was only slow: what it says afterwards counts for nothing, and its slot is run again.
    far.tell(claim.trial, TrialState.COMPLETE, 0.1)
    near.ask_for(6)
    assert len(all_values(near)) == 6


def test_a_slot_that_two_machines_have_asked_for_is_run_once(tmp_path: Path) -> None:
    study = opened(tmp_path, grid(tmp_path))
    study.ask_for(6)
    # As a second machine does that has looked before the first one asked.
    study.study.enqueue_trial({"model.lr": "0.1", "model.label_smoothing": "0"}, user_attrs={SLOT: 0, ATTEMPT: 0})
    assert len(all_values(study)) == 6
    assert len(study.trials()) == 6


def test_failed_trials_are_run_again_only_if_asked(tmp_path: Path) -> None:
    study = opened(tmp_path, grid(tmp_path))
    study.ask_for(2)
    claim = study.take()
    assert claim is not None
    study.tell(claim.trial, TrialState.FAIL, None, {"error": "no"})
    finish(study)
    study.ask_for(2)
    assert study.take() is None
    study.ask_for(2, retry_failed=True)
    study.ask_for(2, retry_failed=True)
    again = study.take()
    assert again is not None
    assert again.values == claim.values
    study.tell(again.trial, TrialState.COMPLETE, 0.1)
    assert study.take() is None


def test_hyperband_looks_at_all_trials(tmp_path: Path) -> None:
    rule = {"type": "hyperband", "min_iter": 2, "eta": 2}
    metric = {"name": "val/class/accuracy", "goal": "maximize"}
    study = opened(tmp_path, grid(tmp_path, early_terminate=rule, metric=metric))
    study.ask_for(6)
    trials = [claim.trial for claim in (study.take(), study.take(), study.take()) if claim is not None]
    for trial, value in zip(trials, (0.9, 0.2, 0.5), strict=True):
        trial.report(value, step=1)
        assert not study.should_stop(trial)
        trial.report(value, step=2)
    assert [study.should_stop(trial) for trial in trials] == [False, True, False]


def test_a_target_ends_the_search(tmp_path: Path) -> None:
    study = opened(tmp_path, grid(tmp_path, metric={"name": "val/loss", "target": 0.3}))
    study.ask_for(2)
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
def test_a_database_that_cannot_be_used_is_told_in_one_line(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="--storage") as raised:
        SweepStudy(url, "sweep", grid(tmp_path), 1)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_this_process_is_here() -> None:
    assert is_gone(name_of(os.getpid())) is False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_later_process_with_the_same_number_is_another() -> None:
    machine, number, started = name_of(os.getpid()).rsplit(" ", 2)
    assert is_gone(f"{machine} {number} {int(started) - 1}") is True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_ended_process_is_gone() -> None:
    code = "import os; from experiments.launch.study import name_of; print(name_of(os.getpid()))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert is_gone(ended) is True


def test_nothing_is_known_of_another_machine() -> None:
    assert is_gone("another pid:[1] 1 2") is None


def test_silence_counts_from_the_last_beat() -> None:
    seconds = [0.0]
    silence = Silence(10, lambda: seconds[0])
    assert not silence.too_long(1, 0)
    seconds[0] = 11
    assert silence.too_long(1, 0)
    assert not silence.too_long(1, 1)
    assert not silence.too_long(2, 0)
