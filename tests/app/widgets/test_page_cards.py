"""Tests of the grid of images: what its HTML says, read by a parser; see ``browser/test_shell.py`` for its use.

Tests of the route that serves the galleries' images, and nothing else of the disk.
"""

from __future__ import annotations

import io
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import gradio as gr
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient

from app.state.context import AppContext
from app.state.galleries import ServedGallery
from app.widgets.page import SIDES, THUMBNAIL, Card, add_images, card_grid, cards_html, image_url
from retrieval.gallery import Gallery
from tests.app.hostile_files import encoded
from tests.app.running import HtmlPage
from tests.support.data import draw_image
from tests.support.galleries import identity, image_rows, vectors

HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onfocus='alert(1)",
    "{{constructor.constructor('alert(1)')()}}", "${alert(1)}", "`${alert(1)}`", "&lt;b&gt; &amp; ä 漢 \u202e",
    "../../etc/passwd", "a&side=9999&gallery=other#x", "  ",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_a_table_holds_is_text(text: str) -> None:
    html = cards_html([Card(text, text, text, [text, text])], label=text)
    page = HtmlPage(html)
    assert [name for name, _ in page.elements] == ["ul", "li", "button", "img", "span", "span", "span"]
    assert page.text == text * 3
    (button,), (image,) = page.all("button"), page.all("img")
    assert set(button) == {"type", "class", "data-gallery", "data-id"}
    assert button["data-id"] == button["data-gallery"] == image["alt"] == text
    assert set(image) == {"src", "alt", "loading", "decoding"}
    address = urlsplit(image["src"] or "")
    assert (address.scheme, address.netloc, address.path) == ("", "", "images")
    asked = parse_qs(address.query, keep_blank_values=True)
    assert asked == {"gallery": [text], "id": [text], "side": [str(THUMBNAIL)]}


def test_cards_are_in_order() -> None:
    page = HtmlPage(cards_html([Card("g", f"p{n}", f"image {n}") for n in range(3)], columns=2))
    buttons = page.all("button")
    assert [button["data-id"] for button in buttons] == ["p0", "p1", "p2"]
    assert [button["type"] for button in buttons] == ["button"] * 3
    assert page.all("ul")[0]["style"] == "--columns: 2"
    assert all(image["loading"] == "lazy" and image["alt"] for image in page.all("img"))


def test_an_empty_grid_says_why() -> None:
    assert cards_html([]) == ""
    page = HtmlPage(cards_html([], empty="no match for <b>"))
    assert page.text == "no match for <b>"
    assert page.all("p")[0]["role"] == "status"


def test_the_component_has_an_event_select() -> None:
    with gr.Blocks() as blocks:
        grid = card_grid([Card("g", "p0", "one")], elem_id="grid")
        grid.select(lambda: None, None, None)
    (function,) = [function for function in blocks.fns.values() if function.fn is not None]
    assert [(block, event) for block, event in function.targets] == [(grid._id, "select")]


