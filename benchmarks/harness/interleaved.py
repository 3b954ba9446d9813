"""Contenders measured in turn, and what is made of it: ratios with their spread, a table, a file.

A machine is never quiet. So contenders run one after the other in every round, in an order that moves on from round to
round, and a ratio is taken within a round, where both sides met the same disturbances. Reported are the median of the
rounds' ratios, and the lowest and the highest of them.

What memory processes hold, as Linux counts it.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

HEADER = ("benchmark", "contender", "beside", "ratio [lowest, highest]", "promise", "measured")


@dataclass(frozen=True)
class Row:
    """One ratio.

    Attributes:
        benchmark: what was done.
        contender: whose number is above the line of the fraction.
        peer: whose number is below.
        ratio: median over the rounds; not a number where nothing was measured.
        low: lowest of the rounds.
        high: highest of the rounds.
        unit: what the numbers are, such as ``steps/s``.
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
            raise ValueError(f"promise: {self.promise!r} begins with none of {', '.join(_HOLDS)}")

    @property
    def kept(self) -> bool | None:
        """Whether the promise holds; None where there is none, or nothing was measured."""
        if not self.promise or math.isnan(self.ratio):
            return None
        sign, bound = self.promise.split(" ")
        return _HOLDS[sign](self.ratio, float(bound))


_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "≥": lambda ratio, bound: ratio >= bound,
    "≤": lambda ratio, bound: ratio <= bound,
    ">": lambda ratio, bound: ratio > bound,
    "<": lambda ratio, bound: ratio < bound,
}


def interleave(contenders: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Calls every contender once a round; who begins moves on by one from round to round.

    Args:
        contenders: does its work once and returns what was measured.
        rounds: how many, at least 1.

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
        contender: key of ``values``, above the line.
        peer: key of ``values``, below.
        values: for each contender one number a round.
        unit: of the numbers.
        promise: see ``Row``.
        note: further remarks; the medians stand in front of it.
    """
    ratios = [one / other for one, other in zip(values[contender], values[peer], strict=True)]
    medians = f"{_short(statistics.median(values[contender]))} : {_short(statistics.median(values[peer]))} {unit}"
    return Row(
        benchmark,
        contender,
        peer,
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        unit,
        promise,
        f"{medians}; {note}" if note else medians,
    )


def not_measured(benchmark: str, contender: str, peer: str, unit: str, promise: str, why: str) -> Row:
    """A row that says why there is no number."""
    return Row(benchmark, contender, peer, math.nan, math.nan, math.nan, unit, promise, f"not measured: {why}")


def in_new_process(
    module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Runs a module in a process of its own and returns the numbers in the last line that it prints, a JSON object.

    Args:
        module: as for ``python -m``.
        arguments: of the command.
        environment: variables on top of those of this process.

    Raises:
        RuntimeError: if the command fails, with the last lines of what it said.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **(environment or {})}
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def cells(one: Row) -> tuple[str, ...]:
    """A row as text, in the order of ``HEADER``."""
    ratio = "–" if math.isnan(one.ratio) else f"{one.ratio:.3f} [{one.low:.3f}, {one.high:.3f}]"
    promise = one.promise if one.kept is None else f"{one.promise}: {'kept' if one.kept else 'missed'}"
    return one.benchmark, one.contender, one.peer, ratio, promise, one.note


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table that ends with a line feed."""
    lines = [HEADER, ("---",) * len(HEADER), *(cells(one) for one in rows)]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def say(rows: Sequence[Row]) -> None:
    """Prints the rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*HEADER)
    for one in rows:
        table.add_row(*cells(one))
    Console().print(table)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain values; what was not measured is null, because JSON has no other word for it."""
    values = [asdict(one) for one in rows]
    return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in one.items()} for one in values]


def from_json(values: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Undoes ``as_json``."""
    complete: list[dict[str, Any]] = [{k: math.nan if v is None else v for k, v in one.items()} for one in values]
    return [Row(**one) for one in complete]


def _short(number: float) -> str:
    """Three significant digits, without an exponent for what is usual here."""
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"


def peak_memory() -> float:
    """Highest resident memory of this process, since the peak was last cleared, in MB."""
    return _megabytes(Path("/proc/self/status"), "VmHWM")


def own_memory(process: int) -> float:
    """Memory that a process has written to and shares with nobody, in MB.

    What it has in common with its parent does not count. Neither do pages of a file that it has mapped: where the file
    was written a moment ago Linux calls them dirty and private too, but they are the file's, not the process's.
    """
    total = dirty = 0
    for line in Path(f"/proc/{process}/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("Private_Dirty:"):
            dirty = int(line.split()[1])
        elif line.startswith("Anonymous:"):
            total += min(dirty, int(line.split()[1]))
    return total / 1024


def children(process: int) -> list[int]:
    """Numbers of the processes that one has started, from whichever thread."""
    found = Path(f"/proc/{process}/task").glob("*/children")
    return [int(number) for path in found for number in path.read_text(encoding="ascii").split()]


def _megabytes(path: Path, key: str) -> float:
    lines = path.read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 1024
