"""One self-contained HTML page of sections: no script, no file beside it, for wide and narrow windows, light and dark.

A section is a sentence or two, figures, and tables, or what is missing for it. Figures are also written as PNG and
tables as CSV beside the page.

The sections of a page as Markdown, with links to the figures, tables and images in a folder beside it.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.tables.summary import markdown_rows
from vitrail.files import write_atomically, write_csv, write_text_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


SHOWN_ROWS = 25
"""Rows of a table that the page shows; its CSV has all of them."""

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1c2430; --paper: #ffffff; --line: #d7dce3; --quiet: #5a6675; --warn: #9a5b00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --paper: #14181e; --line: #39424e; --quiet: #a2adbb; --warn: #f0b55a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.2rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .4rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .3rem; border-top: 1px solid var(--line); padding-top: 1.2rem; }
h2, nav a { overflow-wrap: anywhere; max-width: 100%; }
p { margin: .4rem 0; max-width: 46rem; overflow-wrap: anywhere; }
nav { margin: 1rem 0; } nav a { display: inline-block; margin: 0 1rem .3rem 0; color: inherit; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; }
.missing { color: var(--warn); }
figure { margin: 0; max-width: 100%; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 8px;
  border: 1px solid var(--line); }
@media (max-width: 40rem) { figure { overflow-x: auto; } figure img { max-width: 44rem; } }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { white-space: nowrap; } td.number { text-align: right; }
h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .8rem; }
.cards figure { overflow-wrap: anywhere; }
.cards img { width: 100%; aspect-ratio: 1; object-fit: contain; margin-bottom: .3rem; }
.cards p { margin: 0; line-height: 1.3; }
code { font-size: .88em; overflow-wrap: anywhere; }
details { margin: 1rem 0; } summary { cursor: pointer; } pre { overflow-x: auto; font-size: .82rem; line-height: 1.4; }
"""


@dataclass(frozen=True)
class Card:
    """A small image and what there is to say of it.

    Attributes:
        stem: name of its file without the ending.
        jpeg: the file's content; None where the image cannot be read.
        says: lines below it.
    """

    stem: str
    jpeg: bytes | None
    says: list[str]