ODD_IDS = ["photos/a b.png", "../secret.txt", "ä&id=x#?%2e", "line\nbreak", "<b>"]
"""Ids are the users' own; nothing is wrong with these."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "secret.txt").write_text("secret")
    (folder / "broken.png").write_bytes(encoded()[:200])
    return folder


@pytest.fixture(scope="module")
def context(folder: Path) -> AppContext:
    """Images in files, one that only the gallery keeps, one that is gone, a broken one, and one that is none."""
    ids = ["kept", "gone", "broken", "text", *ODD_IDS]
    paths = ["", str(folder / "gone.png"), str(folder / "broken.png"), str(folder / "secret.txt")]
    for number in range(len(ODD_IDS)):
        paths.append(str(folder / f"{number}.png"))
        draw_image(number, "red", look=number, size=(300, 200)).save(paths[-1])
    thumbnails = [encoded("JPEG", (100, 50)), *[None] * (len(ids) - 1)]
    made_by = identity()
    gallery = Gallery.create(str(folder / "gallery"), made_by)
    with gallery.writing() as writer:
        writer.add(image_rows(made_by, ids, vectors(len(ids)), path=paths, thumbnail=thumbnails))
    return AppContext({}, {"a shop/1": ServedGallery(folder / "gallery", "a shop/1", data_roots=[folder])})


@pytest.fixture(scope="module")
def client(context: AppContext) -> TestClient:
    app = FastAPI()
    add_images(app, context)
    return TestClient(app)


def size_of(content: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(content), formats=["JPEG"]).size


@pytest.mark.parametrize("sample_id", ODD_IDS)
def test_images_of_the_gallery_are_served_whatever_their_ids_look_like(client: TestClient, sample_id: str) -> None:
    answer = client.get(image_url("a shop/1", sample_id, 256))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/jpeg"
    assert size_of(answer.content) == (256, 171)
    number = ODD_IDS.index(sample_id)
    shown = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"), float)
    true = np.asarray(
        draw_image(number, "red", look=number, size=(300, 200)).resize((256, 171), Image.Resampling.LANCZOS), float
    )
    assert np.abs(shown - true).mean() < 4


@pytest.mark.parametrize(("side", "longest"), [(1, 64), (64, 64), (65, 128), (256, 256), (300, 300), (10**400, 300)])
def test_few_sizes_are_made_and_none_is_larger_than_the_image(client: TestClient, side: int, longest: int) -> None:
    assert max(size_of(client.get(image_url("a shop/1", ODD_IDS[0], side)).content)) == longest


def test_what_only_the_gallery_keeps_is_served(client: TestClient) -> None:
    assert size_of(client.get(image_url("a shop/1", "kept", 512)).content) == (100, 50)


TRAVERSALS = [
    "../../../../etc/passwd",
    "/etc/passwd",
    "....//....//etc/passwd",
    "..\\..\\etc\\passwd",
    "%2e%2e%2fetc%2fpasswd",
    "..%252f..%252fetc%252fpasswd",
    "file:///etc/passwd",
    "http://169.254.169.254/",
    "secret.txt",
    "./photos/a b.png",
    "photos/../photos/a b.png",
    "photos/a b.png\0",
    "photos/a b.png/",
    "PHOTOS/A B.PNG",
    " photos/a b.png",
    "' OR '1'='1",
    "'; DROP TABLE images; --",
    "*",
    "",
    "x" * 20_000,
    "gone",
    "broken",
    "text",
]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_nothing_else_is_served_and_no_answer_says_why(client: TestClient, folder: Path, name: str) -> None:
    galleries = (name, "a shop/1", "a shop")
    for gallery in galleries:
        answer = client.get("/images", params={"gallery": gallery, "id": name, "side": "256"})
        assert answer.status_code == 404
        assert answer.text == "there is no such image"
    assert client.get("/images", params={"gallery": name, "id": ODD_IDS[0]}).status_code == 404


@pytest.mark.parametrize("side", ["", "a", "1.5", "1e9", "NaN", "[]"])
def test_a_side_that_is_no_number_is_refused(client: TestClient, side: str) -> None:
    assert client.get("/images", params={"gallery": "a shop/1", "id": ODD_IDS[0], "side": side}).status_code == 422


@pytest.mark.parametrize("side", ["-5", "0", "-999999999999"])
def test_a_side_below_one_is_the_smallest(client: TestClient, side: str) -> None:
    found = client.get("/images", params={"gallery": "a shop/1", "id": ODD_IDS[0], "side": side})
    assert max(size_of(found.content)) == SIDES[0]


def test_what_the_browser_has_is_not_sent_again(client: TestClient) -> None:
    address = image_url("a shop/1", ODD_IDS[0], 128)
    tag = client.get(address).headers["etag"]
    again = client.get(address, headers={"if-none-match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get(address, headers={"if-none-match": '"other"'}).status_code == 200


def test_a_kept_image_is_not_made_again(client: TestClient, folder: Path) -> None:
    addresses = [image_url("a shop/1", ODD_IDS[4], side) for side in (128, 64)]
    first = client.get(addresses[0]).content
    moved = (folder / "4.png").rename(folder / "moved.png")
    try:
        assert client.get(addresses[0]).content == first
        assert client.get(addresses[1]).status_code == 404
    finally:
        moved.rename(folder / "4.png")
    assert client.get(addresses[1]).status_code == 200  # what failed is not kept


def test_a_file_outside_of_the_data_is_not_served(folder: Path, tmp_path: Path) -> None:
    """A stranger's gallery could name any file of this machine."""
    context = AppContext({}, {"theirs": ServedGallery(folder / "gallery", "theirs", data_roots=[tmp_path])})
    app = FastAPI()
    add_images(app, context)
    client = TestClient(app)
    refused = client.get("/images", params={"gallery": "theirs", "id": ODD_IDS[0], "side": 256})
    assert refused.status_code == 404
    assert str(folder) not in refused.text
    assert client.get("/images", params={"gallery": "theirs", "id": "kept", "side": 256}).status_code == 200
    assert len(context.gallery("theirs").not_shown()) == 3 + len(ODD_IDS)
