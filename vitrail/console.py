"""Tables and progress bars."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    r"""A table of text that renders to the terminal, Markdown and JSON, without markup in cells.

    Attributes:
        columns: headings.
        rows: cells of each row.
        left: left-aligned columns; None for all, by default the first.
        title: title above the table.
        caption: caption below it, on the terminal only.
        unbroken: columns whose cells are not wrapped.
        styles: styles of rows on the terminal, such as ``{0: "bold"}``.
        values: values for JSON instead of the cells.
        header: whether the terminal shows the headings.

    Example:
        >>> print(Table(["run", "accuracy"], [["a|b", "0.900"]]).markdown())
        | run | accuracy |
        | --- | --- |
        | a\|b | 0.900 |
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Collection[str] | None = ()
    title: str = ""
    caption: str = ""
    unbroken: Collection[str] = ()
    styles: Mapping[int, str] = field(default_factory=dict)
    values: Any = None
    header: bool = True

    def __rich__(self) -> RichTable:
        """Return the table for ``rich.console.Console.print``."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(_printable(self.title)) if self.title else None,
            title_justify="left",
            caption=Text("\n".join(map(_printable, self.caption.split("\n")))) if self.caption else None,
            caption_justify="left",
            show_header=self.header,
        )
        left = self.columns if self.left is None else self.left or self.columns[:1]
        for column in self.columns:
            side: Literal["left", "right"] = "left" if column in left else "right"
            table.add_column(Text(column), justify=side, overflow="fold", no_wrap=column in self.unbroken)
        for number, row in enumerate(self.rows):
            table.add_row(*(Text(_printable(cell)) for cell in row), style=self.styles.get(number, ""))
        return table

    def markdown(self) -> str:
        """Return the table as Markdown, with its title above."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
        return f"{self.title}\n\n{table}" if self.title else table

    def json(self) -> str:
        """Return the values as JSON, by default a list of objects of cells; NaN becomes null."""
        values = self.values
        if values is None:
            values = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return json.dumps(without_nan(values), indent=2)

    def show(self, *, as_markdown: bool = False, as_json: bool = False) -> None:
        """Print the table, 160 characters wide if the output is no terminal."""
        from rich.console import Console

        if as_markdown or as_json:
            sys.stdout.write(f"{self.json() if as_json else self.markdown()}\n")
        else:
            Console(width=None if sys.stdout.isatty() else 160).print(self)


def _printable(text: str) -> str:
    """Replace control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def without_nan(value: Any) -> Any:
    """Return a value for JSON: tuples become lists, NaN becomes null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


Item = TypeVar("Item")

PATIENCE = 1.0
"""Seconds after which a bar appears."""


def tracked(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield the items, with a progress bar on the terminal after a second.

    Args:
        items: the items.
        description: text of the bar.
        total: number of items.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
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
