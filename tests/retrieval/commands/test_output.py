import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from retrieval.commands.output import SIDE, Found, SearchOutput, as_json, contact_sheet, result_table, small_jpeg
from retrieval.schema import Predicted
from retrieval.search.searcher import Query
from tests.support.galleries import identity
from vitrail.console import Table

FOUND = [
    Found(
        id="p7",
        score=0.98765,
        path="/photos/p7.jpg",
        caption="blue plastic bottle [bold]",
        labels={"class": "tableware_water_bottle", "colour": "blue", "material": None},
        predicted={
            "class": Predicted("tableware_water_bottle", 0.91),
            "colour": Predicted("black", 0.5),
            "material": None,
        },
        thumbnail=None,
    ),
    Found("p2", 0.5, "", "", dict.fromkeys(("class", "colour", "material")), {}, b"jpeg"),
]
FOUND[1] = dataclasses.replace(FOUND[1], predicted=dict.fromkeys(("class", "colour", "material")))


def output(**changes: Any) -> SearchOutput:
    fields: dict[str, Any] = {
        "query": Query("[red] bottle"),
        "gallery": "g",
        "identity": identity(),
        "ranker": "vector",
        "find": "images",
        "where": "",
        "found": FOUND,
        "notes": ["a note"],
    }
    return SearchOutput(**{**fields, **changes})


def _printed(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_table_has_scores_predictions_and_labels_in_order() -> None:
    text = _printed(result_table(output()))
    first, second = (line for line in text.splitlines() if "p7" in line or "p2" in line)
    assert "0.9877" in first
    assert "tableware_water_bottle 0.91, black 0.50 " in first
    assert "tableware_water_bottle, blue " in first
    assert "0.5000" in second
    assert all(name in text for name in ("predicted", "labels", "caption"))
    # A column of which nothing is known is left out.
    assert "predicted" not in _printed(result_table(output(found=FOUND[1:])))


def test_what_people_wrote_is_not_read_as_markup() -> None:
    text = _printed(result_table(output()))
    assert "blue plastic bottle [bold]" in text
    assert "“[red] bottle”" in text
    evil = dataclasses.replace(FOUND[0], caption="\x1b[2Jgone\nline", id="\x1b]0;title\x07")
    text = _printed(result_table(output(found=[evil], query=Query("\x1b[31mred"))))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "gone line" in text


def test_a_file_name_that_is_no_utf_8_can_be_printed() -> None:
    of_image = output(query=Query(image=Path("photo\udcff.jpg")))
    assert json.loads(as_json(of_image).encode())["query"]["image"] == "photo?.jpg"
    assert "photo?.jpg" in _printed(result_table(of_image))


def test_captions_have_a_table_of_their_own() -> None:
    text = _printed(result_table(output(find="captions", query=Query(like="p1"))))
    assert "of image" in text
    assert "like p1" in text
    assert "predicted" not in text


def test_json_holds_everything_and_any_script() -> None:
    content = json.loads(as_json(output(query=Query("синяя"), where="colour = 'blue'")))
    assert content["query"] == {"text": "синяя", "like": None, "image": None}
    assert content["notes"] == ["a note"]
    assert content["where"] == "colour = 'blue'"
    first, second = content["found"]
    assert (first["rank"], first["id"], first["score"]) == (1, "p7", 0.98765)
    assert first["predicted"]["colour"] == {"value": "black", "confidence": 0.5}
    assert first["labels"]["material"] is None
    assert second["predicted"]["class"] is None
    assert "синяя" in as_json(output(query=Query("синяя")))


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


def test_every_image_has_a_card_with_score_caption_and_predictions() -> None:
    page = Page(contact_sheet(output(where="colour = 'blue'"), [JPEG, None]))
    assert page.open == []
    assert len(page.all("li")) == 2
    (image,) = page.all("img")
    assert base64.b64decode((image["src"] or "").removeprefix("data:image/jpeg;base64,")) == JPEG
    assert image["alt"] == "blue plastic bottle [bold]"
    for part in ("0.9877", "p7", "tableware_water_bottle 0.91", "black 0.50", "colour = 'blue'", "vector", "a note"):
        assert part in page.text
    assert "cannot be read any more" in page.text
    assert page.text.index("p7") < page.text.index("p2")


def test_the_image_of_the_query_is_on_top() -> None:
    example = small_jpeg(np.zeros((8, 8, 3), dtype=np.uint8))
    sheet = contact_sheet(output(query=Query(like="p1")), [JPEG, JPEG], example)
    sources = [image["src"] or "" for image in Page(sheet).all("img")]
    assert base64.b64decode(sources[0].removeprefix("data:image/jpeg;base64,")) == example
    assert len(sources) == 3


def test_nothing_in_a_gallery_becomes_markup() -> None:
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
    found = dataclasses.replace(
        FOUND[0], id=evil, caption=evil, predicted={evil: Predicted(evil, 0.5)}, labels={}, path="javascript:x"
    )
    sheet = contact_sheet(output(query=Query(evil), gallery=evil, where=evil, found=[found], notes=[evil]), [JPEG])
    page = Page(sheet)
    assert page.all("script") == []
    assert len(page.all("img")) == 1
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert page.text.count("<script>") >= 6


def test_the_page_needs_nothing_else() -> None:
    sheet = contact_sheet(output(), [JPEG, JPEG])
    addresses = re.findall(r"""(?:src|href|url|action)\s*[=(]\s*["']?([^"'\s)>]+)""", sheet)
    assert addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    policy = next(m["content"] for m in Page(sheet).all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "prefers-color-scheme: dark" in sheet


def test_a_sheet_of_nothing_says_so() -> None:
    page = Page(contact_sheet(output(found=[]), []))
    assert page.all("li") == []
    assert "no images" in page.text


def test_large_images_are_made_small_and_small_ones_stay() -> None:
    large = Image.open(io.BytesIO(small_jpeg(np.zeros((600, 1200, 3), dtype=np.uint8))))
    assert large.size == (SIDE, SIDE // 2)
    assert large.format == "JPEG"
    assert Image.open(io.BytesIO(JPEG)).size == (30, 20)


def test_predictions_of_every_kind_as_text_and_json() -> None:
    labels: dict[str, str | list[str] | float | None] = {"tags": ["cat", "dog"], "price": 12.5, "grade": None}
    predicted = {"tags": Predicted(["dog", "cat"], [0.875, 0.5]), "price": Predicted(80.0, 10.0), "grade": None}
    one = dataclasses.replace(FOUND[0], labels=labels, predicted=predicted)
    text = _printed(result_table(output(found=[one])))
    assert "dog 0.88 + cat 0.50, 80 ± 10" in text
    assert "cat, dog, 12.5" in text
    entry = json.loads(as_json(output(found=[one])))["found"][0]
    assert entry["labels"] == labels
    assert entry["predicted"]["tags"] == {"value": ["dog", "cat"], "confidence": [0.875, 0.5]}
    assert entry["predicted"]["price"] == {"value": 80.0, "deviation": 10.0}
    assert str(Predicted([], [])) == "(no label)"
    assert str(Predicted(3.0, None)) == "3"
