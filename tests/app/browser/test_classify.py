"""The tab Classify in a real browser, with the quickstart's run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from app.logic.classify import classify
from app.state.context import AppContext
from tests.app.browser.uploads import copy, give, wares

ANSWERS, BARS = "#classify-predictions article", "#classify-predictions button.bar"


@pytest.fixture(scope="module")
def images(quickstart_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return wares(quickstart_run, tmp_path_factory.mktemp("images"), 3)


def test_an_uploaded_image_is_classified(
    page: Page, images: list[Path], context: AppContext, screenshots: Path
) -> None:
    page.goto("/?tab=classify")
    give(page, "#classify-images", images[:1])
    [expected] = classify(context, images[:1], ["quickstart"])
    tasks = expected.predictions["quickstart"].tasks
    expect(page.locator(f"{ANSWERS} h4")).to_have_count(len(tasks))
    for place, (task, answer) in enumerate(tasks.items()):
        label, share = answer.top_k(1)[0]
        title = page.locator(f"{ANSWERS} h4").nth(place)
        expect(title).to_contain_text(f"{task}: {label.replace('_', ' ')}")
        bar = page.locator(f'{BARS}[data-task="{task}"]').first
        expect(bar).to_contain_text(f"{100 * share:.1f} %")
    upload, whole = (page.locator(f"#classify-images {part}").bounding_box() for part in (".grid-wrap", "img"))
    assert upload
    assert whole
    assert whole["height"] <= upload["height"]
    # On demand, by keyboard: where it sees the class.
    expect(page.locator("#classify-overlay img")).to_have_count(0)
    page.locator(BARS).first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#classify-overlay img")).to_have_count(2)
    expect(page.locator("#classify-overlay")).to_contain_text(re.compile(r"quickstart: (bright|nothing)"))
    page.screenshot(path=screenshots / "classify.png", full_page=True)


@pytest.mark.slow
def test_several_images_and_two_models(page: Page, images: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no image")
    page.goto("/?tab=classify&model=pairs&beside=quickstart")
    give(page, "#classify-images", [*images[:2], broken])
    expect(page.locator(ANSWERS)).to_have_count(3)
    for place in (0, 1):
        expect(page.locator(ANSWERS).nth(place).locator("h3")).to_have_text(["pairs", "quickstart"])
    expect(page.locator(ANSWERS).nth(2).get_by_role("alert")).to_contain_text("broken.png")
    left, right = (page.locator(ANSWERS).first.locator("section").nth(place).bounding_box() for place in (0, 1))
    assert left is not None
    assert right is not None
    assert left["y"] == right["y"]
    assert right["x"] >= left["x"] + left["width"]


def test_images_are_pasted_by_key_and_by_button(page: Page, images: list[Path]) -> None:
    page.goto("/?tab=classify")
    expect(page.locator("#classify-images")).to_be_visible()
    copy(page, images[0])
    page.keyboard.press("Control+v")
    expect(page.locator(ANSWERS)).to_have_count(1)
    page.locator("#classify-images").get_by_role("button", name="Paste from clipboard").click()
    expect(page.locator(ANSWERS)).to_have_count(2)


@pytest.mark.slow
def test_an_image_is_taken_by_the_camera(page: Page) -> None:
    page.context.grant_permissions(["camera"])
    page.goto("/?tab=classify")
    given = page.locator("#classify-images")
    given.get_by_role("button", name="Capture from camera").click()
    given.get_by_role("button", name="Click to Access Webcam").click()
    # Before its first frame the camera has no size, and the button takes nothing and says nothing.
    page.wait_for_function("document.querySelector('#classify-images video').videoWidth > 0")
    given.get_by_role("button", name="capture photo").click()
    expect(page.locator(ANSWERS)).to_have_count(1)
    expect(page.locator(BARS).first).to_be_visible()


def test_a_request_without_an_image_says_why(page: Page) -> None:
    page.goto("/?tab=classify")
    page.locator("#classify-button").click()
    expect(page.get_by_text("there is no image yet")).to_be_visible()


@pytest.mark.slow
def test_on_a_phone_nothing_is_cut_off(phone: Page, images: list[Path], screenshots: Path) -> None:
    phone.goto("/?tab=classify")
    give(phone, "#classify-images", images[:1])
    expect(phone.locator(BARS).first).to_be_visible()
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    phone.screenshot(path=screenshots / "classify_phone.png", full_page=True)
