"""Pages of sections: one HTML file that needs no other and no network, for any window, light, dark and paper; Markdown.

A page begins with a summary that fits a window. Its sections have paragraphs, charts, tables, confusion matrices,
image grids and small images, or state what is missing; a section with nothing else goes to the end of the page.
Charts, images and tables are also written as SVG, JPEG and CSV. The templates, the style sheets and the script are in
``templates/``; what a template prints is escaped, and the page's security policy lets no other style or script run.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from evaluation.report.charts import HUES, Chart, Span
from vitrail.files import write_atomically, write_csv, write_text_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


SHOWN_ROWS = 25
"""Rows of a table that a page shows at first, and Markdown at all; its CSV has all of them."""

MAX_ROWS = 5_000
"""Rows of a table or image grid that a page holds."""

SHOWN_TILES = 12
"""Images of a grid that a page shows at first."""

IMAGE_BYTES = 9_000_000
"""Images of grids that a page holds; base64 makes a third more of it."""

MATRIX_CLASSES = 40
"""Classes of a confusion matrix that is shown whole; of more, those that are confused most."""


@dataclass(frozen=True)
class Card:
    """A small image and its description; ``stem`` names its file, ``jpeg`` is None where the image cannot be read."""

    stem: str
    jpeg: bytes | None
    lines: list[str]


@dataclass(frozen=True)
class ImageGrid:
    """Images that a reader can filter.

    Attributes:
        name: of its files, and for matrices that lead to it; its rows are a file of the section's.
        heading: above it.
        rows: a row an image, the most important first; ``name`` is the image's. The other columns are shown below it.
        facets: columns that are chosen from, each with the label of its list. A cell may hold several values with
            ``separator``.
        amount: numeric column of which a range can be chosen; empty for none.
        images: JPEG by name, of some of the images.
        separator: between several values.
    """

    name: str
    heading: str
    rows: pd.DataFrame
    facets: Mapping[str, str]
    amount: str
    images: Mapping[str, bytes]
    separator: str = ""

    @property
    def cards(self) -> list[Card]:
        """The first images, as they are written next to the page."""
        shown = self.rows.head(SHOWN_TILES).to_dict("records")
        return [
            Card(f"{self.name}_{place:02}", self.images.get(row["name"]), [*self.lines(row), str(row["name"])])
            for place, row in enumerate(shown, start=1)
        ]

    def lines(self, row: Mapping[Any, Any]) -> list[str]:
        """Return a row's cells but for the name as texts, without empty ones."""
        return [
            f"{column}: {text}" for column in self.rows.columns if column != "name" and (text := _cell(row[column]))
        ]

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script filters."""
        kept = self.rows.head(MAX_ROWS)
        return {
            "columns": list(kept.columns),
            "rows": _values(kept),
            "facets": list(self.facets),
            "amount": self.amount,
            "separator": self.separator,
        }


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix, int64, rows are targets; where there are many classes, only those confused most.

    Attributes:
        heading: above it.
        counts: rows and columns have the classes' names.
        grid: name of the image grid that a cell leads to; empty for none.
        facets: the grid's columns that the row and the column of a cell choose.
    """

    heading: str
    counts: pd.DataFrame
    grid: str = ""
    facets: tuple[str, str] = ("target", "predicted")

    @functools.cached_property
    def shown(self) -> pd.DataFrame:
        """The rows and columns that are shown, in their own order."""
        counts = self.counts
        if max(counts.shape) <= MATRIX_CLASSES + 1:
            return counts
        # Classes of the most frequent mistakes, so that these are among what is shown.
        rows, columns = ([str(name) for name in names] for names in (counts.index, counts.columns))
        mistakes = counts.to_numpy() * (np.array(rows)[:, None] != np.array(columns)[None, :])
        kept: set[str] = set()
        for cell in np.argsort(-mistakes, axis=None, kind="stable").tolist():
            if len(kept) >= MATRIX_CLASSES // 2:
                break
            row, column = divmod(cell, len(columns))
            kept |= {rows[row], columns[column]}
        return counts.loc[[name in kept for name in rows], [name in kept for name in columns]]

    @property
    def rows(self) -> list[tuple[str, list[tuple[str, int, int, bool]]]]:
        """Name of each row and its cells: column, samples, shade from 0 to 9 by the share of the row, and right."""
        columns, found = [str(name) for name in self.shown.columns], []
        totals = dict(zip(self.counts.index, self.counts.to_numpy().sum(axis=1).tolist(), strict=True))
        for name, counts in zip(self.shown.index, self.shown.to_numpy().tolist(), strict=True):
            shades = [min(9, round(9 * (count / max(totals[name], 1)) ** 0.5)) for count in counts]
            right = [column == str(name) for column in columns]
            found.append((str(name), list(zip(columns, counts, shades, right, strict=True))))
        return found


@dataclass(frozen=True)
class Headline:
    """A number of the summary.

    Attributes:
        label: what it is.
        span: value with its interval, next to that of the baseline.
        value: the value as it is written large.
        verdict: what it means, in a few words.
        tone: ``good``, ``bad`` or empty.
    """

    label: str
    value: str
    span: Span
    verdict: str
    tone: str = ""


