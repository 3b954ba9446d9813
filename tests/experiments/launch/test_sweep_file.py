"""Sweep files: those that are shipped, as this reader and W&B's client take them, mistakes in others, and samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from scipy import stats

from experiments.launch.sweep_file import (
    EarlyStopping,
    Metric,
    Parameter,
    parse_early_terminate,
    parse_parameters,
    read_sweep,
)
from vitrail.errors import UserError

ROOT = Path(__file__).parents[3]
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


def test_the_shipped_sweeps_are_found() -> None:
    assert [path.stem for path in FILES] == ["base_to_novel", "few_shot_16", "flowers_lr_epochs", "products_multitask"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_selects_by_what_its_experiment_keeps(path: Path) -> None:
    sweep = read_sweep(path)
    config = ROOT / sweep.fit[sweep.fit.index("--config") + 1]
    checkpoint = yaml.safe_load(config.read_text())["checkpoint"]
    assert sweep.metric.name == checkpoint["monitor"]
    assert sweep.metric.goal[:3] == checkpoint["mode"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_trials_get_the_arguments_that_the_agent_would_give(path: Path) -> None:
    # A tenth of what collecting all tests takes.
    from wandb.sdk.launch.sweeps import utils as wandb_sweeps

    sweep = read_sweep(path)
    values = {p.name: p.options["values"][-1] if p.kind == "categorical" else 0.05 for p in sweep.searched}
    parts = wandb_sweeps.create_sweep_command(yaml.safe_load(path.read_text())["command"])
    macros = wandb_sweeps.create_sweep_command_args({"args": {name: {"value": v} for name, v in values.items()}})
    agent = [text for part in parts for text in (macros["args"] if part == "${args}" else [part])]
    assert agent[: agent.index("fit")] == ["${env}", "python", "-m", "experiments"]
    assert sweep.arguments(values, [], Path()) == agent[agent.index("fit") :]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_published_schema_has_nothing_to_say(path: Path) -> None:
    from sweeps import config

    content = yaml.safe_load(path.read_text())
    assert config.schema_violations_from_proposed_config(content) == []
    assert config.schema_violations_from_proposed_config({**content, "paramters": {}}) != []


def test_more_arguments_come_before_the_values(tmp_path: Path) -> None:
    sweep = read_sweep(written(tmp_path))
    assert sweep.arguments({"model.lr": 0.1}, ["--config", "b.yaml"], Path()) == [
        *("fit", "--config", "a.yaml", "--config", "b.yaml", "--model.lr=0.1", "--trainer.max_epochs=2")
    ]


def test_values_may_stand_apart_and_variables_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERIMENT", "b.yaml")
    command = ["python", "-m", "experiments", "fit", "--config", "${envvar:EXPERIMENT}", "${args_no_equals}"]
    sweep = read_sweep(written(tmp_path, command=command))
    assert sweep.arguments({"model.lr": 0.1}, [], Path()) == [
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
    ("changes", "message"),
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
        ({"parameters": {"name": {"values": [1]}}}, "parameters.name: is set by the sweep itself"),
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
def test_mistakes_are_one_line_that_names_file_and_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(UserError) as raised:
        read_sweep(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("text", "message"), [("a: [", "not a YAML file"), ("- 1", "has no keys")])
def test_a_file_that_is_no_sweep_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_sweep(path)
    with pytest.raises(UserError, match="No such file"):
        read_sweep(tmp_path / "absent.yaml")


SAMPLES = 600
LOW, HIGH = 1e-4, 1e-1
LOGS = stats.loguniform(LOW, HIGH)


def parsed(**entry: Any) -> Parameter:
    [parameter] = parse_parameters({"model.lr": entry})
    return parameter


def sampled(parameter: Parameter, count: int = SAMPLES) -> list[Any]:
    """Values as random search samples them."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=7))
    return [parameter.suggest(study.ask()) for _ in range(count)]


