from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
from markdown_it import MarkdownIt

from evaluation.report.figures import blank_figure
from evaluation.report.page import SHOWN_ROWS, Card, Page, Section


class Checked(HTMLParser):
    """Notes what is opened and not closed, and every address."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def section() -> Section:
    return Section(
        "Colours & <shapes>",
        ["Two <b> sentences."],
        {"curve": blank_figure(1, 1)},
        {"table": pd.DataFrame({"name": [f"<{row}>" for row in range(40)], "share": [0.5] * 40, "n": [1234] * 40})},
        {"more": pd.DataFrame({"a": [1]})},
        ["No <captions>."],
    )


def test_page_is_whole_and_stands_alone(tmp_path: Path) -> None:
    page = Page("What is in A & B", ["from <here>"], [section(), Section("Empty")]).write(tmp_path / "new", "explore")
    text = page.read_text(encoding="utf-8")
    parser = Checked()
    parser.feed(text)
    assert parser.open == []
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in parser.addresses)
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert {path.name for path in page.parent.iterdir()} == {"explore.html", "curve.png", "table.csv", "more.csv"}
    assert len(pd.read_csv(page.parent / "table.csv")) == 40
    image = re.search(r"base64,([^\"]+)", text)
    assert image is not None
    assert base64.b64decode(image[1]).startswith(b"\x89PNG")


def test_what_people_wrote_is_text_and_not_markup() -> None:
    text = Page("A & B", ["from <here>"], [section()]).html()
    assert "<title>A &amp; B</title>" in text
    for written in ("Colours &amp; &lt;shapes&gt;", "Two &lt;b&gt; sentences.", "&lt;7&gt;", "No &lt;captions&gt;."):
        assert written in text


def test_long_tables_are_cut_and_say_so() -> None:
    text = Page("A", [], [section()]).html()
    assert text.count("<tr>") == SHOWN_ROWS + 1
    assert f"and {40 - SHOWN_ROWS} more rows in table.csv" in text
    assert '<td class="number">0.500</td><td class="number">1,234</td>' in text
    assert "more.csv" not in text


def test_unknown_numbers_are_empty() -> None:
    text = Page("A", [], [Section("B", tables={"t": pd.DataFrame({"x": [float("nan")]})})]).html()
    assert '<td class="number"></td>' in text


def test_small_images_commands_and_folded_texts(tmp_path: Path) -> None:
    cards = [Card("first", b"jpeg", ["<one>", "two"]), Card("second", None, ["three"])]
    one = Section("T", ["say `a <b>` and ` alone"], cards={"a row": cards}, folded={"all of it": "x: <y>\n"})
    page = Page("A", [], [one, section()]).write(tmp_path, "page", files=tmp_path / "page")
    text = page.read_text(encoding="utf-8")
    parser = Checked()
    parser.feed(text)
    assert parser.open == []
    assert "say <code>a &lt;b&gt;</code> and ` alone" in text
    assert f'src="data:image/jpeg;base64,{base64.b64encode(b"jpeg").decode()}"' in text
    assert "<p>&lt;one&gt;</p>\n<p>two</p>" in text
    assert text.count("the image cannot be read") == 1
    assert "<summary>all of it</summary><pre>x: &lt;y&gt;\n</pre>" in text
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]
    names = {path.name for path in (tmp_path / "page").iterdir()}
    assert names == {"first.jpg", "curve.png", "table.csv", "more.csv"}


def shown(section: Section, title: str = "A") -> str:
    """As a reader of Markdown sees it, in HTML."""
    return str(MarkdownIt("commonmark").enable("table").render(Page(title, ["lead"], [section]).markdown("files")))


def test_what_people_wrote_is_text_in_markdown_too() -> None:
    section = Section("a_b and <c>", ["*no* _stress_ and [no](link), `a_command *`"], missing=["`half a command"])
    text = shown(section, "1 < 2")
    assert "<h1>1 &lt; 2</h1>" in text
    assert "<h2>a_b and &lt;c&gt;</h2>" in text
    assert "<p>*no* _stress_ and [no](link), <code>a_command *</code></p>" in text
    assert "<strong>Missing:</strong> 'half a command" in text


def test_long_tables_are_cut_in_markdown_too() -> None:
    table = pd.DataFrame({"a|b": [f"x|{row}" for row in range(40)], "n": [1234] * 40, "share": [0.5] * 39 + [None]})
    text = shown(Section("T", tables={"long": table}))
    assert text.count("<tr>") == SHOWN_ROWS + 1
    assert "<th>a|b</th>" in text
    assert "<td>x|3</td>\n<td>1,234</td>\n<td>0.500</td>" in text
    assert f'and {40 - SHOWN_ROWS} more rows in <a href="files/long.csv">' in text


def test_figures_cards_and_folded_texts_in_markdown() -> None:
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
