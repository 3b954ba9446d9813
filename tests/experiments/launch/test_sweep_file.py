"""Sweep files: those that are shipped, as this reader and W&B's client take them, and mistakes in others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps import utils as wandb_sweeps

from experiments.launch.sweep_file import Metric, read_sweep
from vitrail.errors import UserError

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "experiments" / "sweeps").glob("*.yaml"))

VALID: dict[str, Any] = {
    "method": "grid",
    "metric": {"name": "val/loss", "goal": "minimize"},
    "parameters": {"model.lr": {"values": [0.1, 0.2]}, "trainer.max_epochs": {"value": 2}},
    "command": ["${env}", "python", "-m", "experiments", "fit", "--config", "a.yaml", "${args}"],
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "sweep.yaml"
    content = {key: value for key, value in {**VALID, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_two_sweeps_are_there() -> None:
    assert [path.stem for path in FILES] == ["flowers_lr_epochs", "products_multitask"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_is_judged_by_what_its_experiment_keeps(path: Path) -> None:
    sweep = read_sweep(path)
    config = ROOT / sweep.fit[sweep.fit.index("--config") + 1]
    checkpoint = yaml.safe_load(config.read_text())["checkpoint"]
    assert sweep.metric.name == checkpoint["monitor"]
    assert sweep.metric.goal[:3] == checkpoint["mode"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_trials_get_the_arguments_that_the_agent_would_give(path: Path) -> None:
    sweep = read_sweep(path)
    values = {p.name: p.options["values"][-1] if p.kind == "categorical" else 0.05 for p in sweep.searched}
    parts = wandb_sweeps.create_sweep_command(yaml.safe_load(path.read_text())["command"])
    macros = wandb_sweeps.create_sweep_command_args({"args": {name: {"value": v} for name, v in values.items()}})
    agent = [text for part in parts for text in (macros["args"] if part == "${args}" else [part])]
    assert agent[: agent.index("fit")] == ["${env}", "python", "-m", "experiments"]
    assert sweep.arguments(values, []) == agent[agent.index("fit") :]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_published_schema_has_nothing_to_say(path: Path) -> None:
    from sweeps import config

    content = yaml.safe_load(path.read_text())
    assert config.schema_violations_from_proposed_config(content) == []
    assert config.schema_violations_from_proposed_config({**content, "paramters": {}}) != []


def test_more_arguments_come_before_the_values(tmp_path: Path) -> None:
    sweep = read_sweep(written(tmp_path))
    assert sweep.arguments({"model.lr": 0.1}, ["--config", "b.yaml"]) == [
        *("fit", "--config", "a.yaml", "--config", "b.yaml", "--model.lr=0.1", "--trainer.max_epochs=2")
    ]


def test_values_may_stand_apart_and_variables_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERIMENT", "b.yaml")
    command = ["python", "-m", "experiments", "fit", "--config", "${envvar:EXPERIMENT}", "${args_no_equals}"]
    sweep = read_sweep(written(tmp_path, command=command))
    assert sweep.arguments({"model.lr": 0.1}, []) == [
        *("fit", "--config", "b.yaml", "--model.lr", "0.1", "--trainer.max_epochs", "2")
    ]


def test_a_grid_has_every_combination_once(tmp_path: Path) -> None:
    parameters = {"model.lr": {"values": [0.1, 0.2]}, "trainer.max_epochs": {"min": 1, "max": 3}, "a": {"value": 1}}
    grid = read_sweep(written(tmp_path, parameters=parameters)).grid()
    assert grid == [{"model.lr": lr, "trainer.max_epochs": n} for lr in (0.1, 0.2) for n in (1, 2, 3)]


def test_a_target_is_reached_from_its_own_side() -> None:
    assert Metric("val/loss", "minimize", 0.5).reached(0.5)
    assert not Metric("val/loss", "minimize", 0.5).reached(0.6)
    assert Metric("val/f1", "maximize", 0.5).reached(0.6)
    assert not Metric("val/f1", "maximize").reached(1.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "hyperopt"}, "method: must be grid, random or bayes, got 'hyperopt'"),
        ({"method": None}, "method: must be"),
        ({"metric": None}, "metric.name: is missing"),
        ({"metric": {"name": "test/class/accuracy"}}, "'test/class/accuracy' would select on the test split"),
        ({"metric": {"name": "train/loss"}}, "'train/loss' is no metric of the validation split"),
        ({"metric": {"name": "val/loss", "goal": "min"}}, "metric.goal: must be minimize or maximize, got 'min'"),
        ({"metric": {"name": "val/loss", "impute": "best"}}, "metric.impute: is not a key"),
        ({"metric": {"name": "val/loss", "target": "low"}}, "metric.target: must be a number"),
        ({"parameters": None}, "parameters: must name at least one parameter"),
        ({"parameters": {"name": {"values": [1]}}}, "parameters.name: is given by the sweep itself"),
        ({"parameters": {"model.lr": {"value": 1}}}, "all are constant"),
        ({"parameters": {"model.lr": {"min": 0.0, "max": 1.0}}}, "parameters.model.lr: a grid needs `values:`"),
        ({"run_cap": 0}, "run_cap: must be an integer from 1, got 0"),
        ({"controller": {"type": "local"}}, "controller: is not a key that can be followed here"),
        ({"command": None}, "command: is missing; write"),
        ({"command": ["python", "train.py", "${args}"]}, "command: does not run `-m experiments fit`"),
        ({"command": ["-m", "experiments", "fit"]}, "command: needs ${args} once"),
        ({"command": ["-m", "experiments", "fit", "${args_json}"]}, "got ${args_json}"),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate: needs min_iter"),
    ],
)
def test_mistakes_are_one_line_that_names_file_and_key(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(UserError) as raised:
        read_sweep(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("text", "said"), [("a: [", "not a YAML file"), ("- 1", "holds no keys")])
def test_a_file_that_is_no_sweep_is_told(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_sweep(path)
    with pytest.raises(UserError, match="No such file"):
        read_sweep(tmp_path / "absent.yaml")
