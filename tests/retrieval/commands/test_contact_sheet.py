import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from retrieval.commands.output import SIDE, contact_sheet, small_jpeg
from retrieval.search.searcher import Query
from tests.retrieval.commands.test_results_table import FOUND, answer

JPEG = small_jpeg(np.full((20, 30, 3), 90, dtype=np.uint8))


class Page(HTMLParser):
    """Elements with their attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_every_image_has_a_card_with_score_caption_and_answers() -> None:
    page = Page(contact_sheet(answer(where="colour = 'blue'"), [JPEG, None]))
    assert page.open == []
    assert len(page.all("li")) == 2
    (image,) = page.all("img")
    assert base64.b64decode((image["src"] or "").removeprefix("data:image/jpeg;base64,")) == JPEG
    assert image["alt"] == "blue plastic bottle [bold]"
    for part in ("0.9877", "p7", "tableware_water_bottle 0.91", "black 0.50", "colour = 'blue'", "clip", "a note"):
        assert part in page.text
    assert "cannot be read any more" in page.text
    assert page.text.index("p7") < page.text.index("p2")


def test_the_image_that_was_asked_with_stands_above() -> None:
    example = small_jpeg(np.zeros((8, 8, 3), dtype=np.uint8))
    sheet = contact_sheet(answer(query=Query(like="p1")), [JPEG, JPEG], example)
    sources = [image["src"] or "" for image in Page(sheet).all("img")]
    assert base64.b64decode(sources[0].removeprefix("data:image/jpeg;base64,")) == example
    assert len(sources) == 3


def test_nothing_that_stands_in_a_gallery_becomes_markup() -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    found = dataclasses.replace(
        FOUND[0], id=evil, caption=evil, predicted={evil: (evil, 0.5)}, labels={}, path="javascript:x"
    )
    sheet = contact_sheet(answer(query=Query(evil), gallery=evil, where=evil, found=[found], notes=[evil]), [JPEG])
    page = Page(sheet)
    assert page.all("script") == []
    assert len(page.all("img")) == 1
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert page.text.count("<script>") >= 6


def test_the_page_needs_nothing_else() -> None:
    sheet = contact_sheet(answer(), [JPEG, JPEG])
    addresses = re.findall(r"""(?:src|href|url|action)\s*[=(]\s*["']?([^"'\s)>]+)""", sheet)
    assert addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    policy = next(m["content"] for m in Page(sheet).all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "prefers-color-scheme: dark" in sheet


def test_a_sheet_of_nothing_says_so() -> None:
    page = Page(contact_sheet(answer(found=[]), []))
    assert page.all("li") == []
    assert "no images" in page.text


def test_large_images_are_made_small_and_small_ones_stay() -> None:
    large = Image.open(io.BytesIO(small_jpeg(np.zeros((600, 1200, 3), dtype=np.uint8))))
    assert large.size == (SIDE, SIDE // 2)
    assert large.format == "JPEG"
    assert Image.open(io.BytesIO(JPEG)).size == (30, 20)
