"""The tab Explore in a real browser, on the quickstart's gallery."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import Locator, Page, expect
from scipy.spatial.distance import pdist, squareform

from app.state.context import AppContext
from app.widgets.charts import lay_out

TOTALS, GRID, PLACE = "#explore-totals", "#explore-grid .card", "#explore-place"


@pytest.fixture(scope="module")
def frame(context: AppContext) -> pd.DataFrame:
    """What the gallery says of its images."""
    return pd.DataFrame(context.gallery("quickstart").metadata.to_pandas())


def show(page: Page, view: str) -> None:
    page.locator("#explore-view").get_by_role("radio", name=view, exact=True).click()


def choose(page: Page, field: str, value: str) -> None:
    """Picks a value of a list by typing, as people do in long ones."""
    box = page.locator(f"{field} input").first
    box.click()
    box.fill(value)
    page.get_by_role("option", name=value, exact=True).click()


def said(count: int) -> re.Pattern[str]:
    return re.compile(rf"\b{count} of 300 images")


def loaded(images: Locator) -> bool:
    """Whether the first image is there and has pixels."""
    return bool(images.first.evaluate("image => image.complete && image.naturalWidth > 0"))


def test_filters_change_the_counts_and_the_grid(page: Page, frame: pd.DataFrame, screenshots: Path) -> None:
    page.goto("/?tab=explore&gallery=quickstart")
    expect(page.locator(TOTALS)).to_contain_text("300 images (train")
    expect(page.locator(GRID)).to_have_count(20)
    expect(page.locator(PLACE)).to_contain_text("page 1 of 15")
    value = frame["label_class"].value_counts().index[0]
    choose(page, "#explore-class", value)
    of_class = frame[frame["label_class"] == value]
    expect(page.locator(TOTALS)).to_contain_text(said(len(of_class)))
    choose(page, "#explore-split", "test")
    in_test = of_class[of_class["split"] == "test"]
    expect(page.locator(TOTALS)).to_contain_text(said(len(in_test)))
    colour = in_test["label_colour"].value_counts().index[0]
    choose(page, "#explore-attributes", f"colour: {colour}")
    left = in_test[in_test["label_colour"] == colour]
    expect(page.locator(TOTALS)).to_contain_text(said(len(left)))
    expect(page.locator(GRID)).to_have_count(min(20, len(left)))
    assert page.locator(GRID).evaluate_all("cards => cards.map(card => card.dataset.id)") == left["id"].tolist()[:20]
    expect(page.locator(f"{GRID} img").first).to_have_js_property("complete", value=True)
    assert loaded(page.locator(f"{GRID} img"))
    page.screenshot(path=screenshots / "explore_grid.png")


@pytest.mark.slow
def test_a_card_opens_its_image_and_the_arrow_keys_lead_on(page: Page, frame: pd.DataFrame) -> None:
    page.goto("/?tab=explore&gallery=quickstart&split=test")
    rows = frame[frame["split"] == "test"]["id"].tolist()
    page.locator(GRID).nth(2).click()
    focus = page.locator("#explore-focus")
    expect(focus).to_contain_text(rows[2])
    expect(page.locator(PLACE)).to_have_text(f"3 of {len(rows)}")
    page.keyboard.press("ArrowRight")
    expect(focus).to_contain_text(rows[3])
    # Several presses at once each count.
    for key in ("ArrowLeft", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    expect(page.locator(PLACE)).to_have_text(f"1 of {len(rows)}")
    expect(focus).to_contain_text(rows[0])
    expect(page.locator("#explore-previous")).to_be_disabled()
    show(page, "Grid")
    expect(page.locator(PLACE)).to_contain_text("page 1 of")
    page.keyboard.press("ArrowRight")
    expect(page.locator(PLACE)).to_contain_text("page 2 of")
    page.get_by_label("Shuffle").check()
    expect(page.locator(PLACE)).to_contain_text("page 1 of")
    drawn = page.locator(GRID)
    expect(drawn.first).not_to_have_attribute("data-id", rows[0])
    assert set(drawn.evaluate_all("cards => cards.map(card => card.dataset.id)")) <= set(rows)


@pytest.mark.slow
def test_a_class_among_the_bars_shows_its_images(page: Page, frame: pd.DataFrame, screenshots: Path) -> None:
    page.goto("/?tab=explore&gallery=quickstart&view=Classes")
    counts = frame["label_class"].value_counts()
    bar = page.locator(f'#explore-classes .bar[data-value="{counts.index[-1]}"]')
    expect(bar).to_contain_text(str(counts.iloc[-1]))
    page.screenshot(path=screenshots / "explore_classes.png")
    bar.focus()
    page.keyboard.press("Enter")
    expect(page.locator(TOTALS)).to_contain_text(said(counts.iloc[-1]))
    expect(page.locator("#explore-class input").first).to_have_value(counts.index[-1])
    expect(page.locator(GRID).first).to_contain_text(counts.index[-1])


@pytest.mark.slow
def test_a_point_of_the_map_opens_its_image(page: Page, frame: pd.DataFrame, screenshots: Path) -> None:
    page.goto("/?tab=explore&gallery=quickstart&split=val&view=Map")
    legend, tip = page.locator(".map-legend li"), page.locator(".map-tip")
    in_val = frame[frame["split"] == "val"]
    expect(legend).to_have_count(in_val["label_class"].nunique())
    expect(page.locator("#explore-note")).to_contain_text("300 images by PCA")
    page.locator("#explore-map canvas").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(tip).to_be_visible()
    expect(tip.locator("img")).to_have_js_property("complete", value=True)
    page.screenshot(path=screenshots / "explore_map.png")
    name = str(tip.locator("span").text_content()).split(" · ")[1]
    assert name in set(in_val["id"])
    page.keyboard.press("Enter")
    expect(page.locator("#explore-focus")).to_contain_text(name)
    expect(page.locator("#explore-focus img")).to_have_js_property("complete", value=True)
    assert loaded(page.locator("#explore-focus img"))


@pytest.mark.slow
def test_a_click_opens_the_image_that_lies_there(page: Page, context: AppContext, frame: pd.DataFrame) -> None:
    ids = frame["id"].tolist()
    places = lay_out(context.gallery("quickstart").gallery, ids, "PCA").places
    distances = squareform(pdist(places)) + np.eye(len(places))
    lonely = int(distances.min(axis=1).argmax())
    page.goto("/?tab=explore&gallery=quickstart&view=Map")
    expect(page.locator(".map-legend li").first).to_be_visible()
    canvas = page.locator("#explore-map canvas")
    box = canvas.bounding_box()
    assert box
    # The points keep 14 pixels from the edge; the second direction goes up.
    x, y = (14 + share * (box["width"] - 28) for share in (places[lonely, 0], 1 - places[lonely, 1]))
    canvas.click(position={"x": x, "y": y})
    expect(page.locator("#explore-focus")).to_contain_text(ids[lonely])


@pytest.mark.slow
def test_colours_are_drawn_for_the_chosen_classes(page: Page, frame: pd.DataFrame, screenshots: Path) -> None:
    page.goto("/?tab=explore&gallery=quickstart&view=Colours")
    expect(page.locator("#explore-colours svg")).to_have_count(3)
    expect(page.locator("#explore-colours .explore-legend li")).to_have_count(6)
    value = frame["label_class"].value_counts().index[-1]
    choose(page, "#explore-compared", value)
    expect(page.locator("#explore-colours .explore-legend li")).to_have_text([value])
    page.screenshot(path=screenshots / "explore_colours.png")


@pytest.mark.slow
def test_mistakes_come_with_target_prediction_and_confidence(
    page: Page, frame: pd.DataFrame, screenshots: Path
) -> None:
    page.goto("/?tab=explore&gallery=quickstart&view=Mistakes&split=test")
    part = frame[frame["split"] == "test"]
    wrong = part[part["label_class"] != part["predicted_class"]].sort_values(
        "confidence_class", ascending=False, kind="stable"
    )
    expect(page.locator("#explore-note")).to_contain_text(f"{len(wrong)} of {len(part)} predictions of class are wrong")
    first = page.locator(GRID).first
    worst = wrong.iloc[0]
    expect(first).to_contain_text(f"target: {worst['label_class']}")
    expect(first).to_contain_text(f"prediction: {worst['predicted_class']}")
    expect(first).to_contain_text(f"confidence {worst['confidence_class']:.2f}")
    page.screenshot(path=screenshots / "explore_mistakes.png")
    page.locator("#explore-task").get_by_role("radio", name="colour").click()
    expect(page.locator("#explore-note")).to_contain_text("predictions of colour are wrong")
    first.click()
    expect(page.locator("#explore-focus")).to_contain_text("✗")


@pytest.mark.slow
def test_an_address_that_asks_for_what_there_is_not_says_so_and_shows_everything(page: Page) -> None:
    page.goto("/?tab=explore&class=<img src=x onerror=alert(1)>")
    expect(page.get_by_text("is not there; choose one of")).to_be_visible()
    expect(page.locator(TOTALS)).to_contain_text("300 images (train")


@pytest.mark.slow
def test_nothing_is_wider_than_a_phone(phone: Page, screenshots: Path) -> None:
    phone.goto("/?tab=explore&gallery=quickstart")
    shown = {
        "Grid": GRID, "One image": "#explore-focus img", "Classes": "#explore-classes .bar",
        "Colours": "#explore-colours svg", "Map": ".map-legend li", "Mistakes": GRID,
    }  # fmt: skip
    for view, part in shown.items():
        show(phone, view)
        expect(phone.locator(part).first).to_be_visible()
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390, view
        phone.screenshot(path=screenshots / f"explore_phone_{view.replace(' ', '_').lower()}.png", full_page=True)
