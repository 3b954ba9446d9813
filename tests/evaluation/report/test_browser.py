"""Pages in a real browser: sorting, filtering, hovering, themes, windows of any width, paper, and without a script."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from evaluation.report.charts import Span, line_chart, map_chart, reliability_chart
from evaluation.report.page import SHOWN_ROWS, SHOWN_TILES, Headline, ImageGrid, Matrix, Page, Section, Summary
from evaluation.statistics.calibration import reliability_bins
from evaluation.statistics.intervals import Estimate, Interval
from retrieval.commands.output import small_jpeg

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator
    from playwright.sync_api import Page as Tab

DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
CLASSES = ["backpack", "<script>window.hacked = 1</script>", "שלום", 'the "mug"']
N = 300


def whole_page() -> Page:
    """A page with every part, and texts that are not harmless."""
    rng = np.random.default_rng(0)
    numbers = pd.DataFrame(
        {
            "class": [f"class {row}" for row in range(N)],
            "recall": rng.permutation(N) / N,
            "samples": rng.permutation(N) + 1_000,
            **{f"column {place}": rng.random(N) for place in range(14)},
        }
    )
    numbers.loc[5, "recall"] = np.nan
    rows = pd.DataFrame(
        {
            "name": [f"photos/{row:03}.jpg" for row in range(60)],
            "target": [CLASSES[row % 3] for row in range(60)],
            "predicted": [CLASSES[3 if row % 2 else (row + 1) % 3] for row in range(60)],
            "confidence": np.linspace(0.99, 0.2, 60),
        }
    )
    jpeg = small_jpeg(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    images = dict.fromkeys(rows["name"][:50], jpeg)
    facets = {"target": "True class", "predicted": "Predicted class"}
    grid = ImageGrid("mistakes", "class: 60 mistakes", rows, facets, "confidence", images)
    counts = pd.crosstab(rows["target"], rows["predicted"]).reindex(index=CLASSES, columns=CLASSES, fill_value=0)
    x = np.arange(1, 11.0)
    places, labels = rng.normal(size=(60, 2)), [CLASSES[row % 4] for row in range(60)]
    span = Span(Estimate(0.573, Interval(0.503, 0.64)), "0.503 to 0.640", (0.0, 1.0), 0.1, "good")
    headlines = [
        Headline(f"{task}: accuracy", "0.573", span, f"Better than always predicting {CLASSES[1]!r}: 0.100.", "good")
        for task in ("class", "colour", "material", "condition")
    ]
    summary = Summary(
        [
            "MultiTaskClassifier with resnet18, 11.2 M parameters, trained on Products (900 images) in 12 minutes.",
            "Evaluated on 300 test images of 100 groups.",
        ],
        headlines,
        [
            f"caveat {number}: the intervals rest on few groups only, and this sentence is rather long."
            for number in range(5)
        ],
        [
            f"step {number}: `python -m evaluation calibrate runs/shop/20260101-100000` does, on val."
            for number in range(4)
        ],
    )
    bins = reliability_bins(rng.uniform(0.3, 1, 200), rng.random(200) < 0.7, 10)
    scores = pd.DataFrame({"task": ["class", "colour"], "accuracy": [span, span], "n": [300, 300]})
    sections = [
        Section("Scores", ["Intervals."], tables={"scores": scores}),
        Section("Mistakes", grids=[grid]),
        Section("Confusions", matrices=[Matrix("class", counts, "mistakes")]),
        Section("Classes", tables={"classes": numbers}),
        Section("Calibration", charts={"reliability": reliability_chart("class", bins)}),
        Section("Map", charts={"map": map_chart("PCA", places, [*rows["name"]], labels)}),
        Section(
            "Training",
            charts={"curves": line_chart("loss", {"val/loss": (x, 10 / x), "train/loss": (x, 8 / x)}, "epochs done")},
        ),
        Section("Configuration", folded={"all of config.yaml": "a: b\n" * 50}, is_detail=True),
        Section("Efficiency", missing=["Nothing is measured yet: `python -m evaluation efficiency runs/shop` does."]),
    ]
    return Page(CLASSES[1], ["Made by `python -m evaluation report`."], sections, summary)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return whole_page().write(tmp_path_factory.mktemp("page"), "report").as_uri()


@pytest.fixture
def tab(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Tab]:
    """The page in a window of its own, by default at a desk; the test fails where it threw or asked for anything."""
    yield from opened(browser, address, **getattr(request, "param", {}))


def opened(browser: Browser, address: str, **options: Any) -> Iterator[Tab]:
    context = browser.new_context(**{"viewport": DESK, "reduced_motion": "reduce", **options})
    tab = context.new_page()
    wrong: list[str] = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    tab.on(
        "request",
        lambda asked: wrong.append(asked.url) if asked.url != address and not asked.url.startswith("data:") else None,
    )
    tab.goto(address)
    yield tab
    context.close()
    assert not wrong


def column(tab: Tab, table: Any, place: int) -> list[str]:
    return [text.strip() for text in table.locator(f"tbody tr > :nth-child({place})").all_inner_texts()]


def test_tables_are_sorted_by_any_column_with_mouse_and_keys(tab: Tab) -> None:
    box = tab.locator(".table", has=tab.get_by_text("classes", exact=True))
    head = box.get_by_role("columnheader", name="recall")
    assert len(column(tab, box, 1)) == SHOWN_ROWS
    head.get_by_role("button").click()
    expect(head).to_have_attribute("aria-sort", "descending")
    expected = [f"{value / N:.3f}" for value in range(N - 1, N - 1 - SHOWN_ROWS, -1)]
    shown = column(tab, box, 2)
    assert len(set(shown) - set(expected)) <= 1  # one is not known
    assert shown == sorted(shown, reverse=True)
    head.get_by_role("button").focus()
    tab.keyboard.press("Enter")
    expect(head).to_have_attribute("aria-sort", "ascending")
    assert float(column(tab, box, 2)[1]) < 0.01
    box.get_by_role("columnheader", name="class").get_by_role("button").click()
    assert column(tab, box, 1)[:3] == ["class 0", "class 1", "class 2"]  # as numbers, not as letters


def test_tables_are_searched_and_more_rows_come_as_one_scrolls(tab: Tab) -> None:
    box = tab.locator(".table", has=tab.get_by_text("classes", exact=True))
    scroll = box.locator(".scroll")
    scroll.evaluate("box => box.scrollTo(0, box.scrollHeight)")
    expect(box.locator("tbody tr")).to_have_count(SHOWN_ROWS + 100)
    assert column(tab, box, 3)[40].replace(",", "").isdigit()
    box.get_by_label("Search").fill("CLASS 29")
    expect(box.get_by_role("status")).to_have_text("11 of 300 rows")
    assert set(column(tab, box, 1)) == {"class 29", *(f"class {row}" for row in range(290, 300))}


def test_mistakes_are_filtered_by_class_and_confidence(tab: Tab) -> None:
    grid = tab.locator(".gallery")
    tiles = grid.locator(".tile")
    expect(tiles).to_have_count(SHOWN_TILES)
    assert all(width > 0 for width in grid.locator("img").evaluate_all("images => images.map(one => one.naturalWidth)"))
    grid.get_by_label("True class").select_option(CLASSES[2])
    grid.get_by_label("confidence from").fill("0.5")
    grid.get_by_label("to", exact=True).fill("0.9")
    expect(grid.get_by_role("status")).to_have_text("10 of 10 shown")
    for text in tiles.all_inner_texts():
        assert f"target: {CLASSES[2]}" in text
        assert 0.5 <= float(re.findall(r"confidence: ([\d.]+)", text)[0]) <= 0.9
    grid.get_by_role("button", name="Show all").click()
    grid.get_by_role("button", name="Show more").click()
    grid.get_by_role("button", name="Show more").click()
    expect(tiles).to_have_count(60)
    expect(grid.get_by_text("not embedded in this page")).to_have_count(10)
    expect(grid.get_by_role("button", name="Show more")).to_be_hidden()


def test_a_cell_of_the_matrix_shows_its_mistakes(tab: Tab) -> None:
    grid = tab.locator(".gallery")
    grid.locator("summary").click()
    expect(grid).not_to_have_attribute("open", "")
    cell = tab.locator("table.matrix tbody tr").nth(2).get_by_role("button").last
    cell.focus()
    expect(tab.get_by_role("tooltip")).to_have_text(f"{CLASSES[2]} → {CLASSES[3]}: 10")
    tab.keyboard.press("Enter")
    expect(grid.get_by_label("True class")).to_have_value(CLASSES[2])
    expect(grid.get_by_label("Predicted class")).to_have_value(CLASSES[3])
    expect(grid.locator(".tile")).to_have_count(10)
    expect(grid).to_be_in_viewport()
    assert all(f"predicted: {CLASSES[3]}" in text for text in grid.locator(".tile").all_inner_texts())


def hover(target: Locator) -> None:
    """Move the pointer onto a part of a chart, once the page has come to rest: scrolling takes the text away."""
    target.scroll_into_view_if_needed()
    target.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    target.hover(force=True)


def test_charts_say_their_values_under_the_pointer(tab: Tab) -> None:
    tip = tab.get_by_role("tooltip")
    chart = tab.get_by_role("img", name="loss")
    hover(chart)
    box = chart.bounding_box()
    assert box is not None
    left, _, right, _ = map(float, (chart.get_attribute("data-frame") or "").split())
    width = float((chart.get_attribute("viewBox") or "").split()[2])
    at = box["x"] + (left + (right - left) * 0.5) / width * box["width"]  # 5 of 10 epochs
    tab.mouse.move(at, box["y"] + box["height"] / 2)
    expect(tip).to_have_text(re.compile(r"val/loss: (2|1\.99\d?|2\.00\d?) at 5\s*train/loss: 1\.(6|59\d?|60\d?) at 5"))
    tab.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    hover(tab.locator("circle.dot").first)
    expect(tip).to_have_text(re.compile(r": photos/\d{3}\.jpg$"))
    hover(tab.locator("rect.bar").first)
    expect(tip).to_have_text(re.compile(r"confidence 0\.\d+, accuracy 0\.\d+; \d+ samples"))


def test_a_class_is_highlighted_on_the_map(tab: Tab) -> None:
    tab.get_by_label("Highlight").select_option(label=CLASSES[0])
    dimmed = tab.locator("circle.dot.dim")
    expect(dimmed).to_have_count(45)
    tab.get_by_label("Highlight").select_option(label="all")
    expect(dimmed).to_have_count(0)


def luminance(tab: Tab) -> float:
    colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@pytest.mark.parametrize("tab", [{"color_scheme": "dark"}], indirect=True)
def test_light_and_dark_follow_the_system_and_the_button(tab: Tab) -> None:
    assert luminance(tab) < 60
    tab.get_by_role("button", name="Light").click()
    assert luminance(tab) > 200
    tab.reload()
    assert luminance(tab) > 200
    tab.get_by_role("button", name="Dark").click()
    assert luminance(tab) < 60


@pytest.mark.parametrize("tab", [{"viewport": DESK}, {"viewport": PHONE}], indirect=True, ids=["desk", "phone"])
def test_nothing_is_cut_off_at_any_width(tab: Tab, tmp_path: Path) -> None:
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tab.screenshot(path=tmp_path / "page.png", full_page=True)
    box = tab.get_by_role("region", name="classes")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")  # it has more columns than any window
    before = box.locator("tbody th").first.bounding_box()
    box.evaluate("box => box.scrollTo(400, 300)")
    row = box.locator("tbody th").nth(12).bounding_box()
    head, edges = box.locator("thead th").first.bounding_box(), box.bounding_box()
    assert before is not None
    assert row is not None
    assert head is not None
    assert edges is not None
    assert row["x"] == before["x"]  # names stay
    assert head["y"] == pytest.approx(edges["y"], abs=2)  # and so do headings
    # What is visible of the page lies within it, unless a box of its own scrolls it.
    beyond = tab.evaluate(
        """() => [...document.querySelectorAll("main *")].filter(one => !one.closest(".scroll, pre, nav")
             && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 80))"""
    )
    assert beyond == []


def test_the_summary_fits_the_screen(tab: Tab) -> None:
    box = tab.locator("#summary").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= DESK["height"]


def test_paper_has_everything_and_no_controls(tab: Tab, tmp_path: Path) -> None:
    printed = tab.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert tab.locator("details:not([open])").count() == 0
    assert tab.locator(".table", has=tab.get_by_text("classes", exact=True)).locator("tbody tr").count() == N
    tab.emulate_media(media="print", color_scheme="dark")
    assert luminance(tab) in (0, 255)  # nothing, or white
    for hidden in ("nav", ".controls", ".filters", "#theme"):
        assert not any(one.is_visible() for one in tab.locator(hidden).all())
    assert tab.evaluate(
        "[...document.querySelectorAll('.scroll')].every(box => getComputedStyle(box).overflow === 'visible')"
    )
    ink = tab.evaluate("getComputedStyle(document.querySelector('h1')).color")
    assert sum(map(int, re.findall(r"\d+", ink)[:3])) < 200  # dark on white, whatever the screen has


@pytest.mark.parametrize("tab", [{"java_script_enabled": False}], indirect=True)
def test_without_a_script_the_page_shows_its_first_rows_and_images(tab: Tab) -> None:
    assert tab.locator(".tile img").count() == SHOWN_TILES
    assert tab.locator(".table").last.locator("tbody tr").count() == SHOWN_ROWS
    assert not any(one.is_visible() for one in tab.locator("select, input, #theme").all())


def test_texts_are_texts(tab: Tab) -> None:
    expect(tab).to_have_title(CLASSES[1])
    assert tab.evaluate("window.hacked") is None
    expect(tab.get_by_role("heading", level=1)).to_have_text(CLASSES[1])
    expect(tab.locator("table.matrix tbody th").nth(2)).to_have_text(CLASSES[2])


def test_a_script_that_got_in_is_refused(browser: Browser, address: str) -> None:
    with browser.new_context() as context:
        tab = context.new_page()
        tab.goto(address)
        refused = tab.evaluate(
            """() => new Promise(done => {
                 addEventListener("securitypolicyviolation", event => done(event.violatedDirective));
                 const script = document.createElement("script");
                 script.textContent = "window.hacked = 1";
                 document.head.append(script);
                 setTimeout(() => done(""), 5000); })"""
        )
        assert refused.startswith("script-src")
        assert tab.evaluate("window.hacked") is None


@pytest.mark.parametrize("tab", [{}, {"color_scheme": "dark", "viewport": PHONE}], indirect=True, ids=["desk", "phone"])
def test_axe_finds_nothing(tab: Tab) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    found = axe.Axe().run(tab)
    assert found.violations_count == 0, found.generate_report()
