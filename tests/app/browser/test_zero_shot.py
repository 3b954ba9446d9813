"""The tab Zero-shot in a real browser, with the quickstart's dual encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from app.logic.uploads import read_uploads
from app.logic.zero_shot import PROMPTS, Others, ask
from app.state.context import AppContext
from tests.app.browser.uploads import give, wares

ANSWERS, BARS = "#zero-shot-predictions article", "#zero-shot-predictions button.bar"


@pytest.fixture(scope="module")
def images(pairs_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return wares(pairs_run, tmp_path_factory.mktemp("images"), 2)


def test_labels_get_bars_and_a_verdict(page: Page, images: list[Path], context: AppContext, screenshots: Path) -> None:
    page.goto("/?tab=zero-shot")
    give(page, "#zero-shot-images", images)
    labels = page.locator("#zero-shot-labels textarea")
    labels.fill("mug, cap\n Mug , blue vase")
    page.locator("#zero-shot-button").click()
    run = context.run("pairs")
    uploads = read_uploads(images, context.limits, [run])
    expected = ask(
        run,
        [upload.inputs[run.name] for upload in uploads if upload.image is not None],
        ["mug", "cap", "blue vase"],
        PROMPTS["One sentence"],
        others=Others(),
    )
    expect(page.locator(ANSWERS)).to_have_count(2)
    expect(page.locator("#zero-shot-predictions .notes")).to_contain_text("“mug” was given 2 times and counts once")
    for place, answer in enumerate(expected):
        article = page.locator(ANSWERS).nth(place)
        expect(article.locator("button.bar")).to_have_count(3)
        for bar, (label, share, similarity) in enumerate(answer.ranked()):
            said = article.locator("button.bar").nth(bar)
            expect(said).to_contain_text(f"{label}similarity {similarity:.3f} {100 * share:.1f} %")
        expect(article.locator("p.verdict")).to_have_text([answer.verdict.text] if answer.verdict.none_of_these else [])
    page.locator(BARS).first.click()
    expect(page.locator("#zero-shot-overlay img")).to_have_count(2)
    page.screenshot(path=screenshots / "zero_shot.png", full_page=True)


@pytest.mark.slow
def test_an_ensemble_is_chosen_and_templates_can_be_own(page: Page, images: list[Path]) -> None:
    page.goto("/?tab=zero-shot&labels=mug,cap")
    expect(page.locator("#zero-shot-labels textarea")).to_have_value("mug,cap")
    page.get_by_text("Prompt and temperature").click()
    page.locator("#zero-shot-prompt input").click()
    page.get_by_role("option", name="Ensemble of seven").click()
    templates = page.locator("#zero-shot-templates textarea")
    expect(templates).to_have_value("\n".join(PROMPTS["Ensemble of seven"]))
    templates.fill("no place for the label")
    expect(page.locator("#zero-shot-prompt input")).to_have_value("My own")
    give(page, "#zero-shot-images", images[:1])
    page.locator("#zero-shot-button").click()
    expect(page.get_by_text("must have {} once")).to_be_visible()
    templates.fill("one {} on a table")
    page.locator("#zero-shot-button").click()
    expect(page.locator(f'{BARS}[data-label="one cap on a table"]')).to_be_visible()


@pytest.mark.slow
def test_on_a_phone_nothing_is_cut_off(phone: Page, images: list[Path], screenshots: Path) -> None:
    phone.goto("/?tab=zero-shot")
    give(phone, "#zero-shot-images", images[:1])
    phone.locator("#zero-shot-button").click()
    expect(phone.locator(BARS).first).to_be_visible()
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    phone.screenshot(path=screenshots / "zero_shot_phone.png", full_page=True)
