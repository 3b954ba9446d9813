"""A sweep as one YAML file in Weights & Biases' dialect, which ``wandb sweep`` takes too.

https://docs.wandb.ai/models/sweeps/sweep-config-keys describes the keys; what cannot be followed here is refused in one
line that names the key. Where Optuna has a distribution of W&B's it samples from that; any other is sampled as a share
in [0, 1] and turned into a value by the distribution's quantile function, so that random search and TPE work on all of
them alike.

One kind of parameter is ours: the values of ``overlay`` are named changes of the experiment, each a mapping as an
experiment file has it, or the path of an overlay. ``wandb sweep`` knows no such parameter. An ablation is a grid
over ``overlay``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml

from vitrail.config import read_experiment
from vitrail.errors import UserError

if TYPE_CHECKING:
    from optuna.trial import Trial

OVERLAY = "overlay"

_RANGE = ("min", "max")
_BELL = {"mu": 0.0, "sigma": 1.0}
_BETA = {"a": 1.0, "b": 1.0}
_STEP: dict[str, float] = {"q": 1}
_KINDS: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    "constant": (("value",), {}),
    "categorical": (("values",), {}),
    "categorical_w_probabilities": (("values", "probabilities"), {}),
    "int_uniform": (_RANGE, {}),
    "uniform": (_RANGE, {}),
    "q_uniform": (_RANGE, _STEP),
    "log_uniform_values": (_RANGE, {}),
    "inv_log_uniform_values": (_RANGE, {}),
    "q_log_uniform_values": (_RANGE, _STEP),
    "normal": ((), _BELL),
    "q_normal": ((), _BELL | _STEP),
    "log_normal": ((), _BELL),
    "q_log_normal": ((), _BELL | _STEP),
    "beta": ((), _BETA),
    "q_beta": ((), _BETA | _STEP),
}
"""Keys that each distribution must have, and defaults of those that it may have."""

_NATIVE = {"int_uniform", "uniform", "log_uniform_values", "inv_log_uniform_values"}
_TAIL = 1e-4
"""Left out at each end of a distribution without ends, because TPE tries the ends themselves."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_MAX_GRID = 10_000


@dataclass(frozen=True)
class Parameter:
    """One key of the command line and the values that a sweep may give it.

    Attributes:
        name: dotted key, such as ``model.lr``, or ``overlay``.
        kind: distribution, by W&B's name, or ``overlay``.
        options: the distribution's numbers or values, checked and complete; of ``overlay`` the changes by their names.
    """

    name: str
    kind: str
    options: Mapping[str, Any]

    @property
    def is_constant(self) -> bool:
        """Whether there is only one value."""
        return self.kind == "constant"

    @property
    def choices(self) -> list[Any] | None:
        """All values of a list; None for a range."""
        return list(self.options["values"]) if self.kind in {"categorical", OVERLAY} else None

    def suggest(self, trial: Trial, choices: list[Any] | None = None) -> Any:
        """Return the value that the trial's sampler chooses, as the command line takes it."""
        if (choices := choices or self.choices) is not None:
            # As text, because Optuna has no lists, and takes True and 1 for the same choice.
            return json.loads(trial.suggest_categorical(self.name, [json.dumps(value) for value in choices]))
        low, high = self.options.get("min", 0.0), self.options.get("max", 1.0)
        if self.kind == "int_uniform":
            return trial.suggest_int(self.name, low, high)
        if self.kind in _NATIVE:
            # 1/x of a log-uniform x is log-uniform too.
            return trial.suggest_float(self.name, low, high, log="log" in self.kind)
        tail = _TAIL if "normal" in self.kind else 0.0
        return self.quantile(trial.suggest_float(self.name, tail, 1.0 - tail))

    def quantile(self, share: float) -> Any:
        """Return the value below which this share of the distribution is."""
        if self.kind == "categorical_w_probabilities":
            shares = self.options["probabilities"]
            ends = itertools.accumulate(shares)
            # Rounding may leave the last sum just below 1.
            last = max(index for index, share in enumerate(shares) if share)
            return self.options["values"][next((index for index, end in enumerate(ends) if share < end), last)]
        return self._rounded(float(self._scipy().ppf(share)))

    def grid(self) -> list[Any]:
        """Return all values for a grid.

        Raises:
            UserError: the distribution has no list of values.
        """
        if self.choices is not None:
            return self.choices
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

    def _scipy(self) -> Any:
        from scipy import stats

        options, kind = self.options, self.kind.removeprefix("q_")
        if kind == "uniform":
            return stats.uniform(options["min"], options["max"] - options["min"])
        if kind == "log_uniform_values":
            return stats.loguniform(options["min"], options["max"])
        if kind == "beta":
            return stats.beta(options["a"], options["b"])
        if kind == "log_normal":
            return stats.lognorm(s=options["sigma"], scale=math.exp(options["mu"]))
        return stats.norm(options["mu"], options["sigma"])

    def _rounded(self, value: float) -> float:
        """To a multiple of q, an integer where q is one."""
        if "q" not in self.options:
            return value
        step: float = self.options["q"]
        times = round(value / step)
        # 3 × 0.1 is 0.30000000000000004.
        return times * step if isinstance(step, int) else round(times * step, 12)


