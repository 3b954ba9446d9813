"""What visitors do first, in a real browser: examples, links between tabs, addresses, models compared, labels."""

from __future__ import annotations

import csv
import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlparse

import pytest

from app.state.context import AppContext
from app.widgets.page import COUNT, example_ids

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

if TYPE_CHECKING:
    from playwright.sync_api import Page


def query(page: Page) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlparse(page.url).query).items()}


def test_examples_are_of_many_classes_and_not_trained_on(context: AppContext) -> None:
    gallery = context.gallery("quickstart")
    rows = gallery.rows(example_ids(gallery))
    assert len(rows) == COUNT
    assert {row["split"] for row in rows} == {"test"}
    assert len({row["label_class"] for row in rows}) > COUNT // 2


def test_an_example_is_classified_and_kept_by_the_address(page: Page) -> None:
    page.goto("/")
    expect(page.locator("#classify-predictions")).to_contain_text("press an example")
    page.locator("#classify-examples button.card").nth(1).click()
    bars = page.locator("#classify-predictions button.bar")
    expect(bars.first).to_be_visible()
    page.wait_for_url(re.compile("model=quickstart&gallery=.*&image="))
    expect(page.locator("#classify-similar button.card")).to_have_count(6)
    expect(page.locator("#classify-similar-title")).to_have_text("Why? The most similar training images to the model")
    shown = bars.first.get_attribute("aria-label")
    page.reload()
    expect(bars.first).to_have_attribute("aria-label", shown or "")
    # One model is offered: nothing is called by its name.
    expect(page.locator("#classify-predictions h3")).to_have_count(0)
    # No transformer is served, so there is one method, and no choice.
    expect(page.get_by_text("Attention rollout")).to_have_count(0)


def test_an_example_is_compared_with_labels_at_once(page: Page) -> None:
    page.goto("/?tab=zero-shot&labels=mug,cap,lamp")
    page.locator("#zero-shot-examples button.card").first.click()
    expect(page.locator("#zero-shot-predictions button.bar")).to_have_count(3)
    page.wait_for_url(re.compile(r"labels=mug%2Ccap%2Clamp"))


def test_the_address_follows_and_back_stays_in_the_application(page: Page) -> None:
    page.goto("/?tab=search&gallery=pairs")
    field = page.get_by_label("Search for", exact=True)
    for words in ("blue mug", "red cap"):
        field.fill(words)
        page.keyboard.press("Enter")
        page.get_by_text(f"Results 1 to 20 for “{words}”").wait_for()
    page.wait_for_url(re.compile(r"q=red\+cap"))
    page.get_by_role("tab", name="Explore").click()
    page.wait_for_url(re.compile("tab=explore"))
    page.go_back()
    page.get_by_text("Results 1 to 20 for “red cap”").wait_for()
    page.go_back()
    page.get_by_text("Results 1 to 20 for “blue mug”").wait_for()
    assert query(page)["tab"] == "search"


@pytest.mark.slow
def test_an_image_that_is_found_is_classified(page: Page) -> None:
    page.goto("/?tab=search&gallery=pairs&q=blue+mug")
    page.locator("#search-grid button.card").first.click()
    page.get_by_role("link", name="Classify it").click()
    expect(page.locator("#classify-predictions button.bar").first).to_be_visible()
    assert query(page)["tab"] == "classify"


def test_models_are_compared(page: Page, context: AppContext) -> None:
    page.goto("/?tab=explore&gallery=quickstart&view=Compare+models&task=class")
    expect(page.locator("#explore-note")).to_contain_text("quickstart and pairs differ in class for")
    cards = page.locator("#explore-grid button.card")
    if cards.count():
        expect(cards.first).to_contain_text("quickstart: ")
        expect(cards.first).to_contain_text("pairs: ")


@pytest.mark.slow
def test_labels_are_corrected_and_downloaded(page: Page, context: AppContext) -> None:
    gallery = context.gallery("quickstart")
    row = gallery.rows(gallery.metadata.column("id").to_pylist()[:1])[0]
    other = next(name for name in context.run("quickstart").tasks["class"] if name != row["label_class"])
    page.goto(f"/?tab=explore&gallery=quickstart&view=One+image&image={row['id']}")
    field = page.locator("#explore-right input")
    expect(field).to_have_value(row["label_class"])
    field.fill(other)
    page.get_by_role("option", name=other, exact=True).click()
    page.get_by_role("button", name="Save label").click()
    download = page.locator("#explore-corrections")
    expect(download).to_contain_text("Download 1 correction")
    # The browser keeps it.
    page.reload()
    expect(download).to_contain_text("Download 1 correction")
    with page.expect_download() as started:
        download.click()
    with started.value.path().open(encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [
            {"id": row["id"], "task": "class", "label": other, "old_label": row["label_class"]}
        ]


@pytest.mark.slow
def test_a_chosen_radio_button_keeps_its_mark_under_the_mouse(page: Page) -> None:
    page.goto("/?tab=explore&gallery=quickstart")
    chosen = page.locator("#explore-view").get_by_role("radio", name="Grid", exact=True)
    style = "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).backgroundImage]"
    page.mouse.move(0, 0)
    expect(chosen).to_be_checked()
    away = chosen.evaluate(style)
    chosen.hover()
    page.wait_for_timeout(300)  # of the transition
    assert chosen.evaluate(style) == away
    other = page.locator("#explore-view").get_by_role("radio", name="Map", exact=True)
    assert away[1] != "none"
    assert away != other.evaluate(style)
