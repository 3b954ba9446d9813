"""A sweep as one YAML file, the same that ``wandb sweep`` takes.

https://docs.wandb.ai/models/sweeps/sweep-config-keys says what it may hold. What cannot be done here alike is refused
in one line that names the key, never left aside.

The values that a sweep may try: Weights & Biases' distributions, drawn by Optuna.

Where Optuna has the same distribution it draws from that. Any other is drawn as a share in [0, 1] and turned into a
value by the distribution's quantile function, so that random search and TPE work on all of them alike.
https://docs.wandb.ai/models/sweeps/sweep-config-keys#distribution-options-for-random-and-bayesian-search

Early stopping of a sweep's trials: successive halving at a few epochs, by the rule of Weights & Biases' server.

At each of some epochs ("bands") only the best 1/eta of all trials that have come so far may go on. Li et al.,
"Hyperband", JMLR 18 (2018), with one bracket and without waiting for each other, as in Li et al., "ASHA", MLSys 2020.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml

from vitrail.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial


_RANGE = frozenset({"min", "max"})
_BELL = frozenset({"mu", "sigma"})
_NO_KEYS: frozenset[str] = frozenset()

_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "constant": (frozenset({"value"}), _NO_KEYS),
    "categorical": (frozenset({"values"}), _NO_KEYS),
    "categorical_w_probabilities": (frozenset({"values", "probabilities"}), _NO_KEYS),
    "int_uniform": (_RANGE, _NO_KEYS),
    "uniform": (_RANGE, _NO_KEYS),
    "q_uniform": (_RANGE, frozenset({"q"})),
    "log_uniform_values": (_RANGE, _NO_KEYS),
    "inv_log_uniform_values": (_RANGE, _NO_KEYS),
    "q_log_uniform_values": (_RANGE, frozenset({"q"})),
    "normal": (_NO_KEYS, _BELL),
    "q_normal": (_NO_KEYS, _BELL | {"q"}),
    "log_normal": (_NO_KEYS, _BELL),
    "q_log_normal": (_NO_KEYS, _BELL | {"q"}),
    "beta": (_NO_KEYS, frozenset({"a", "b"})),
    "q_beta": (_NO_KEYS, frozenset({"a", "b", "q"})),
}
"""Keys that each distribution must have, and those that it may have."""

_BY_EXPONENT = {"log_uniform", "inv_log_uniform", "q_log_uniform"}
_DEFAULTS: dict[str, float] = {"mu": 0.0, "sigma": 1.0, "a": 1.0, "b": 1.0, "q": 1}
_UNBOUNDED_TAIL = 1e-4
"""What is left out at each end of a distribution without ends: TPE tries the ends themselves."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_MAX_GRID = 10_000


@dataclass(frozen=True)
class Parameter:
    """One key of the command line and what a sweep may give it.

    Attributes:
        name: dotted key, such as ``model.lr``.
        kind: distribution, by W&B's name.
        options: the distribution's numbers or values, checked and complete.
    """

    name: str
    kind: str
    options: Mapping[str, Any]

    @property
    def is_constant(self) -> bool:
        """Whether there is nothing to choose."""
        return self.kind == "constant"

    def distribution(self) -> BaseDistribution:
        """What Optuna draws from; ``value`` turns what it has drawn into what the command line is given."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind == "categorical":
            # As text, because Optuna knows no lists, and takes True and 1 for the same choice.
            return CategoricalDistribution([json.dumps(value) for value in self.options["values"]])
        low, high = self.options.get("min", 0.0), self.options.get("max", 1.0)
        if self.kind == "int_uniform":
            return IntDistribution(low, high)
        if self.kind == "uniform":
            return FloatDistribution(low, high)
        # That of 1/x is log-uniform, hence that of x too.
        if self.kind in {"log_uniform_values", "inv_log_uniform_values"}:
            return FloatDistribution(low, high, log=True)
        tail = _UNBOUNDED_TAIL if "normal" in self.kind else 0.0
        return FloatDistribution(tail, 1.0 - tail)

    def value(self, drawn: Any) -> Any:
        """The value that Optuna's draw stands for."""
        if self.kind == "categorical":
            return json.loads(drawn)
        if self.kind in {"int_uniform", "uniform", "log_uniform_values", "inv_log_uniform_values"}:
            return drawn
        if self.kind == "categorical_w_probabilities":
            shares = self.options["probabilities"]
            reached = [sum(shares[: index + 1]) for index in range(len(shares))]
            # Rounding may leave the last sum just below 1.
            index = next((i for i, end in enumerate(reached) if drawn < end), max(i for i, s in enumerate(shares) if s))
            return self.options["values"][index]
        return self._rounded(self._quantile(float(drawn)))

    def grid(self) -> list[Any]:
        """All values, for a grid.

        Raises:
            UserError: the distribution has no list of values.
        """
        if self.kind == "categorical":
            return list(self.options["values"])
        if self.kind in {"int_uniform", "q_uniform"}:
            step = self.options.get("q", 1)
            first, last = round(self.options["min"] / step), round(self.options["max"] / step)
            if last - first < _MAX_GRID:
                return [self._rounded(number * step) for number in range(first, last + 1)]
            raise UserError(
                f"parameters.{self.name}: a grid of {last - first + 1} values; give `values:`, or a larger q"
            )
        raise UserError(
            f"parameters.{self.name}: a grid needs `values:`, got a {self.kind} distribution; "
            "list the values or use `method: random` or `bayes`"
        )

    def _quantile(self, share: float) -> float:
        from scipy import stats

        options = self.options
        if self.kind == "q_uniform":
            return float(options["min"] + share * (options["max"] - options["min"]))
        if self.kind == "q_log_uniform_values":
            low, high = math.log(options["min"]), math.log(options["max"])
            return math.exp(low + share * (high - low))
        if "beta" in self.kind:
            return float(stats.beta.ppf(share, options["a"], options["b"]))
        bell = float(stats.norm.ppf(share, options["mu"], options["sigma"]))
        return math.exp(bell) if "log" in self.kind else bell

    def _rounded(self, value: float) -> float:
        """To a multiple of q, an integer where q is one."""
        if "q" not in self.options:
            return value
        step: float = self.options["q"]
        times = round(value / step)
        # 3 × 0.1 is 0.30000000000000004.
        return times * step if isinstance(step, int) else round(times * step, 12)