def parse_parameters(section: Any) -> list[Parameter]:
    """Read the ``parameters:`` of a sweep file.

    Raises:
        UserError: something is missing, unknown or impossible; the line names the key.
    """
    if not isinstance(section, dict) or not section:
        raise UserError("parameters: must name at least one parameter, such as model.lr: {values: [0.001, 0.01]}")
    return [_parameter(f"parameters.{name}", str(name), entry) for name, entry in section.items()]


def _parameter(where: str, name: str, entry: Any) -> Parameter:
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: is no key of the command line; write it with dots, such as model.lr")
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must have value:, values:, or min: and max:, got {entry!r}")
    if name == OVERLAY:
        return _overlay(where, entry)
    if "parameters" in entry:
        raise UserError(
            f"{where}.parameters: nested parameters reach the command line as one dictionary; "
            f"write dotted keys instead, such as {name}.lr"
        )
    options = {str(key): value for key, value in entry.items() if key != "distribution"}
    kind = entry.get("distribution") or _inferred(where, options)
    if kind in {"log_uniform", "inv_log_uniform", "q_log_uniform"}:
        raise UserError(f"{where}.distribution: {kind} takes exponents and is deprecated by W&B; use {kind}_values")
    if kind not in _KINDS:
        raise UserError(f"{where}.distribution: must be one of {', '.join(_KINDS)}; got {kind!r}")
    required, defaults = _KINDS[kind]
    known = sorted({*required, *defaults})
    if missing := sorted(set(required) - options.keys()):
        raise UserError(f"{where}.{missing[0]}: is missing; a {kind} distribution needs {', '.join(sorted(required))}")
    if unknown := sorted(options.keys() - known):
        raise UserError(
            f"{where}.{unknown[0]}: a {kind} distribution has no such key; its keys are "
            f"{', '.join([*known, 'distribution'])}"
        )
    options = defaults | options
    if "value" in options or "values" in options:
        _check_values(where, options)
    _check_numbers(where, kind, options)
    return Parameter(name, kind, options)


def _overlay(where: str, entry: Mapping[str, Any]) -> Parameter:
    values = entry.get("values")
    if set(entry) != {"values"} or not isinstance(values, dict) or not values:
        raise UserError(f"{where}: must have values: with a name for each overlay, such as {{large: {{model: …}}}}")
    slugs: set[str] = set()
    for name, changes in values.items():
        if not (slug := slug_of(str(name))) or slug in slugs:
            raise UserError(f"{where}.values: {name!r} is not a unique name of a folder; rename it")
        slugs.add(slug)
        if not isinstance(changes, dict | str):
            raise UserError(
                f"{where}.values.{name}: must be keys as an experiment file has them, or the path of an overlay; "
                f"got {changes!r}"
            )
    read = {str(name): read_experiment(value) if isinstance(value, str) else value for name, value in values.items()}
    return Parameter(OVERLAY, OVERLAY, {"values": read})


def slug_of(name: str) -> str:
    """Return a name as a folder's."""
    return re.sub(r"[^\w.@-]+", "_", name).strip("_.")


