from __future__ import annotations

import pandas as pd
from markdown_it import MarkdownIt

from evaluation.report.figures import blank_figure
from evaluation.report.page import SHOWN_ROWS, Card, Page, Section


def shown(section: Section, title: str = "A") -> str:
    """As a reader of Markdown sees it, in HTML."""
    return str(MarkdownIt("commonmark").enable("table").render(Page(title, ["lead"], [section]).markdown("files")))


def test_what_people_wrote_is_text_and_not_markup() -> None:
    section = Section("a_b and <c>", ["*no* _stress_ and [no](link), `a_command *`"], missing=["`half a command"])
    text = shown(section, "1 < 2")
    assert "<h1>1 &lt; 2</h1>" in text
    assert "<h2>a_b and &lt;c&gt;</h2>" in text
    assert "<p>*no* _stress_ and [no](link), <code>a_command *</code></p>" in text
    assert "<strong>Missing:</strong> 'half a command" in text


def test_tables_are_cut_and_say_so() -> None:
    table = pd.DataFrame({"a|b": [f"x|{row}" for row in range(40)], "n": [1234] * 40, "share": [0.5] * 39 + [None]})
    text = shown(Section("T", tables={"long": table}))
    assert text.count("<tr>") == SHOWN_ROWS + 1
    assert "<th>a|b</th>" in text
    assert "<td>x|3</td>\n<td>1,234</td>\n<td>0.500</td>" in text
    assert f'and {40 - SHOWN_ROWS} more rows in <a href="files/long.csv">' in text


def test_figures_cards_and_folded_texts() -> None:
    cards = [Card("first", b"jpeg", ["one", "two"]), Card("second", None, ["three"])]
    section = Section("T", figures={"curve": blank_figure(1, 1)}, cards={"row": cards}, folded={"all": "a\n````\nb"})
    text = shown(section)
    assert '<img src="files/curve.png"' in text
    assert '<img src="files/first.jpg"' in text
    assert "<td>one; two</td>" in text
    assert "<td>the image cannot be read</td>" in text
    assert "<pre><code>a\n````\nb\n</code></pre>" in text


def test_empty_sections_are_a_heading() -> None:
    assert Page("A", [], [Section("B")]).markdown("files") == "# A\n\n## B\n"
