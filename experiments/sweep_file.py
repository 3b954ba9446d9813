"""A sweep as one YAML file, the same that ``wandb sweep`` takes.

https://docs.wandb.ai/models/sweeps/sweep-config-keys says what it may hold. What cannot be done here alike is refused
in one line that names the key, never left aside.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from experiments.sweep_hyperband import Hyperband, parse_hyperband
from experiments.sweep_space import Parameter, parse_parameters
from vitrail.errors import UserError

Method = Literal["grid", "random", "bayes"]
Goal = Literal["minimize", "maximize"]

_ELSEWHERE = {"program", "project", "entity", "description", "name", "apiVersion", "kind"}
"""Keys that only W&B's own pages and agents use."""
_KNOWN = {"method", "metric", "parameters", "early_terminate", "run_cap", "command"} | _ELSEWHERE
_METRIC_KEYS = {"name", "goal", "target"}
_ARGS, _ARGS_APART = "${args}", "${args_no_equals}"
_OURS = {"name", "runs", "config", "ckpt_path", "checkpoint.monitor", "checkpoint.mode"}
_COMMAND = '["${env}", python, -m, experiments, fit, --config, experiments/….yaml, "${args}"]'


@dataclass(frozen=True)
class Metric:
    """What a sweep looks for.

    Attributes:
        name: a column of ``metrics.csv``, ``val/…``.
        goal: which direction is better.
        target: the sweep ends once a trial has reached it.
    """

    name: str
    goal: Goal
    target: float | None = None

    @property
    def sign(self) -> float:
        """Times this, lower is better."""
        return 1.0 if self.goal == "minimize" else -1.0

    def reached(self, value: float) -> bool:
        """Whether a value is as good as the target."""
        return self.target is not None and self.sign * value <= self.sign * self.target


@dataclass(frozen=True)
class SweepFile:
    """A sweep, checked.

    Attributes:
        method: how values are chosen; ``bayes`` is TPE.
        metric: what for.
        parameters: of what.
        hyperband: when trials are stopped early, if at all.
        run_cap: no more than so many trials, unless more are asked for.
        fit: arguments after ``python -m experiments fit``, with the place of the values.
    """

    method: Method
    metric: Metric
    parameters: tuple[Parameter, ...]
    hyperband: Hyperband | None
    run_cap: int | None
    fit: tuple[str, ...]

    @property
    def searched(self) -> list[Parameter]:
        """Parameters with more than one value to choose from."""
        return [parameter for parameter in self.parameters if not parameter.is_constant]

    def grid(self) -> list[dict[str, Any]]:
        """All combinations, the last parameter the fastest.

        Raises:
            UserError: a parameter has no list of values.
        """
        names = [parameter.name for parameter in self.searched]
        columns = [parameter.grid() for parameter in self.searched]
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*columns)]

    def arguments(self, values: Mapping[str, Any], more: list[str]) -> list[str]:
        """Arguments of a trial, after ``python -m experiments``, made as W&B's agent makes them.

        Args:
            values: of the parameters that are searched.
            more: arguments that come right before the values.
        """
        constants = {p.name: p.options["value"] for p in self.parameters if p.is_constant}
        chosen = {p.name: {**constants, **values}[p.name] for p in self.parameters}
        made = ["fit"]
        for part in self.fit:
            if part == _ARGS:
                made += [*more, *(f"--{name}={value}" for name, value in chosen.items())]
            elif part == _ARGS_APART:
                made += [*more, *(text for name, value in chosen.items() for text in (f"--{name}", str(value)))]
            else:
                made.append(part)
        return made