def _inferred(where: str, options: Mapping[str, Any]) -> str:
    """The distribution that is meant where none is named, by the client's own rule."""
    if "value" in options:
        return "constant"
    if "values" in options:
        return "categorical_w_probabilities" if "probabilities" in options else "categorical"
    if not set(_RANGE) <= options.keys():
        raise UserError(f"{where}: needs value:, values:, or min: and max:, and a distribution: where it has others")
    ends = [_number(f"{where}.{key}", options[key]) for key in _RANGE]
    if all(isinstance(end, int) for end in ends):
        return "int_uniform"
    if all(isinstance(end, float) for end in ends):
        return "uniform"
    raise UserError(f"{where}: min {ends[0]} and max {ends[1]} must both be integers or both have a decimal point")


def _check_values(where: str, options: Mapping[str, Any]) -> None:
    values = [options["value"]] if "value" in options else options["values"]
    if not isinstance(values, list) or not values:
        raise UserError(f"{where}.values: must be a list of at least one value")
    if _has_null(values):
        raise UserError(
            f"{where}: null would reach the command line as the text 'None'; leave the parameter out, "
            "or set it in an overlay that the command names with --config"
        )
    shares = options.get("probabilities", [1.0 / len(values)] * len(values))
    if not isinstance(shares, list) or len(shares) != len(values):
        raise UserError(f"{where}.probabilities: must be a list of {len(values)} numbers, one a value")
    numbers = [_number(f"{where}.probabilities", share) for share in shares]
    if min(numbers) < 0 or not math.isclose(sum(numbers), 1.0, rel_tol=1e-5):
        raise UserError(f"{where}.probabilities: must not be negative and sum to 1, got {sum(numbers):g}")


def _has_null(value: Any) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(map(_has_null, children))


def _check_numbers(where: str, kind: str, options: Mapping[str, Any]) -> None:
    for key in {"min", "max", "mu", "sigma", "q", "a", "b"} & options.keys():
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


@dataclass(frozen=True)
class EarlyStopping:
    """Successive halving: at certain epochs only the best 1/eta of the trials that have come so far go on.

    W&B's ``hyperband`` has one bracket, so it is Optuna's ``SuccessiveHalvingPruner`` (Li et al., "ASHA", MLSys 2020),
    not its ``HyperbandPruner``, which divides the trials over several. Optuna keeps one trial fewer at each epoch: of
    two at eta 2 the better one only. Its epochs go on at ``max_iter / eta**s * eta**k`` as they do from ``min_iter``.

    Attributes:
        first: epoch of the first comparison, counted from 1; the others are at its multiples by powers of eta.
        eta: the factor.
        strict: compare values at these epochs, not the best values until then.
        last: from this epoch on no trial is stopped; 0 for no such epoch.
    """

    first: int
    eta: int
    strict: bool
    last: int = 0


