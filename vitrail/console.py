"""Tables on the terminal.

A progress bar for work that turns out to be long.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.table import Table


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str] = ()) -> Table:
    """A table of cells that are shown as they are: square brackets in them are no markup.

    Args:
        columns: headings.
        rows: a cell a column.
        left: columns of words; the others are of numbers and stand right.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in columns:
        table.add_column(Text(column), justify="left" if column in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def print_table(table: Table) -> None:
    """Print a table, wide enough for whole numbers where there is no terminal to fit (a pipe, a log)."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(table)


Item = TypeVar("Item")

PATIENCE = 1.0
"""Seconds after which a bar appears; what is quicker needs none."""


def tracked(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Hands the items on and shows a bar on the terminal once it takes more than a second.

    Args:
        items: what is worked on.
        description: what is being done, for the user.
        total: number of items.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # A file or a pipe gets no bar: it would be torn into lines.
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(description, total=total)
    begin, shown = time.monotonic(), False
    try:
        for done, item in enumerate(items):
            if not shown and time.monotonic() - begin > PATIENCE:
                bar.start()
                shown = True
            bar.update(task, completed=done)
            yield item
    finally:
        if shown:
            bar.stop()