def read_sweep(path: Path) -> SweepFile:
    """Read and check a sweep file.

    Raises:
        UserError: the file cannot be read, or something in it is missing, unknown or impossible.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{path}: {reason}; give a sweep's YAML file, such as experiments/sweeps/….yaml") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no keys; a sweep has method:, metric:, parameters: and command:")
    try:
        return _parsed(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _parsed(content: Mapping[str, Any]) -> SweepFile:
    if unknown := sorted(str(key) for key in content if key not in _KNOWN):
        raise UserError(f"{unknown[0]}: is not a key that can be followed here; known are {', '.join(sorted(_KNOWN))}")
    if (method := content.get("method")) not in ("grid", "random", "bayes"):
        raise UserError(f"method: must be grid, random or bayes, got {method!r}")
    parameters = tuple(parse_parameters(content.get("parameters")))
    for parameter in parameters:
        if parameter.name in _OURS:
            raise UserError(f"parameters.{parameter.name}: is given by the sweep itself; leave it out")
    run_cap = content.get("run_cap")
    if run_cap is not None and (isinstance(run_cap, bool) or not isinstance(run_cap, int) or run_cap < 1):
        raise UserError(f"run_cap: must be an integer from 1, got {run_cap!r}")
    sweep = SweepFile(
        method=cast("Method", method),
        metric=_metric(content.get("metric")),
        parameters=parameters,
        hyperband=parse_hyperband(content.get("early_terminate")),
        run_cap=run_cap,
        fit=_fit_arguments(content.get("command"), str(content.get("program", ""))),
    )
    if not sweep.searched:
        raise UserError("parameters: all are constant, so there is nothing to search; use `fit`")
    if sweep.method == "grid":
        sweep.grid()
    return sweep


def _metric(section: Any) -> Metric:
    if not isinstance(section, dict) or not isinstance(name := section.get("name"), str):
        raise UserError("metric.name: is missing; name what is optimised, such as val/class/accuracy")
    if unknown := sorted(section.keys() - _METRIC_KEYS):
        raise UserError(f"metric.{unknown[0]}: is not a key that can be followed here; known are name, goal, target")
    if name.startswith("test"):
        raise UserError(
            f"metric.name: {name!r} would select on the test split, and the test result would no longer be one; "
            "name a val/… metric"
        )
    if not name.startswith("val/"):
        raise UserError(f"metric.name: {name!r} is no metric of the validation split; name a val/… metric")
    if (goal := section.get("goal", "minimize")) not in ("minimize", "maximize"):
        raise UserError(f"metric.goal: must be minimize or maximize, got {goal!r}")
    target = section.get("target")
    is_number = isinstance(target, int | float) and not isinstance(target, bool) and math.isfinite(target)
    if target is not None and not is_number:
        raise UserError(f"metric.target: must be a number, got {target!r}")
    return Metric(name, cast("Goal", goal), target)


def _fit_arguments(command: Any, program: str) -> tuple[str, ...]:
    """What follows ``python -m experiments fit`` in the command that W&B's agent would run."""
    if not isinstance(command, list) or not all(isinstance(part, str | int | float) for part in command):
        raise UserError(f"command: is missing; write {_COMMAND}")
    parts = [_with_environment(str(part)) for part in command]
    parts = [program if part == "${program}" else part for part in parts]
    heads = [number for number in range(len(parts)) if parts[number : number + 3] == ["-m", "experiments", "fit"]]
    if not heads:
        raise UserError(f"command: does not run `-m experiments fit`; write {_COMMAND}")
    fit = parts[heads[0] + 3 :]
    macros = [part for part in fit if re.fullmatch(r"\$\{.*\}", part)]
    if len(macros) != 1 or macros[0] not in {_ARGS, _ARGS_APART}:
        raise UserError(
            f"command: needs {_ARGS} once to say where the values go, got {' '.join(macros) or 'none'} "
            "(flags without a value, or values without --, are not understood by `fit`)"
        )
    return tuple(fit)


def _with_environment(part: str) -> str:
    """As the agent does: the variable's value, or its name where there is none."""
    return re.sub(r"\$\{envvar:([A-Z0-9_]*)\}", lambda found: os.environ.get(found[1], found[1]), part)
