from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markdown_it import MarkdownIt

from evaluation.report.charts import Span, line_chart
from evaluation.report.figures import blank_figure
from evaluation.report.page import (
    MATRIX_CLASSES,
    MAX_ROWS,
    SHOWN_ROWS,
    SHOWN_TILES,
    Card,
    Headline,
    ImageGrid,
    Matrix,
    Page,
    Section,
    Summary,
)
from evaluation.statistics.intervals import Estimate, Interval
from tests.evaluation.report.test_charts import ODD

VOID = ("meta", "img", "input")


class Checked(HTMLParser):
    """Notes what is opened and not closed, every address, attribute and text, and the content of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.scripts: list[tuple[dict[str, str | None], str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in ("script", "style"):
            self.scripts.append(({"tag": tag, **dict(attrs)}, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        else:
            self.text += data


def checked(page: Page) -> Checked:
    found = Checked()
    found.feed(page.html())
    assert found.open == []
    return found


def section() -> Section:
    x = np.arange(3.0)
    return Section(
        "Colours & <shapes>",
        ["Two <b> sentences."],
        {"figure": blank_figure(1, 1)},
        {"table": pd.DataFrame({"name": [f"<{row}>" for row in range(40)], "share": [0.5] * 40, "n": [1234] * 40})},
        {"more": pd.DataFrame({"a": [1]})},
        ["No <captions>."],
        charts={"curve": line_chart("Loss", {"val": (x, x)}, "epochs")},
    )


def grid(n: int = 30, images: int = 20, classes: tuple[str, ...] = ("a", "b")) -> ImageGrid:
    rows = pd.DataFrame(
        {
            "name": [f"photo {row}" for row in range(n)],
            "target": [classes[row % len(classes)] for row in range(n)],
            "confidence": [row / n for row in range(n)],
        }
    )
    jpegs = {f"photo {row}": f"jpeg {row}".encode() for row in range(images)}
    return ImageGrid("mistakes", "class: mistakes", rows, {"target": "True class"}, "confidence", jpegs)


def summary(text: str = "trained on <data>") -> Summary:
    span = Span(Estimate(0.5, Interval(0.4, 0.6)), "0.4 to 0.6", (0.0, 1.0))
    return Summary([text], [Headline(text, "0.500", span, "good")], [text], [f"{text}: `run <this>`"])


def test_page_is_whole_and_stands_alone(tmp_path: Path) -> None:
    page = Page("What is in A & B", ["from <here>"], [section(), Section("Empty")]).write(tmp_path / "new", "explore")
    text = page.read_text(encoding="utf-8")
    parser = Checked()
    parser.feed(text)
    assert parser.open == []
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in parser.addresses)
    assert "@import" not in text
    assert "url(" not in text
    assert {path.name for path in page.parent.iterdir()} == {
        "explore.html",
        "figure.png",
        "curve.svg",
        "table.csv",
        "more.csv",
    }
    assert len(pd.read_csv(page.parent / "table.csv")) == 40
    image = re.search(r"base64,([^\"]+)", text)
    assert image is not None
    assert base64.b64decode(image[1]).startswith(b"\x89PNG")


def test_security_policy_lets_nothing_in_but_the_pages_own_style_and_script() -> None:
    parser = checked(Page("A", [], [section(), Section("B", grids=[grid()])], summary()))
    [policy] = [value for tag, name, value in parser.attributes if tag == "meta" and "default-src" in value]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag, name in (("style", "style-src"), ("script", "script-src")):
        own = [text for attributes, text in parser.scripts if attributes["tag"] == tag and "type" not in attributes]
        assert len(own) == 1
        digest = base64.b64encode(hashlib.sha256(own[0].encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    # The policy would ignore them silently.
    assert not [name for _, name, _ in parser.attributes if name == "style" or name.startswith("on")]


def test_what_people_wrote_is_text_and_not_markup() -> None:
    for text in ODD:
        table = pd.DataFrame({text or "empty": [text] * (SHOWN_ROWS + 2), "other": range(SHOWN_ROWS + 2)})
        counts = pd.DataFrame([[1, 2], [3, 4]], index=pd.Index([text, "b"], name="target"), columns=[text, "b"])
        one = Section(
            text,
            [text],
            tables={"table": table},
            missing=[text],
            cards={text: [Card("card", b"jpeg", [text])]},
            folded={text: text},
            grids=[grid(classes=(text, "b"))],
            matrices=[Matrix(text, counts, "mistakes")],
            charts={"chart": line_chart(text, {text: (np.arange(2.0), np.arange(2.0))}, text)},
        )
        parser = checked(Page(text, [text], [one], summary(text)))
        assert [attributes for attributes, _ in parser.scripts if attributes.get("type") is None] == [
            {"tag": "style"},
            {"tag": "script"},
        ]
        if text and text.isprintable():
            assert parser.text.count(text) > 10
        for attributes, content in parser.scripts:
            if attributes.get("type") == "application/json":
                assert "<" not in content
                json.loads(content)


def test_long_tables_show_a_part_and_hold_the_rest() -> None:
    n = MAX_ROWS + 7
    table = pd.DataFrame(
        {"name": [f"row {row}" for row in range(n)], "n": [1234] * n, "share": [0.5] * (n - 1) + [np.nan]}
    )
    page = Page("A", [], [Section("B", tables={"table": table})])
    text = page.html()
    body = text[text.index("<tbody>") : text.index("</tbody>")]
    assert body.count("<tr>") == SHOWN_ROWS
    assert '<td class="number" data-key="1234.0">1,234</td><td class="number" data-key="0.5">0.500</td>' in text
    assert f"and {n - SHOWN_ROWS:,} more rows in table.csv" in text
    [rest] = [json.loads(content) for attributes, content in checked(page).scripts if attributes.get("class") == "more"]
    assert len(rest) == MAX_ROWS - SHOWN_ROWS
    assert rest[0] == [f"row {SHOWN_ROWS}", 1234, 0.5]


def test_unknown_numbers_are_empty() -> None:
    text = Page("A", [], [Section("B", tables={"t": pd.DataFrame({"name": ["a"], "x": [float("nan")]})})]).html()
    assert '<td class="number"></td>' in text


def test_a_table_has_a_caption_and_scopes() -> None:
    parser = checked(Page("A", [], [section()]))
    assert ("th", "scope", "col") in parser.attributes
    assert sum(one == ("th", "scope", "row") for one in parser.attributes) == SHOWN_ROWS
    assert "table" in parser.text


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
    assert names == {"first.jpg", "figure.png", "curve.svg", "table.csv", "more.csv"}


def test_a_grid_shows_its_first_images_and_holds_the_others() -> None:
    page = Page("A", [], [Section("B", grids=[grid(n=30, images=20)])])
    assert page.html().count('<figure class="tile">') == SHOWN_TILES
    assert list(page.images) == [f"photo {row}" for row in range(SHOWN_TILES, 20)]
    data = next(json.loads(text) for attributes, text in checked(page).scripts if attributes.get("class") == "rows")
    assert data["columns"] == ["name", "target", "confidence"]
    assert data["rows"][29] == ["photo 29", "b", round(29 / 30, 6)]
    assert set(page.files) == {f"mistakes_{place:02}.jpg" for place in range(1, SHOWN_TILES + 1)}


def test_images_of_all_grids_have_a_limit_and_take_turns(monkeypatch: Any) -> None:
    monkeypatch.setattr("evaluation.report.page.IMAGE_BYTES", 40)
    first, second = grid(n=40, images=40), grid(n=40, images=40)
    images = {f"other {name}": jpeg for name, jpeg in second.images.items()}
    second = ImageGrid("b", "b", second.rows.assign(name=list(images)), {}, "", images)
    held = Page("A", [], [Section("B", grids=[first, second])]).images
    assert list(held) == ["photo 12", "other photo 12", "photo 13", "other photo 13", "photo 14", "other photo 14"]


def test_many_classes_are_a_matrix_of_those_confused_most() -> None:
    rng = np.random.default_rng(0)
    names = [f"c{number}" for number in range(300)]
    counts = np.diag(np.full(300, 50))
    pairs = [(7, 9), (250, 3), (11, 12)]
    for place, (row, column) in enumerate(pairs):
        counts[row, column] = 20 - place
    counts[rng.integers(300, size=40), rng.integers(300, size=40)] += 1
    frame = pd.DataFrame(counts, index=pd.Index(names, name="target"), columns=names)
    matrix = Matrix("class", frame)
    assert len(matrix.shown) <= MATRIX_CLASSES // 2 + 1
    shown = {(row, cell[0]): cell for row, cells in matrix.rows for cell in cells}
    for row, column in pairs:
        assert shown[f"c{row}", f"c{column}"][1] == counts[row, column]
    assert shown["c7", "c7"][3]
    assert not shown["c7", "c9"][3]
    assert Matrix("few", frame.iloc[:5, :5]).shown.shape == (5, 5)


def test_sections_that_only_lack_something_are_listed_at_the_end() -> None:
    page = Page("A", [], [Section("Gone", missing=["`make it`"]), Section("B", ["text"])])
    text = page.html()
    assert re.findall("<h2>(.*?)</h2>", text) == ["B", "Missing"]
    assert '<dt>Gone</dt><dd class="missing"><code>make it</code></dd>' in text


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


def test_long_tables_are_cut_in_markdown() -> None:
    table = pd.DataFrame({"a|b": [f"x|{row}" for row in range(40)], "n": [1234] * 40, "share": [0.5] * 39 + [None]})
    text = shown(Section("T", tables={"long": table}))
    assert text.count("<tr>") == SHOWN_ROWS + 1
    assert "<th>a|b</th>" in text
    assert "<td>x|3</td>\n<td>1,234</td>\n<td>0.500</td>" in text
    assert f'and {40 - SHOWN_ROWS} more rows in <a href="files/long.csv">' in text


def test_figures_charts_cards_and_folded_texts_in_markdown() -> None:
    cards = [Card("first", b"jpeg", ["one", "two"]), Card("second", None, ["three"])]
    one = Section("T", figures={"figure": blank_figure(1, 1)}, cards={"row": cards}, folded={"all": "a\n````\nb"})
    text = shown(one)
    assert '<img src="files/figure.png"' in text
    assert '<img src="files/first.jpg"' in text
    assert "<td>one; two</td>" in text
    assert "<td>the image cannot be read</td>" in text
    assert "<pre><code>a\n````\nb\n</code></pre>" in text
    text = shown(Section("T", charts=section().charts, grids=[grid()]))
    assert '<img src="files/curve.svg"' in text
    assert '<img src="files/mistakes_01.jpg"' in text


def test_summary_in_markdown() -> None:
    text = MarkdownIt("commonmark").enable("table").render(Page("A", [], [], summary()).markdown("files"))
    assert "<td>0.500</td>\n<td>0.4 to 0.6</td>" in text
    assert "<li>trained on &lt;data&gt;: <code>run &lt;this&gt;</code></li>" in text


def test_empty_sections_are_a_heading() -> None:
    assert Page("A", [], [Section("B")]).markdown("files") == "# A\n\n## B\n"
