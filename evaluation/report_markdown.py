"""The sections of a page as Markdown, with links to the figures, tables and pictures in a folder beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.html_page import SHOWN_ROWS, Card, Section
from evaluation.summary import markdown_rows
from vitrail.files import written_whole

if TYPE_CHECKING:
    import pandas as pd


def write_markdown(path: Path, title: str, lead: Sequence[str], sections: Sequence[Section], folder: str) -> Path:
    """Write the file whole.

    Args:
        path: of the file.
        title: heading.
        lead: paragraphs below it.
        sections: in order.
        folder: of figures, tables and pictures, relative to the file.

    Returns:
        ``path``.
    """
    with written_whole(path) as partial:
        partial.write_text(as_markdown(title, lead, sections, folder), encoding="utf-8")
    return path


def as_markdown(title: str, lead: Sequence[str], sections: Sequence[Section], folder: str) -> str:
    """The text; arguments as ``write_markdown``."""
    blocks = [f"# {_plain(title)}", *map(_plain, lead)]
    for section in sections:
        blocks += [f"## {_plain(section.title)}", *map(_plain, section.says)]
        blocks += [f"**Missing:** {_plain(text)}" for text in section.missing]
        blocks += [f"![{stem}]({folder}/{stem}.png)" for stem in section.figures]
        blocks += [_table(stem, table, folder) for stem, table in section.tables.items()]
        for heading, cards in section.cards.items():
            blocks += [f"### {_plain(heading)}", _cards(cards, folder)]
        for heading, text in section.texts.items():
            # Longer than any run of back ticks in the text, so that it cannot end the block.
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            blocks.append(
                f"<details><summary>{_plain(heading)}</summary>\n\n{fence}\n{text.strip()}\n{fence}\n\n</details>"
            )
    return "\n\n".join(blocks) + "\n"


def _table(stem: str, table: pd.DataFrame, folder: str) -> str:
    rows = [[_cell(value) for value in row] for row in table.head(SHOWN_ROWS).itertuples(index=False, name=None)]
    more = len(table) - SHOWN_ROWS
    told = f"and {more:,} more rows in " if more > 0 else ""
    text = markdown_rows([_cell(str(name)) for name in table.columns], rows)
    return f"{text}\n\n{told}[{stem}.csv]({folder}/{stem}.csv)"


def _cards(cards: Sequence[Card], folder: str) -> str:
    rows = []
    for card in cards:
        image = f"![{card.stem}]({folder}/{card.stem}.jpg)" if card.jpeg is not None else "the picture cannot be read"
        rows.append([image, "; ".join(_cell(line) for line in card.says)])
    return markdown_rows(["picture", "what"], rows)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.3f}"  # noqa: PLR0124 -- NaN
    return _plain(f"{value:,}" if isinstance(value, int) else str(value))


def _plain(text: str) -> str:
    """Text that Markdown shows as it is; what stands between back ticks stays, for commands."""
    parts = text.replace("\n", " ").split("`")
    if len(parts) % 2 == 0:
        return _escaped(text.replace("\n", " ").replace("`", "'"))
    return "`".join(part if place % 2 else _escaped(part) for place, part in enumerate(parts))


def _escaped(text: str) -> str:
    """Only what Markdown would take for its own: within a word an underscore means nothing."""
    return re.sub(r"([\\*<>]|(?<!\w)_|_(?!\w)|\](?=[(\[]))", r"\\\1", text)