def suggested(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    """What a trial draws from a distribution."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, distribution.low, distribution.high)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


def parse_parameters(section: Any, where: str = "parameters") -> list[Parameter]:
    """Read the ``parameters:`` of a sweep file.

    Args:
        section: as YAML gave it.
        where: key for messages.

    Raises:
        UserError: something is missing, unknown or impossible; the line names the key.
    """
    if not isinstance(section, dict) or not section:
        raise UserError(f"{where}: must name at least one parameter, such as model.lr: {{values: [0.001, 0.01]}}")
    return [_parameter(f"{where}.{name}", str(name), entry) for name, entry in section.items()]


def _parameter(where: str, name: str, entry: Any) -> Parameter:
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: is no key of the command line; write it with dots, such as model.lr")
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must hold value:, values:, or min: and max:, got {entry!r}")
    if "parameters" in entry:
        raise UserError(
            f"{where}.parameters: nested parameters reach the command line as one dictionary; "
            f"write dotted keys instead, such as {name}.lr"
        )
    options = {str(key): value for key, value in entry.items() if key != "distribution"}
    kind = entry.get("distribution") or _inferred(where, options)
    if kind in _BY_EXPONENT:
        raise UserError(f"{where}.distribution: {kind} takes exponents and is deprecated by W&B; use {kind}_values")
    if kind not in _KEYS:
        raise UserError(f"{where}.distribution: {kind!r} is none of {', '.join(_KEYS)}")
    required, optional = _KEYS[kind]
    if missing := sorted(required - options.keys()):
        raise UserError(f"{where}.{missing[0]}: is missing; a {kind} distribution needs {', '.join(sorted(required))}")
    if unknown := sorted(options.keys() - required - optional):
        known = ", ".join(sorted(required | optional | {"distribution"}))
        raise UserError(f"{where}.{unknown[0]}: a {kind} distribution has no such key; it knows {known}")
    options = {**{key: _DEFAULTS[key] for key in optional}, **options}
    _check_values(where, options)
    _check_numbers(where, kind, options)
    return Parameter(name, kind, options)


def _inferred(where: str, options: Mapping[str, Any]) -> str:
    """The distribution that is meant where none is named, by the client's own rule."""
    if "value" in options:
        return "constant"
    if "values" in options:
        return "categorical_w_probabilities" if "probabilities" in options else "categorical"
    if not options.keys() >= _RANGE:
        raise UserError(f"{where}: needs value:, values:, or min: and max:, and a distribution: where it has others")
    ends = [_number(f"{where}.{key}", options[key]) for key in ("min", "max")]
    if all(isinstance(end, int) for end in ends):
        return "int_uniform"
    if all(isinstance(end, float) for end in ends):
        return "uniform"
    raise UserError(f"{where}: min {ends[0]} and max {ends[1]} must both be integers or both have a decimal point")


def _check_values(where: str, options: Mapping[str, Any]) -> None:
    values = [options["value"]] if "value" in options else options.get("values", [None])
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}.values: must be a list of at least one value")
    if "value" not in options and "values" not in options:
        return
    if any(_holds_null(value) for value in values):
        raise UserError(
            f"{where}: null would reach the command line as the text 'None'; leave the parameter out, "
            "or say it in an overlay that the command names with --config"
        )
    shares = options.get("probabilities", [1.0 / len(values)] * len(values))
    if not isinstance(shares, list) or len(shares) != len(values):
        raise UserError(f"{where}.probabilities: must be a list of {len(values)} numbers, one a value")
    numbers = [_number(f"{where}.probabilities", share) for share in shares]
    if min(numbers) < 0 or not math.isclose(sum(numbers), 1.0, rel_tol=1e-5):
        raise UserError(f"{where}.probabilities: must not be negative and sum to 1, got {sum(numbers):g}")


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_null, value.values()))
    return any(map(_holds_null, value)) if isinstance(value, list) else value is None


