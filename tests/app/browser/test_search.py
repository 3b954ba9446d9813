"""The tab Search in a real browser, on the quickstart's runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from app.logic.uploads import read_upload
from app.state.context import AppContext

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route


def cards(page: Page) -> list[str]:
    return [str(card.get_attribute("data-id")) for card in page.locator("#search-grid button.card").all()]


def test_words_filters_pages_and_more_like_this(page: Page, context: AppContext, screenshots: Path) -> None:
    gallery = context.galleries["pairs"]
    page.goto("/?tab=search&gallery=pairs&q=blue+mug")
    page.get_by_text("Results 1 to 20 for “blue mug”").wait_for()
    assert len(cards(page)) == 20
    page.wait_for_function(
        "[...document.querySelectorAll('#search-grid img')].slice(0, 8).every(i => i.naturalWidth > 0)"
    )
    page.screenshot(path=screenshots / "search.png")

    page.get_by_role("button", name="Next page").click()
    page.get_by_text("Results 21 to 40 for “blue mug”").wait_for()

    page.locator("#search-filters").get_by_text("Filters").click()
    page.locator("#search-only-colour input").click()
    page.get_by_role("option", name="blue", exact=True).click()
    blue = gallery.metadata.column("label_colour").to_pylist().count("blue")
    page.get_by_text(f"{blue} images searched").wait_for()
    page.keyboard.press("Escape")
    assert {gallery.row(name)["label_colour"] for name in cards(page)} == {"blue"}

    opened = cards(page)[2]
    page.locator("#search-grid button.card").nth(2).click()
    page.locator("#search-details").get_by_text(opened, exact=True).wait_for()
    page.get_by_role("button", name="More like this").click()
    page.get_by_text(f"for images like {opened}").wait_for()
    assert opened not in cards(page)
    assert page.get_by_text(re.compile(r"Top score -?\d\.\d{4} · mean of these 20: ")).is_visible()


@pytest.mark.slow
def test_the_link_to_a_page_of_results_opens(page: Page) -> None:
    page.goto("/?tab=search&gallery=pairs&q=blue+mug&at-page=2")
    page.get_by_text("Results 21 to 40 for “blue mug”").wait_for()
    page.goto("/" + str(page.get_by_role("link", name="Link to this search").get_attribute("href")))
    page.get_by_text("Results 21 to 40 for “blue mug”").wait_for()


@pytest.mark.slow
def test_what_was_asked_last_is_shown(page: Page) -> None:
    page.goto("/?tab=search&gallery=pairs&q=blue+mug")
    page.get_by_text("Results 1 to 20 for “blue mug”").wait_for()
    held: list[Route] = []
    page.route("**/queue/join*", lambda route: route.continue_() if held else held.append(route))
    for words in ("red", "green"):
        page.get_by_label("Search for", exact=True).fill(words)
        page.keyboard.press("Enter")
        # Only so long that the second is asked while the first is on its way.
        page.wait_for_timeout(300)
    held[0].continue_()
    page.get_by_text("Results 1 to 20 for “green”").wait_for()


@pytest.mark.slow
def test_an_image_is_searched_for(page: Page, context: AppContext, tmp_path: Path) -> None:
    gallery, run = context.galleries["pairs"], context.runs["pairs"]
    kept = gallery.image(gallery.metadata.column("id")[7].as_py())
    assert isinstance(kept, bytes)
    (tmp_path / "mine.jpg").write_bytes(kept)
    page.goto("/?tab=search&gallery=pairs")
    page.get_by_text("By an image").click()
    page.locator("#search-image input[type=file]").first.set_input_files(tmp_path / "mine.jpg")
    page.get_by_text("Results 1 to 20 for the uploaded image").wait_for()
    vectors = run.encode_images([read_upload(tmp_path / "mine.jpg")])
    assert cards(page) == [hit.id for hit in gallery.gallery.nearest(vectors, 20)[0]]


@pytest.mark.slow
def test_on_a_phone_by_keyboard(phone: Page, context: AppContext, screenshots: Path) -> None:
    # What so small a run says of colours differs from processor to processor; something it does say.
    said = context.galleries["quickstart"].metadata.column("predicted_colour")[0].as_py()
    phone.goto("/?tab=search&gallery=quickstart")
    phone.get_by_label("Search for", exact=True).fill(f"{said} zeppelin")
    phone.keyboard.press("Enter")
    phone.get_by_text("no image has the word 'zeppelin'").wait_for()
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    first = phone.locator("#search-grid button.card").first
    first.focus()
    phone.keyboard.press("ArrowRight")
    phone.keyboard.press("Enter")
    phone.locator("#search-details").wait_for()
    phone.wait_for_function("document.activeElement.id === 'search-more-like'")
    phone.screenshot(path=screenshots / "search_phone.png")

    phone.get_by_label("Search for", exact=True).fill("zeppelin")
    phone.keyboard.press("Enter")
    phone.get_by_text("No match for “zeppelin”").wait_for()
    assert cards(phone) == []