@dataclass(frozen=True)
class Summary:
    """What a reader must know, on one screen.

    Attributes:
        subject: what was done with what, in a sentence or two.
        headlines: the main numbers, the most important first.
        caveats: how sure they are, and what speaks against them.
        steps: what to do next, with commands between back ticks.
    """

    subject: list[str]
    headlines: list[Headline]
    caveats: list[str]
    steps: list[str]


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
        charts: each by the name of its file without the ending.
        matrices: confusion matrices.
        grids: images that can be filtered.
        is_detail: whether the section is folded away.
    """

    title: str
    paragraphs: list[str] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    files: dict[str, pd.DataFrame] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    cards: dict[str, list[Card]] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    charts: dict[str, Chart] = field(default_factory=dict)
    matrices: list[Matrix] = field(default_factory=list)
    grids: list[ImageGrid] = field(default_factory=list)
    is_detail: bool = False

    @property
    def is_gap(self) -> bool:
        """Whether it only states what is missing."""
        parts = (self.figures, self.tables, self.files, self.cards, self.folded, self.charts, self.matrices)
        return bool(self.missing) and not any((*parts, self.grids, self.paragraphs))


@dataclass(frozen=True)
class Page:
    """A title, paragraphs below it, sections and, above them, a summary."""

    title: str
    lead: Sequence[str]
    sections: Sequence[Section]
    summary: Summary | None = None

    @property
    def shown(self) -> list[Section]:
        """Sections with something to show, details last."""
        return sorted((one for one in self.sections if not one.is_gap), key=lambda one: one.is_detail)

    @property
    def gaps(self) -> list[Section]:
        """Sections that only state what is missing."""
        return [one for one in self.sections if one.is_gap]

    @property
    def grid_names(self) -> set[str]:
        """Names of the image grids, which matrices lead to."""
        return {grid.name for section in self.shown for grid in section.grids}

    @functools.cached_property
    def files(self) -> dict[str, bytes | pd.DataFrame]:
        """The files that belong to the page, by name."""
        found: dict[str, bytes | pd.DataFrame] = {}
        for section in self.sections:
            found |= {f"{stem}.png": _png(figure) for stem, figure in section.figures.items()}
            found |= {f"{stem}.svg": chart.file() for stem, chart in section.charts.items()}
            found |= {f"{stem}.csv": table for stem, table in (*section.tables.items(), *section.files.items())}
            rows = [*section.cards.values(), *(grid.cards for grid in section.grids)]
            found |= {f"{card.stem}.jpg": card.jpeg for row in rows for card in row if card.jpeg is not None}
        return found

    @property
    def images(self) -> dict[str, str]:
        """Images of grids that are not shown at first, as base64 by name; no more than ``IMAGE_BYTES``."""
        grids = [grid for section in self.shown for grid in section.grids]
        found: dict[str, str] = {}
        used = 0
        # The grids take turns, so that none of them is left without.
        queues = [
            iter([one for one in grid.images.items() if one[0] not in set(grid.rows["name"].head(SHOWN_TILES))])
            for grid in grids
        ]
        while queues and used < IMAGE_BYTES:
            for queue in list(queues):
                if (one := next(queue, None)) is None:
                    queues.remove(queue)
                elif one[0] not in found:
                    found[one[0]] = _base64(one[1])
                    used += len(one[1])
        return found

    def html(self) -> str:
        """Return the page as HTML with its images inside."""
        style, script = _style(), _resource("page.js")
        policy = (
            f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
            "base-uri 'none'; form-action 'none'"
        )
        parts = {"style": Markup(style), "script": Markup(script), "policy": policy, "hues": HUES}
        return _environment().get_template("page.html").render(page=self, **parts)

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


@functools.cache
def _resource(name: str) -> str:
    return (files("evaluation.report") / "templates" / name).read_text(encoding="utf-8")


def _style() -> str:
    return "".join(_resource(name) for name in ("palette.css", "marks.css", "page.css"))


def _digest(text: str) -> str:
    """As a security policy names the content of an element."""
    return f"sha256-{_base64(hashlib.sha256(text.encode()).digest())}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


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
    environment.filters |= {"markdown_cell": _markdown_cell, "base64": _base64, "kinds": _kinds, "hidden": _hidden}
    environment.filters |= {"sort_key": _sort_key, "spoken": lambda stem: stem.replace("_", " ")}
    environment.tests["number"] = lambda value: isinstance(value, int | float)
    return environment


def _with_code(text: str) -> Markup:
    """Escape a text; what is between two back ticks is a command."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _rows(table: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(table.head(SHOWN_ROWS).itertuples(index=False, name=None))


def _hidden(table: pd.DataFrame) -> list[list[Any]]:
    """Rows that a page holds and does not show at first."""
    return _values(table.iloc[SHOWN_ROWS:MAX_ROWS])


def _values(table: pd.DataFrame) -> list[list[Any]]:
    """Cells as JSON holds them."""
    return [[_json(value) for value in row] for row in table.itertuples(index=False, name=None)]


def _json(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 6)
    return value if isinstance(value, int) else str(value)


def _kinds(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Name of each column, and ``integer``, ``decimal`` or ``text``."""
    kinds = {"i": "integer", "u": "integer", "f": "decimal"}
    return [(str(name), kinds.get(table.dtypes.iloc[place].kind, "text")) for place, name in enumerate(table.columns)]


def _sort_key(value: object) -> float | str:
    """What a cell is sorted by; empty where that is its text."""
    found = value.value if isinstance(value, Span) else value
    return repr(float(found)) if isinstance(found, int | float) and not math.isnan(found) else ""


def _rest(table: pd.DataFrame) -> str:
    more = len(table) - SHOWN_ROWS
    return f"and {more:,} more rows in " if more > 0 else ""


def _cell(value: object) -> str | Span:
    if isinstance(value, Span):
        return value
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3f}"
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
    return Markup(str(_markdown(str(_cell(value)))).replace("|", r"\|"))


def _escaped(text: str) -> str:
    # Within a word an underscore means nothing.
    return re.sub(r"([\\*<>]|(?<!\w)_|_(?!\w)|\](?=[(\[]))", r"\\\1", text)
