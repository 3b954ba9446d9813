from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd

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
