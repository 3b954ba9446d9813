"""Contenders measured in turn, and the ratios, table and file made of it.

A machine is never quiet. So contenders run one after the other in every round, in an order that moves on from round to
round, and a ratio is taken within a round, where both sides met the same disturbances. Reported are the median of the
rounds' ratios, and the lowest and the highest of them.
"""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vitrail.console import Table

T = TypeVar("T")

_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "≥": operator.ge,
    "≤": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Row:
    """One ratio.

    Attributes:
        benchmark: what was done.
        contender: whose number is the numerator.
        peer: whose number is the denominator.
        ratio: median over the rounds; NaN where nothing was measured.
        low: lowest of the rounds.
        high: highest of the rounds.
        unit: of the numbers, such as ``steps/s``.
        promise: bound of the ratio as ``≥ 0.98``, ``≤ 1.3``, ``> 1`` or ``< 1``; empty where nothing is promised.
        note: the numbers themselves, or why there are none.

    Raises:
        ValueError: if the promise is not of that form.
    """

    benchmark: str
    contender: str
    peer: str
    ratio: float
    low: float
    high: float
    unit: str
    promise: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.promise and self.promise.split(" ")[0] not in _HOLDS:
            raise ValueError(f"promise: {self.promise!r} must begin with one of {', '.join(_HOLDS)}")

    @property
    def kept(self) -> bool | None:
        """Whether the promise holds; None where there is none, or nothing was measured."""
        if not self.promise or math.isnan(self.ratio):
            return None
        sign, bound = self.promise.split(" ")
        return _HOLDS[sign](self.ratio, float(bound))


def interleave(contenders: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Call every contender once a round; which one begins moves on by one from round to round.

    Returns:
        For each contender one result a round, in the order of the rounds.
    """
    names = list(contenders)
    found: dict[str, list[T]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(contenders[name]())
    return found


def pick(found: Mapping[str, Sequence[Mapping[str, float]]], key: str) -> dict[str, list[float]]:
    """One of several numbers that were measured in each round."""
    return {name: [numbers[key] for numbers in rounds] for name, rounds in found.items()}


def row(
    benchmark: str,
    contender: str,
    peer: str,
    values: Mapping[str, Sequence[float]],
    unit: str,
    promise: str = "",
    note: str = "",
) -> Row:
    """The ratio of two contenders.

    Args:
        benchmark: what was done.
        contender: key of ``values``, the numerator.
        peer: key of ``values``, the denominator.
        values: for each contender one number a round.
        unit: of the numbers.
        promise: see ``Row``.
        note: further remarks, which follow the medians.
    """
    ratios = [one / other for one, other in zip(values[contender], values[peer], strict=True)]
    medians = f"{_short(statistics.median(values[contender]))} : {_short(statistics.median(values[peer]))} {unit}"
    ratio, note = statistics.median(ratios), f"{medians}; {note}" if note else medians
    return Row(benchmark, contender, peer, ratio, min(ratios), max(ratios), unit, promise, note)


def table(rows: Sequence[Row]) -> Table:
    """The rows as a table of text."""
    cells = []
    for one in rows:
        ratio = "–" if math.isnan(one.ratio) else f"{one.ratio:.3f} [{one.low:.3f}, {one.high:.3f}]"
        promise = one.promise if one.kept is None else f"{one.promise}: {'kept' if one.kept else 'missed'}"
        cells.append((one.benchmark, one.contender, one.peer, ratio, promise, one.note))
    return Table(("benchmark", "contender", "peer", "ratio [lowest, highest]", "promise", "measured"), cells, None)


def _short(number: float) -> str:
    """Three significant digits, without an exponent for what is usual here."""
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"