@pytest.mark.parametrize(
    ("entry", "oracle"),
    [
        ({"min": 0.5, "max": 2.0}, stats.uniform(0.5, 1.5)),
        ({"distribution": "uniform", "min": -1, "max": 1}, stats.uniform(-1, 2)),
        ({"distribution": "log_uniform_values", "min": LOW, "max": HIGH}, LOGS),
        ({"distribution": "inv_log_uniform_values", "min": LOW, "max": HIGH}, LOGS),
        ({"distribution": "normal", "mu": 3.0, "sigma": 0.5}, stats.norm(3.0, 0.5)),
        ({"distribution": "normal"}, stats.norm(0, 1)),
        ({"distribution": "log_normal", "mu": -5.0, "sigma": 0.7}, stats.lognorm(s=0.7, scale=math.exp(-5))),
        ({"distribution": "beta", "a": 2, "b": 5}, stats.beta(2, 5)),
    ],
    ids=lambda value: value.get("distribution", "inferred") if isinstance(value, dict) else "",
)
def test_continuous_distributions_are_those_of_scipy(entry: dict[str, Any], oracle: Any) -> None:
    values = sampled(parsed(**entry))
    assert stats.kstest(values, oracle.cdf).pvalue > 0.01
    # The test is sharp: the values of another distribution do not pass.
    assert stats.kstest([value * 1.5 for value in values], oracle.cdf).pvalue < 0.01