def _check_numbers(where: str, kind: str, options: Mapping[str, Any]) -> None:
    for key in ("min", "max", "mu", "sigma", "q", "a", "b"):
        if key not in options:
            continue
        number = _number(f"{where}.{key}", options[key])
        if kind == "int_uniform" and not isinstance(number, int):
            raise UserError(f"{where}.{key}: an int_uniform distribution needs integers, got {number}")
        if key in {"q", "sigma", "a", "b"} and number <= 0:
            raise UserError(f"{where}.{key}: must be above 0, got {number}")
    if "min" in options and options["min"] >= options["max"]:
        raise UserError(f"{where}: min {options['min']} must be less than max {options['max']}")
    if "log_uniform" in kind and options["min"] <= 0:
        raise UserError(f"{where}.min: must be above 0 on a logarithmic scale, got {options['min']}")


def _number(where: str, value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value):
        mantissa, exponent = re.split("[eE]", value)
        raise UserError(f"{where}: {value} is text to YAML, which wants a decimal point: {mantissa}.0e{exponent}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: must be a number, got {value!r}")
    return value


_HYPERBAND_KEYS = {"type", "min_iter", "max_iter", "s", "eta", "strict"}
_LONGEST = 1_000_000
"""No training has more epochs."""


@dataclass(frozen=True)
class Hyperband:
    """When to look at a trial, and how many may go on.

    Attributes:
        bands: epochs at which trials are compared, ascending, counted from 1.
        eta: one in so many may go on.
        strict: judge a trial by its value at the band itself, not by its best value until now.
    """

    bands: tuple[int, ...]
    eta: float
    strict: bool

    def stops(self, history: Sequence[float], others: Sequence[Sequence[float]]) -> bool:
        """Whether a trial should stop.

        Args:
            history: what is minimised, one value an epoch, of the trial.
            others: the same of all trials that have begun, this one among them.
        """
        reached = [band for band in self.bands if band <= len(history)]
        if not reached:
            return False
        band = reached[-1]
        at_band = sorted(_comparable(values[band - 1]) for values in others if len(values) >= band)
        limit = at_band[int(len(at_band) / self.eta)]
        judged = history[band - 1] if self.strict else min(map(_comparable, history))
        return _comparable(judged) > limit


def parse_hyperband(section: Any) -> Hyperband | None:
    """Read the ``early_terminate:`` of a sweep file.

    Args:
        section: as YAML gave it; None where the file has none.

    Raises:
        UserError: something is missing, unknown or impossible; the line names the key.
    """
    if section is None:
        return None
    where = "early_terminate"
    if not isinstance(section, dict) or section.get("type") != "hyperband":
        raise UserError(f"{where}.type: must be hyperband, the only kind there is")
    if unknown := sorted(section.keys() - _HYPERBAND_KEYS):
        raise UserError(f"{where}.{unknown[0]}: is not known; hyperband has {', '.join(sorted(_KNOWN))}")
    eta = section.get("eta", 3)
    if isinstance(eta, bool) or not isinstance(eta, int | float) or eta <= 1:
        raise UserError(f"{where}.eta: must be a number above 1, got {eta!r}")
    if not isinstance(strict := section.get("strict", True), bool):
        raise UserError(f"{where}.strict: must be true or false, got {strict!r}")
    return Hyperband(_bands(where, section, eta), eta, strict)


def _bands(where: str, section: Mapping[str, Any], eta: float) -> tuple[int, ...]:
    for key in {"min_iter", "max_iter", "s"} & section.keys():
        if isinstance(section[key], bool) or not isinstance(section[key], int) or section[key] < 1:
            raise UserError(f"{where}.{key}: must be an integer from 1, got {section[key]!r}")
    if {"max_iter", "s"} <= section.keys():
        down = [int(section["max_iter"] / eta**number) for number in range(1, section["s"] + 1)]
        bands = sorted({band for band in down if band >= 1})
    elif "min_iter" in section:
        count = math.ceil(math.log(_LONGEST / section["min_iter"], eta)) + 1
        bands = sorted({int(section["min_iter"] * eta**number) for number in range(count)})
    else:
        raise UserError(f"{where}: needs min_iter, or max_iter and s (with {sorted(section)} no epoch is named)")
    if not bands:
        raise UserError(
            f"{where}.max_iter: {section['max_iter']} is less than eta {eta}, so no epoch is left to stop at"
        )
    return tuple(bands)


def _comparable(value: float) -> float:
    """A training that has diverged is worse than any other."""
    return math.inf if math.isnan(value) else value


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
