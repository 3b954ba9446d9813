"""The values that a sweep may try: Weights & Biases' distributions, drawn by Optuna.

Where Optuna has the same distribution it draws from that. Any other is drawn as a share in [0, 1] and turned into a
value by the distribution's quantile function, so that random search and TPE work on all of them alike.
https://docs.wandb.ai/models/sweeps/sweep-config-keys#distribution-options-for-random-and-bayesian-search
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
