"""Tests of the grid of images: what its HTML says, read by a parser; see ``browser/test_shell.py`` for its use."""

from __future__ import annotations

from html.parser import HTMLParser
from urllib.parse import parse_qs, urlsplit

import gradio as gr
import pytest

from app.widgets.cards import THUMBNAIL, Card, card_grid, cards_html


class Reader(HTMLParser):
    """Elements with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onfocus='alert(1)",
    "{{constructor.constructor('alert(1)')()}}",
    "${alert(1)}",
    "`${alert(1)}`",
    "&lt;b&gt; &amp; ä 漢 \u202e",
    "../../etc/passwd",
    "a&side=9999&gallery=other#x",
    "  ",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_a_table_holds_is_text(text: str) -> None:
    html = cards_html([Card(text, text, text, [text, text])], label=text)
    page = Reader(html)
    assert [name for name, _ in page.elements] == ["ul", "li", "button", "img", "span", "span", "span"]
    assert page.text == text * 3
    (button,), (image,) = page.all("button"), page.all("img")
    assert set(button) == {"type", "class", "aria-pressed", "data-gallery", "data-id"}
    assert button["data-id"] == button["data-gallery"] == image["alt"] == text
    assert set(image) == {"src", "alt", "loading", "decoding"}
    address = urlsplit(image["src"] or "")
    assert (address.scheme, address.netloc, address.path) == ("", "", "/images")
    asked = parse_qs(address.query, keep_blank_values=True)
    assert asked == {"gallery": [text], "id": [text], "side": [str(THUMBNAIL)]}


def test_cards_stand_in_their_order_and_the_chosen_one_stands_out() -> None:
    page = Reader(cards_html([Card("g", f"p{n}", f"image {n}", selected=n == 1) for n in range(3)], columns=2))
    buttons = page.all("button")
    assert [button["data-id"] for button in buttons] == ["p0", "p1", "p2"]
    assert [button["aria-pressed"] for button in buttons] == ["false", "true", "false"]
    assert [button["type"] for button in buttons] == ["button"] * 3
    assert page.all("ul")[0]["style"] == "--columns: 2"
    assert all(image["loading"] == "lazy" and image["alt"] for image in page.all("img"))


def test_an_empty_grid_says_why() -> None:
    assert cards_html([]) == ""
    page = Reader(cards_html([], empty="no match for <b>"))
    assert page.text == "no match for <b>"
    assert page.all("p")[0]["role"] == "status"


def test_the_component_has_an_event_select() -> None:
    with gr.Blocks() as blocks:
        grid = card_grid([Card("g", "p0", "one")], elem_id="grid")
        grid.select(lambda: None, None, None)
    (function,) = [function for function in blocks.fns.values() if function.fn is not None]
    assert [(block, event) for block, event in function.targets] == [(grid._id, "select")]
