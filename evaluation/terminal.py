"""Tables on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def print_table(table: Table) -> None:
    """Print a table, wide enough for whole numbers where there is no terminal to fit (a pipe, a log)."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(table)
