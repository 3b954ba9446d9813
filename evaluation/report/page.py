"""Pages of sections: one HTML file that needs no other, for wide and narrow windows, light and dark, and Markdown.

A section has paragraphs, figures, tables and small images, or states what is missing. Figures, small images and tables
are also written as PNG, JPEG and CSV. The templates are in ``templates/``; what a template prints is escaped.
"""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from vitrail.files import write_atomically, write_csv, write_text_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


SHOWN_ROWS = 25
"""Rows of a table that a page shows; its CSV has all of them."""


@dataclass(frozen=True)
class Card:
    """A small image and its description; ``stem`` names its file, ``jpeg`` is None where the image cannot be read."""

    stem: str
    jpeg: bytes | None
    lines: list[str]


@dataclass(frozen=True)
class Section:
    """One part of a page.

    Attributes:
        title: its heading.
        paragraphs: plain text; commands are between back ticks.
        figures: each by the name of its file without the ending.
        tables: likewise.
        files: tables that are written next to the page, but not shown on it.
        missing: why something is not here; a paragraph each.
        cards: rows of small images, each row by its heading.
        folded: long plain texts that are folded away, each by its heading.
    """

    title: str
    paragraphs: list[str] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    files: dict[str, pd.DataFrame] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    cards: dict[str, list[Card]] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """A title, paragraphs below it, and sections."""

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]

    @functools.cached_property
    def files(self) -> dict[str, bytes | pd.DataFrame]:
        """The files that belong to the page, by name."""
        found: dict[str, bytes | pd.DataFrame] = {}
        for section in self.sections:
            found |= {f"{stem}.png": _png(figure) for stem, figure in section.figures.items()}
            found |= {f"{stem}.csv": table for stem, table in (*section.tables.items(), *section.files.items())}
            cards = [card for row in section.cards.values() for card in row]
            found |= {f"{card.stem}.jpg": card.jpeg for card in cards if card.jpeg is not None}
        return found

    def html(self) -> str:
        """Return the page as HTML with its images inside."""
        return _environment().get_template("page.html").render(page=self)

    def markdown(self, folder: str) -> str:
        """Return the page as Markdown, with links to its files in ``folder``."""
        return _environment(finalize=_markdown).get_template("page.md").render(page=self, folder=folder)

    def write(self, folder: Path, name: str, files: Path | None = None) -> Path:
        """Write the page as HTML and its files, each atomically; the page last.

        Args:
            folder: for the page.
            name: of the page without its ending.
            files: folder for everything but the page; the same by default.

        Returns:
            The page's path.
        """
        for file, content in self.files.items():
            path = (folder if files is None else files) / file
            if isinstance(content, bytes):
                with write_atomically(path) as partial:
                    partial.write_bytes(content)
            else:
                write_csv(path, content)
        page = folder / f"{name}.html"
        write_text_atomically(page, self.html())
        return page


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _environment(**options: Any) -> Environment:
    environment = Environment(
        loader=PackageLoader("evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    environment.filters |= {"code": _with_code, "cell": _cell, "rows": _rows, "rest": _rest, "fence": _fence}
    environment.filters["markdown_cell"] = _markdown_cell
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    environment.tests["number"] = lambda value: isinstance(value, int | float)
    return environment


def _with_code(text: str) -> Markup:
    """Escape a text; what is between two back ticks is a command."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _rows(table: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(table.head(SHOWN_ROWS).itertuples(index=False, name=None))


def _rest(table: pd.DataFrame) -> str:
    more = len(table) - SHOWN_ROWS
    return f"and {more:,} more rows in " if more > 0 else ""


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.3f}"  # noqa: PLR0124 -- NaN
    return f"{value:,}" if isinstance(value, int) else str(value)


def _fence(text: str) -> Markup:
    """Return more back ticks than any run of them in the text, so that it cannot end the block."""
    return Markup("`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0)))


def _markdown(value: object) -> Markup:
    """Escape what Markdown would interpret; commands between back ticks stay."""
    if isinstance(value, Markup):
        return value
    text = str(value).replace("\n", " ")
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return Markup(_escaped(text.replace("`", "'")))
    return Markup("`".join(part if place % 2 else _escaped(part) for place, part in enumerate(parts)))


def _markdown_cell(value: object) -> Markup:
    return Markup(str(_markdown(_cell(value))).replace("|", r"\|"))


def _escaped(text: str) -> str:
    # Within a word an underscore means nothing.
    return re.sub(r"([\\*<>]|(?<!\w)_|_(?!\w)|\](?=[(\[]))", r"\\\1", text)