def parse_early_terminate(section: Any) -> EarlyStopping | None:
    """Read the ``early_terminate:`` of a sweep file; None where there is none.

    Raises:
        UserError: something is missing, unknown or impossible; the line names the key.
    """
    where, known = "early_terminate", ("type", "min_iter", "max_iter", "s", "eta", "strict")
    if section is None:
        return None
    if not isinstance(section, dict) or section.get("type") != "hyperband":
        raise UserError(f"{where}.type: must be hyperband, the only kind there is")
    if unknown := sorted(section.keys() - set(known)):
        raise UserError(f"{where}.{unknown[0]}: is not known; hyperband has {', '.join(known)}")
    for key, least in {"min_iter": 1, "max_iter": 1, "s": 1, "eta": 2}.items():
        number = section.get(key, least)
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise UserError(f"{where}.{key}: must be an integer from {least}, got {number!r}")
    eta, strict = section.get("eta", 3), section.get("strict", True)
    if not isinstance(strict, bool):
        raise UserError(f"{where}.strict: must be true or false, got {strict!r}")
    if {"max_iter", "s"} <= section.keys():
        last = section["max_iter"]
        if last < eta:
            raise UserError(f"{where}.max_iter: {last} is less than eta {eta}, so no epoch is left to stop at")
        return EarlyStopping(max(1, last // eta ** section["s"]), eta, strict, last)
    if "min_iter" not in section:
        raise UserError(f"{where}: needs min_iter, or max_iter and s (with {sorted(section)} no epoch is named)")
    return EarlyStopping(section["min_iter"], eta, strict)


Method = Literal["grid", "random", "bayes"]
Goal = Literal["minimize", "maximize"]

_OF_WANDB = {"program", "project", "entity", "description", "name", "apiVersion", "kind"}
"""Keys that only W&B's own pages and agents use."""
_KEYS = {"method", "metric", "parameters", "early_terminate", "run_cap", "command"} | _OF_WANDB
_ARGS, _ARGS_APART = "${args}", "${args_no_equals}"
_RESERVED = {"name", "runs", "config", "ckpt_path", "checkpoint.monitor", "checkpoint.mode"}
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
        """Return whether a value is at the target or better."""
        return self.target is not None and self.sign * value <= self.sign * self.target


@dataclass(frozen=True)
class SweepFile:
    """A sweep, checked.

    Attributes:
        method: how values are chosen; ``bayes`` is TPE.
        metric: what for.
        parameters: of what.
        early_stopping: when trials are stopped early, if at all.
        run_cap: number of trials, unless the command line gives one.
        fit: arguments after ``python -m experiments fit``, with the place of the values.
    """

    method: Method
    metric: Metric
    parameters: tuple[Parameter, ...]
    early_stopping: EarlyStopping | None
    run_cap: int | None
    fit: tuple[str, ...]

    @property
    def searched(self) -> list[Parameter]:
        """Parameters with more than one value to choose from."""
        return [parameter for parameter in self.parameters if not parameter.is_constant]

    @property
    def overlays(self) -> Mapping[str, Mapping[str, Any]]:
        """Changes of the experiment by their names; none where ``overlay`` is no parameter."""
        return next((p.options["values"] for p in self.parameters if p.kind == OVERLAY), {})

    @property
    def configs(self) -> list[str]:
        """Experiment files that the command names."""
        pairs = itertools.pairwise(self.fit)
        return [path for flag, path in pairs if flag == "--config"]

    def grid(self) -> list[dict[str, Any]]:
        """Return all combinations, the last parameter varying fastest.

        Raises:
            UserError: a parameter has no list of values.
        """
        names = [parameter.name for parameter in self.searched]
        columns = [parameter.grid() for parameter in self.searched]
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*columns)]

    def place(self, slot: int, values: Mapping[str, Any]) -> Path:
        """Return where a trial's run is put, below the sweep's folder; the last part is the run's name.

        A trial that is nothing but an overlay is named after it, and moves with its content.
        """
        if self.overlays and len(self.searched) == 1:
            name = values[OVERLAY]
            return Path("trials", fingerprint(self.overlays[name]), slug_of(name))
        return Path("trials", f"trial-{slot:04d}")

    def arguments(self, values: Mapping[str, Any], more: list[str], folder: Path) -> list[str]:
        """Return arguments of a trial, after ``python -m experiments``, made as W&B's agent makes them."""
        constants = {p.name: p.options["value"] for p in self.parameters if p.is_constant}
        chosen = {p.name: {**constants, **values}[p.name] for p in self.parameters}
        if OVERLAY in chosen:
            more = ["--config", f"{folder / slug_of(chosen.pop(OVERLAY))}.yaml", *more]
        made = ["fit"]
        for part in self.fit:
            if part == _ARGS:
                made += [*more, *(f"--{name}={value}" for name, value in chosen.items())]
            elif part == _ARGS_APART:
                made += [*more, *(text for name, value in chosen.items() for text in (f"--{name}", str(value)))]
            else:
                made.append(part)
        return made


def fingerprint(content: Any) -> str:
    """Return a text that changes with the content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def read_sweep(path: Path) -> SweepFile:
    """Read and check a sweep file, or an ablation in the dialect of version 0.1 (``experiment:`` and ``variants:``).

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
        raise UserError(f"{path}: has no keys; a sweep has method:, metric:, parameters: and command:")
    try:
        if "variants" in content:
            content = _from_variants(path, read_experiment(path))
        elif isinstance(parameters := content.get("parameters"), dict) and OVERLAY in parameters:
            # Changes are read as experiment files are, by YAML 1.2.
            parameters[OVERLAY] = read_experiment(path)["parameters"][OVERLAY]
        return _parsed(content)
    except UserError as error:
        raise error if str(error).startswith(f"{path}: ") else UserError(f"{path}: {error}") from error