@pytest.mark.parametrize(
    ("entry", "oracle"),
    [
        ({"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.25}, stats.uniform(0, 1)),
        ({"distribution": "q_log_uniform_values", "min": 8, "max": 512, "q": 8}, stats.loguniform(8, 512)),
        ({"distribution": "q_normal", "mu": 10.0, "sigma": 4.0}, stats.norm(10, 4)),
        ({"distribution": "q_log_normal", "mu": 2.0, "sigma": 0.5, "q": 2}, stats.lognorm(s=0.5, scale=math.exp(2))),
        ({"distribution": "q_beta", "a": 2, "b": 2, "q": 0.1}, stats.beta(2, 2)),
    ],
    ids=lambda value: value["distribution"] if isinstance(value, dict) else "",
)
def test_quantised_distributions_have_the_mass_of_each_step(entry: dict[str, Any], oracle: Any) -> None:
    step = entry.get("q", 1)
    values = sampled(parsed(**entry))
    for multiple in sorted(set(values)):
        assert multiple == pytest.approx(round(multiple / step) * step)
        expected = oracle.cdf(multiple + step / 2) - oracle.cdf(multiple - step / 2)
        assert values.count(multiple) / SAMPLES == pytest.approx(expected, abs=0.06), multiple
    assert all(isinstance(value, int) for value in values) == isinstance(step, int)
    assert str(sampled(parsed(distribution="q_uniform", min=0.0, max=1.0, q=0.1), 50)).count("00000") == 0


def test_choices_keep_their_types_and_weights() -> None:
    choices = [True, 1, [1, 2], {"class": 1.0}, "none"]
    values = sampled(parsed(values=choices), 100)
    assert {repr(value) for value in values} == {repr(choice) for choice in choices}
    weighted = sampled(parsed(values=["a", "b", "c"], probabilities=[0.7, 0.3, 0.0]))
    assert weighted.count("a") / SAMPLES == pytest.approx(0.7, abs=0.05)
    assert "c" not in weighted
    assert parsed(values=["a", "b"], probabilities=[1.0, 0.0]).quantile(1.0) == "a"


def test_the_distribution_is_inferred_as_the_client_does() -> None:
    assert set(sampled(parsed(min=1, max=3), 50)) == {1, 2, 3}
    assert set(sampled(parsed(values=[1, 2]), 50)) == {1, 2}
    assert parsed(value=3).is_constant
    with pytest.raises(UserError, match=r"min 1 and max 2\.0 must both"):
        parsed(min=1, max=2.0)


def test_a_grid_needs_values_and_knows_whole_numbers() -> None:
    assert parsed(values=[0.1, 0.2]).grid() == [0.1, 0.2]
    assert parsed(min=2, max=4).grid() == [2, 3, 4]
    assert parsed(distribution="q_uniform", min=0.0, max=0.3, q=0.1).grid() == [0.0, 0.1, 0.2, 0.3]
    with pytest.raises(UserError, match=r"parameters\.model\.lr: a grid needs `values:`, got a uniform"):
        parsed(min=0.0, max=1.0).grid()
    with pytest.raises(UserError, match="a grid of 1000001 values"):
        parsed(min=0, max=1_000_000).grid()


def test_the_ends_of_a_distribution_without_ends_are_finite() -> None:
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler()).ask()
    bell = parsed(distribution="log_normal")
    assert math.isfinite(bell.suggest(trial))
    distribution = trial.distributions["model.lr"]
    assert isinstance(distribution, optuna.distributions.FloatDistribution)
    assert np.isfinite([bell.quantile(end) for end in (distribution.low, distribution.high)]).all()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "parameters: must name at least one"),
        ({"model lr": {"value": 1}}, "no key of the command line"),
        ({"model.lr": 0.1}, r"parameters\.model\.lr: must have value:"),
        ({"model.lr": {"min": 1.0}}, "needs value:, values:"),
        ({"model": {"parameters": {"lr": {"value": 1}}}}, r"write dotted keys instead, such as model\.lr"),
        ({"model.lr": {"distribution": "gamma"}}, "must be one of constant, .*; got 'gamma'"),
        ({"model.lr": {"distribution": "log_uniform", "min": 0, "max": 1}}, "use log_uniform_values"),
        ({"model.lr": {"distribution": "uniform", "min": 0.0}}, r"parameters\.model\.lr\.max: is missing"),
        ({"model.lr": {"values": [1], "q": 2}}, r"parameters\.model\.lr\.q: a categorical distribution has no such"),
        ({"model.lr": {"values": []}}, "at least one value"),
        ({"model.lr": {"value": None}}, "the text 'None'"),
        ({"model.lr": {"values": [{"a": [None]}]}}, "the text 'None'"),
        ({"model.lr": {"values": [1, 2], "probabilities": [1.0]}}, "a list of 2 numbers"),
        ({"model.lr": {"values": [1, 2], "probabilities": [0.5, 0.6]}}, "sum to 1, got 1.1"),
        ({"model.lr": {"min": "1e-5", "max": 0.1}}, r"wants a decimal point: 1\.0e-5"),
        ({"model.lr": {"min": True, "max": 2}}, "must be a number, got True"),
        ({"model.lr": {"min": 2, "max": 2}}, "min 2 must be less than max 2"),
        ({"model.lr": {"distribution": "log_uniform_values", "min": 0.0, "max": 1.0}}, "above 0 on a logarithmic"),
        ({"model.lr": {"distribution": "q_normal", "q": 0}}, r"\.q: must be above 0"),
        ({"model.lr": {"distribution": "int_uniform", "min": 0.5, "max": 2}}, "needs integers, got 0.5"),
    ],
)
def test_mistakes_name_the_key(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_parameters(section)


def test_early_stopping_begins_at_min_iter_or_ends_before_max_iter() -> None:
    def parsed(**section: Any) -> EarlyStopping | None:
        return parse_early_terminate({"type": "hyperband", **section})

    assert parsed(min_iter=3) == EarlyStopping(3, 3, strict=True)
    assert parsed(max_iter=27, s=2) == EarlyStopping(3, 3, strict=True, last=27)
    assert parsed(max_iter=10, s=5, strict=False) == EarlyStopping(1, 3, strict=False, last=10)
    assert parse_early_terminate(None) is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "median"}, r"early_terminate\.type: must be hyperband"),
        ({"type": "hyperband", "patience": 2}, r"early_terminate\.patience: is not known"),
        ({"type": "hyperband"}, "needs min_iter, or max_iter and s"),
        ({"type": "hyperband", "max_iter": 27}, "needs min_iter, or max_iter and s"),
        ({"type": "hyperband", "min_iter": 0}, r"min_iter: must be an integer from 1, got 0"),
        ({"type": "hyperband", "min_iter": 2, "eta": 1.5}, "eta: must be an integer from 2, got 1.5"),
        ({"type": "hyperband", "max_iter": 2, "s": 2}, "no epoch is left"),
        ({"type": "hyperband", "min_iter": 2, "strict": 1}, "strict: must be true or false"),
    ],
)
def test_mistakes_in_early_stopping_name_the_key(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_early_terminate(section)
