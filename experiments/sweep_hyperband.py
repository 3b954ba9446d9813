"""Early stopping of a sweep's trials: successive halving at a few epochs, by the rule of Weights & Biases' server.

At each of some epochs ("bands") only the best 1/eta of all trials that have come so far may go on. Li et al.,
"Hyperband", JMLR 18 (2018), with one bracket and without waiting for each other, as in Li et al., "ASHA", MLSys 2020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitrail.errors import UserError

_KNOWN = {"type", "min_iter", "max_iter", "s", "eta", "strict"}
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
    if unknown := sorted(section.keys() - _KNOWN):
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
