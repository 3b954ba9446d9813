"""Size, speed and accuracy of exported forms beside the model that they were made of."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.efficiency import BatchCost, ratio_told
from evaluation.summary import markdown_rows
from experiments.export_parity import Parity
from experiments.export_runners import Runner


@dataclass(frozen=True)
class Form:
    """One way to run the model.

    Attributes:
        name: as tables have it; the first of several is what ratios are to.
        size: of its files in bytes.
        parity: its outputs beside the model's own.
        costs: of the pictures' tower by batch size; empty where nothing was timed.
    """

    name: str
    size: int
    parity: list[Parity]
    costs: dict[int, BatchCost]


def interleaved(
    runners: Mapping[str, Runner], pictures: NDArray[np.uint8], sizes: Sequence[int], repeats: int
) -> dict[str, dict[int, BatchCost]]:
    """Seconds of a batch, measured in turn: who begins moves on by one from round to round.

    Args:
        runners: of the pictures' tower; ratios are to the first, within a round.
        pictures: real ones, uint8 ``(N, 3, S, S)``, repeated where a batch is larger.
        sizes: of batches.
        repeats: rounds that count; one before them does not.
    """
    names = list(runners)
    found: dict[str, dict[int, BatchCost]] = {name: {} for name in names}
    for size in sizes:
        batch = {"image": pictures[np.arange(size) % len(pictures)]}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(repeats + 1):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                runners[name](batch)
                if number:
                    seconds[name].append(time.perf_counter() - start)
        for name in names:
            ratios = [one / base for one, base in zip(seconds[name], seconds[names[0]], strict=True)]
            found[name][size] = BatchCost(seconds[name], ratios, None)
    return found


def folder_size(files: Sequence[Path]) -> int:
    """Bytes of files together."""
    return sum(file.stat().st_size for file in files)


def headings(forms: Sequence[Form]) -> list[str]:
    """Of ``cells``."""
    choices = [row for row in forms[0].parity if _is_choice(row)]
    sizes = list(forms[0].costs)
    return [
        "form",
        "size",
        *(f"{row.what}: agrees{', accuracy' if row.known else ''}" for row in choices),
        "largest difference",
        *(f"time, batch {size} [low, high]" for size in sizes),
    ]


def cells(form: Form, first: Form) -> list[str]:
    """One form as text; sizes and times as ratios to the first."""
    choices = [row for row in form.parity if _is_choice(row)]
    differences = [row.difference for row in form.parity]
    return [
        form.name,
        f"{form.size / 1e6:.2f} MB, {form.size / first.size:.2f}",
        *(_choice(row) for row in choices),
        f"{max(differences):.1g}" if differences else "–",
        *(ratio_told(one) for one in form.costs.values()),
    ]


def markdown(forms: Sequence[Form]) -> str:
    """The forms as a Markdown table, without a line feed at the end."""
    return markdown_rows(headings(forms), [cells(form, forms[0]) for form in forms])


def rich_table(forms: Sequence[Form]) -> Any:
    """The forms as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for number, heading in enumerate(headings(forms)):
        table.add_column(Text(heading), justify="right" if number else "left", overflow="fold")
    for form in forms:
        table.add_row(*(Text(cell) for cell in cells(form, forms[0])))
    return table


def _is_choice(row: Parity) -> bool:
    return not math.isnan(row.agreement)


def _choice(row: Parity) -> str:
    accuracy = f", {row.accuracy[1]:.3f}" if row.known else ""
    return f"{row.agreement:.3f} of {row.n}{accuracy}"
