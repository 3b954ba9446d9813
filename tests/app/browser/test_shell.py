"""The page around the tabs in a real browser: links, keys, cards, messages, a narrow and dark window."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
import pytest

from app.server import blocks_of, build_app
from app.state.context import AppContext
from app.widgets.page import Card, card_grid, cards_html, report_errors
from tests.app.conftest import fresh_page
from tests.app.running import Served, serving
from vitrail.errors import UserError

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

TABS = ["Classify", "Zero-shot", "Search", "Explore"]


def trial_tab(context: AppContext) -> None:
    """A grid that answers, refuses and fails."""
    gallery = context.gallery("quickstart")
    ids = gallery.metadata.column("id").to_pylist()[:6]
    items = [Card("quickstart", sample_id, f"<b>card {n}</b>", ["a line"]) for n, sample_id in enumerate(ids)]
    grid = card_grid(items, elem_id="grid")
    said = gr.Textbox(label="Chosen")

    def choose(event: gr.SelectData) -> tuple[str, str]:
        if event.index == 4:
            raise UserError("card 4: <i>cannot</i> be chosen")
        if event.index == 5:
            raise RuntimeError("broken inside")
        shown = [Card("quickstart", i, f"card {n}") for n, i in enumerate(ids)]
        return f"{event.index} {event.value == ids[event.index]}", cards_html(shown)

    grid.select(report_errors(choose), None, [said, grid])


@pytest.fixture(scope="module")
def trial(context: AppContext) -> Iterator[Served]:
    app = build_app(context, blocks=lambda served: blocks_of(served, [("Trial", trial_tab), ("Empty", lambda _: None)]))
    with serving(app, context) as server:
        yield server


@pytest.fixture
def trial_page(browser: Browser, trial: Served) -> Iterator[Page]:
    yield from fresh_page(browser, trial.url)


def test_cards_are_chosen_by_mouse_and_keys_and_errors_are_shown(trial_page: Page) -> None:
    page, chosen = trial_page, trial_page.get_by_label("Chosen")
    page.goto("/")
    cards = page.locator("#grid button.card")
    expect(cards).to_have_count(6)
    expect(cards.first).to_contain_text("<b>card 0</b>")
    page.wait_for_function("document.querySelector('#grid img').naturalWidth > 0")
    cards.nth(1).click()
    expect(chosen).to_have_value("1 True")
    expect(cards.nth(1)).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(cards.nth(2)).to_be_focused()
    page.keyboard.press("Enter")
    expect(chosen).to_have_value("2 True")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    expect(cards.nth(4)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_text("card 4: <i>cannot</i> be chosen")).to_be_visible()
    cards.nth(5).click()
    expect(page.get_by_text("This request failed")).to_be_visible()
    cards.nth(0).click()
    expect(chosen).to_have_value("0 True")


@pytest.mark.parametrize(
    ("link", "tab"),
    [
        *(("/?tab=Explore", 3), ("/?tab=<b>", 0)),
        *(
            pytest.param(link, tab, marks=pytest.mark.slow)
            for link, tab in (("/", 0), ("/?tab=zero-shot", 1), ("/?tab=search", 2))
        ),
    ],
)
def test_links_open_their_tab(page: Page, link: str, tab: int) -> None:
    page.goto(link)
    expect(page.get_by_role("tab", name=TABS[tab], exact=True)).to_have_attribute("aria-selected", "true")


def test_tabs_are_reached_by_keys_but_not_while_typing(page: Page) -> None:
    page.goto("/")
    expect(page.get_by_role("tab", name="Classify")).to_have_attribute("aria-selected", "true")
    search = page.get_by_role("tab", name="Search")
    page.keyboard.press("3")
    expect(search).to_have_attribute("aria-selected", "true")
    page.keyboard.press("/")
    expect(page.locator("textarea:focus")).to_be_visible()
    page.keyboard.type("4 mugs / 2")
    expect(search).to_have_attribute("aria-selected", "true")
    expect(page.locator("textarea:focus, input:focus")).to_have_value("4 mugs / 2")


# Each tab's own test has it as narrow.
@pytest.mark.parametrize(
    "tab", ["classify", *(pytest.param(tab, marks=pytest.mark.slow) for tab in ("zero-shot", "search", "explore"))]
)
def test_a_phone_shows_each_tab_whole_and_dark(phone: Page, tab: str, screenshots: Path) -> None:
    phone.goto(f"/?tab={tab}")
    expect(phone.get_by_role("tab", selected=True)).to_have_text(re.compile(tab, re.IGNORECASE))
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    background = phone.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in re.findall(r"\d+", background)[:3]) < 60
    phone.screenshot(path=screenshots / f"phone_{tab}.png", full_page=True)
