"""A new directory for a new run, and the way from a checkpoint back to its run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vitrail.errors import UserError
from vitrail.runs import (
    new_run_directory,
    resolve_checkpoint,
    run_of_checkpoint,
    same_data,
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "VITRAIL_RUN_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)


def make_run(root: Path, time: str, *names: str) -> Path:
    run = root / "flowers" / time
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"class_path": "Wares"}}))
    for name in names:
        (run / "checkpoints" / f"{name}.ckpt").write_bytes(b"x")
    return run


def test_two_runs_within_a_second_get_two_directories(tmp_path: Path) -> None:
    first, second = (new_run_directory(tmp_path, "flowers") for _ in range(2))
    assert first != second
    assert first.is_dir()
    assert second.is_dir()
    assert first.parent == second.parent == tmp_path / "flowers"


def test_child_ranks_share_the_directory_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = new_run_directory(tmp_path, "flowers")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert new_run_directory(tmp_path, "flowers") == main.resolve()


def test_processes_of_one_job_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert new_run_directory(tmp_path, "a") == new_run_directory(tmp_path, "a") == tmp_path / "a" / "job-17"


def test_best_and_last_name_the_newest_run_that_has_one(tmp_path: Path) -> None:
    make_run(tmp_path, "1", "best", "last")
    newest = make_run(tmp_path, "2", "last")
    assert resolve_checkpoint("last", tmp_path, "flowers") == newest / "checkpoints" / "last.ckpt"
    assert resolve_checkpoint("best", tmp_path, "flowers").parent.parent.name == "1"


@pytest.mark.parametrize("wanted", ["best", "nowhere.ckpt"])
def test_absent_checkpoint_is_a_user_error_that_names_it(tmp_path: Path, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        resolve_checkpoint(wanted, tmp_path, "flowers")


def test_checkpoint_knows_its_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, "1", "best")
    assert run_of_checkpoint(run / "checkpoints" / "best.ckpt") == run
    assert run_of_checkpoint(tmp_path / "elsewhere.ckpt") is None


def test_results_on_other_data_do_not_belong_beside_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, "1")
    assert same_data(run, {"class_path": "Wares"})
    assert not same_data(run, {"class_path": "Products"})
