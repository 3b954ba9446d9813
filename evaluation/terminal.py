"""Tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

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
