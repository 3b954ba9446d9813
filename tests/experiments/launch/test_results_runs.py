"""Which directory is the run that a command would make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from experiments.launch.results import agrees, find_run

FILE = {"model": {"class_path": "lightning_modules.Ensemble", "init_args": {"members": []}}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "both.yaml"
    path.write_text(yaml.safe_dump(FILE))
    return path


def made_by(command: list[str], root: Path, members: list[str]) -> Path:
    """A run directory as a finished test leaves it."""
    run = root / "both" / "20260101-000000"
    (run / "predictions").mkdir(parents=True)
    model = {**FILE["model"], "init_args": {"members": members}}
    (run / "config.yaml").write_text(yaml.safe_dump({"name": "both", "model": model}))
    stage = {"stage": "test", "command": " ".join(["python", "-m", "experiments", *command]), "exit": "finished"}
    (run / "run.json").write_text(json.dumps({"stages": [stage]}))
    return run


@pytest.mark.parametrize("key", ["model.members+", "model.init_args.members+"])
def test_options_that_add_to_a_list_replace_what_the_file_says(file: Path, tmp_path: Path, key: str) -> None:
    command = ["test", "--config", str(file), f"--{key}=runs/a", f"--{key}=runs/b"]
    run = made_by(command, tmp_path / "runs", ["runs/a", "runs/b"])
    assert find_run(command, [tmp_path / "runs"]) == run
    assert find_run([*command[:-1], f"--{key}=runs/c"], [tmp_path / "runs"]) is None
    assert find_run(command[:-1], [tmp_path / "runs"]) is None


def test_configurations_agree_where_nothing_expected_is_different() -> None:
    expected = {"lr": "1e-3", "callbacks": [{"class_path": "a.B"}], "image": {"size": 64}}
    found = {"lr": 0.001, "callbacks": [{"class_path": "a.B", "init_args": {"x": 1}}], "image": {"size": 64}, "more": 0}
    assert agrees(expected, found)
    assert not agrees({**expected, "callbacks": []}, found)
    assert not agrees({**expected, "image": {"size": 65}}, found)
    assert not agrees({**expected, "pretrained": False}, found)
    assert not agrees({"x": None}, {"x": False})