@dataclass(frozen=True)
class Section:
    """One part of a page.

    Attributes:
        title: its heading.
        says: what there is to know, in plain sentences; a paragraph each.
        figures: each by the name of its file without the ending.
        tables: likewise.
        files: tables that are written beside the page, but not shown on it.
        missing: why something is not here; a paragraph each.
        cards: rows of small images, each row by its heading.
        texts: long plain texts that are folded away, each by its heading.
    """

    title: str
    says: list[str] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    files: dict[str, pd.DataFrame] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    cards: dict[str, list[Card]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def write_page(
    folder: Path, name: str, title: str, lead: Sequence[str], sections: Sequence[Section], files: Path | None = None
) -> Path:
    """Write the page, its figures as PNG, its small images as JPEG and its tables as CSV, each whole; the page last.

    Args:
        folder: for the page, made if need be.
        name: of the page without its ending.
        title: heading and name of the page.
        lead: paragraphs below it.
        sections: in order.
        files: folder for everything but the page; the same by default.

    Returns:
        The page's path.
    """
    files = folder if files is None else files
    images = {stem: as_png(figure) for section in sections for stem, figure in section.figures.items()}
    cards = [card for section in sections for row in section.cards.values() for card in row]
    small = {f"{card.stem}.jpg": card.jpeg for card in cards if card.jpeg is not None}
    for file, content in {**{f"{stem}.png": png for stem, png in images.items()}, **small}.items():
        with write_atomically(files / file) as partial:
            partial.write_bytes(content)
    for section in sections:
        for stem, table in {**section.tables, **section.files}.items():
            write_csv(files / f"{stem}.csv", table)
    page = folder / f"{name}.html"
    write_text_atomically(page, as_html(title, lead, sections, images))
    return page


def as_html(title: str, lead: Sequence[str], sections: Sequence[Section], images: Mapping[str, bytes]) -> str:
    """The page's text.

    Args:
        title: heading and name of the page.
        lead: paragraphs below it.
        sections: in order.
        images: every figure as PNG, by the name of its file without the ending.
    """
    heading = html.escape(title)
    links = "".join(f'<a href="#s{place}">{html.escape(one.title)}</a>' for place, one in enumerate(sections))
    body = "".join(_section(place, section, images) for place, section in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{heading}</title><style>{_STYLE}</style></head>\n<body><h1>{heading}</h1>\n"
        f"{_paragraphs(lead, 'quiet')}<nav>{links}</nav>\n{body}</body></html>\n"
    )


def as_png(figure: Figure) -> bytes:
    """A figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def data_uri(content: bytes, kind: str = "png") -> str:
    """An image inside an address."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _section(place: int, section: Section, images: Mapping[str, bytes]) -> str:
    figures = "".join(
        f'<figure><img alt="{html.escape(section.title)}: {html.escape(stem)}" src="{data_uri(images[stem])}">'
        f"<figcaption>{html.escape(stem)}.png</figcaption></figure>\n"
        for stem in section.figures
    )
    figures = f'<div class="figures">\n{figures}</div>\n' if figures else ""
    tables = "".join(_table(stem, table) for stem, table in section.tables.items())
    told = _paragraphs(section.says) + _paragraphs(section.missing, "missing")
    cards = "".join(_cards(heading, row) for heading, row in section.cards.items())
    texts = "".join(
        f"<details><summary>{html.escape(heading)}</summary><pre>{html.escape(text)}</pre></details>\n"
        for heading, text in section.texts.items()
    )
    heading = html.escape(section.title)
    return f'<section id="s{place}"><h2>{heading}</h2>\n{told}{figures}{tables}{cards}{texts}</section>\n'


def _cards(heading: str, cards: Sequence[Card]) -> str:
    shown = "".join(
        f"<figure>{_card_image(card)}<figcaption>{_paragraphs(card.says)}</figcaption></figure>\n" for card in cards
    )
    return f'<h3>{html.escape(heading)}</h3><div class="cards">\n{shown}</div>\n'


def _card_image(card: Card) -> str:
    if card.jpeg is None:
        return '<p class="missing">the image cannot be read</p>'
    return f'<img alt="{html.escape(card.stem)}" src="{data_uri(card.jpeg, "jpeg")}">'


def _paragraphs(texts: Sequence[str], kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return "".join(f"<p{attribute}>{_with_code(text)}</p>\n" for text in texts)


def _with_code(text: str) -> str:
    """The text; what stands between two back ticks is a command."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _table(stem: str, table: pd.DataFrame) -> str:
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in table.columns)
    rows = "".join(
        f"<tr>{''.join(_cell(value) for value in row)}</tr>"
        for row in table.head(SHOWN_ROWS).itertuples(index=False, name=None)
    )
    more = len(table) - SHOWN_ROWS
    rest = f"and {more:,} more rows in {stem}.csv" if more > 0 else f"{stem}.csv"
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f'<p class="quiet">{html.escape(rest)}</p></div>\n'
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f'<td class="number">{"" if value != value else f"{value:.3f}"}</td>'  # noqa: PLR0124 -- NaN
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def write_markdown(path: Path, title: str, lead: Sequence[str], sections: Sequence[Section], folder: str) -> Path:
    """Write the file whole.

    Args:
        path: of the file.
        title: heading.
        lead: paragraphs below it.
        sections: in order.
        folder: of figures, tables and images, relative to the file.

    Returns:
        ``path``.
    """
    write_text_atomically(path, as_markdown(title, lead, sections, folder))
    return path


def as_markdown(title: str, lead: Sequence[str], sections: Sequence[Section], folder: str) -> str:
    """The text; arguments as ``write_markdown``."""
    blocks = [f"# {_plain(title)}", *map(_plain, lead)]
    for section in sections:
        blocks += [f"## {_plain(section.title)}", *map(_plain, section.says)]
        blocks += [f"**Missing:** {_plain(text)}" for text in section.missing]
        blocks += [f"![{stem}]({folder}/{stem}.png)" for stem in section.figures]
        blocks += [_report_markdown_table(stem, table, folder) for stem, table in section.tables.items()]
        for heading, cards in section.cards.items():
            blocks += [f"### {_plain(heading)}", _report_markdown_cards(cards, folder)]
        for heading, text in section.texts.items():
            # Longer than any run of back ticks in the text, so that it cannot end the block.
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            blocks.append(
                f"<details><summary>{_plain(heading)}</summary>\n\n{fence}\n{text.strip()}\n{fence}\n\n</details>"
            )
    return "\n\n".join(blocks) + "\n"


def _report_markdown_table(stem: str, table: pd.DataFrame, folder: str) -> str:
    rows = [
        [_report_markdown_cell(value) for value in row]
        for row in table.head(SHOWN_ROWS).itertuples(index=False, name=None)
    ]
    more = len(table) - SHOWN_ROWS
    told = f"and {more:,} more rows in " if more > 0 else ""
    text = markdown_rows([_report_markdown_cell(str(name)) for name in table.columns], rows)
    return f"{text}\n\n{told}[{stem}.csv]({folder}/{stem}.csv)"


def _report_markdown_cards(cards: Sequence[Card], folder: str) -> str:
    rows = []
    for card in cards:
        image = f"![{card.stem}]({folder}/{card.stem}.jpg)" if card.jpeg is not None else "the image cannot be read"
        rows.append([image, "; ".join(_report_markdown_cell(line) for line in card.says)])
    return markdown_rows(["image", "what"], rows)


def _report_markdown_cell(value: object) -> str:
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