def _from_variants(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The grid that an ablation of version 0.1 is."""
    variants, experiment = content["variants"], content.get("experiment")
    if strange := sorted(content.keys() - {"experiment", "variants"}):
        raise UserError(f"unknown key {strange[0]!r}; an ablation has experiment: and variants:")
    if not isinstance(experiment, str) or not isinstance(variants, list):
        raise UserError("needs experiment: with the path of an experiment, and a list variants:")
    for number, one in enumerate(variants):
        if not isinstance(one, dict) or set(one) != {"name", "changes"} or not isinstance(one["changes"], dict):
            raise UserError(f"variants[{number}]: needs name: and changes: with keys as an experiment file has them")
    names = [str(one["name"]) for one in variants]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"variants: {twice[0]!r} is not a unique name; rename it")
    base = path.parent / experiment
    checkpoint = read_experiment(base).get("checkpoint") or {}
    goal = "maximize" if checkpoint.get("mode") == "max" else "minimize"
    return {
        "method": "grid",
        "metric": {"name": checkpoint.get("monitor", "val/loss"), "goal": goal},
        "parameters": {OVERLAY: {"values": {str(one["name"]): one["changes"] for one in variants}}},
        "command": ["python", "-m", "experiments", "fit", "--config", str(base), _ARGS],
    }


def _parsed(content: Mapping[str, Any]) -> SweepFile:
    if unknown := sorted(str(key) for key in content if key not in _KEYS):
        raise UserError(f"{unknown[0]}: is not a key that can be followed here; known are {', '.join(sorted(_KEYS))}")
    if (method := content.get("method")) not in ("grid", "random", "bayes"):
        raise UserError(f"method: must be grid, random or bayes, got {method!r}")
    parameters = tuple(parse_parameters(content.get("parameters")))
    for parameter in parameters:
        if parameter.name in _RESERVED:
            raise UserError(f"parameters.{parameter.name}: is set by the sweep itself; leave it out")
    run_cap = content.get("run_cap")
    if run_cap is not None and (isinstance(run_cap, bool) or not isinstance(run_cap, int) or run_cap < 1):
        raise UserError(f"run_cap: must be an integer from 1, got {run_cap!r}")
    sweep = SweepFile(
        method=cast("Method", method),
        metric=_metric(content.get("metric")),
        parameters=parameters,
        early_stopping=parse_early_terminate(content.get("early_terminate")),
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
    if unknown := sorted(section.keys() - {"name", "goal", "target"}):
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
    if (target := section.get("target")) is not None:
        _number("metric.target", target)
    return Metric(name, cast("Goal", goal), target)


def _fit_arguments(command: Any, program: str) -> tuple[str, ...]:
    """What follows ``python -m experiments fit`` in the command that W&B's agent would run."""
    if not isinstance(command, list) or not all(isinstance(part, str | int | float) for part in command):
        raise UserError(f"command: is missing; write {_COMMAND}")
    # As the agent does: the variable's value, or its name where there is none.
    pattern = r"\$\{envvar:([A-Z0-9_]*)\}"
    parts = [re.sub(pattern, lambda found: os.environ.get(found[1], found[1]), str(part)) for part in command]
    parts = [program if part == "${program}" else part for part in parts]
    heads = [number for number in range(len(parts)) if parts[number : number + 3] == ["-m", "experiments", "fit"]]
    if not heads:
        raise UserError(f"command: does not run `-m experiments fit`; write {_COMMAND}")
    fit = parts[heads[0] + 3 :]
    macros = [part for part in fit if re.fullmatch(r"\$\{.*\}", part)]
    if len(macros) != 1 or macros[0] not in {_ARGS, _ARGS_APART}:
        raise UserError(
            f"command: needs {_ARGS} once where the values go, got {' '.join(macros) or 'none'} "
            "(`fit` does not understand flags without a value, or values without --)"
        )
    return tuple(fit)
