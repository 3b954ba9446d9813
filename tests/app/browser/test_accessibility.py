"""What a screen reader or weak eyes stumble over, found by axe-core in every tab, in light and dark."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from app.state.context import AppContext
from app.widgets.page import example_ids

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

if TYPE_CHECKING:
    from playwright.sync_api import Page

TABS = {
    "classify": ("?tab=classify&gallery=quickstart&image={image}", "#classify-predictions button.bar"),
    "zero-shot": (
        "?tab=zero-shot&labels=mug,cap,lamp&gallery=quickstart&image={image}",
        "#zero-shot-examples button.card",
    ),
    "search": ("?tab=search&gallery=pairs&q=blue+mug", "#search-grid button.card"),
    "grid": ("?tab=explore&gallery=quickstart", "#explore-grid button.card"),
    "image": ("?tab=explore&gallery=quickstart&view=One+image&image={image}", "#explore-right input"),
}
"""Addresses below the application's, and what is there once they are loaded."""

GRADIOS_OWN = {"nested-interactive": 'aria-label="Click to Upload"'}
"""Findings in what Gradio renders: a file input inside of the button that opens it."""

VISITS = [
    *(pytest.param("page", tab, marks=() if tab == "classify" else pytest.mark.slow) for tab in TABS),
    *(pytest.param("phone", tab, marks=() if tab == "grid" else pytest.mark.slow) for tab in TABS),
]


@pytest.mark.parametrize(("window", "tab"), VISITS)
def test_axe_finds_nothing_serious(window: str, tab: str, request: pytest.FixtureRequest, context: AppContext) -> None:
    """On a desk in light, on a phone in dark."""
    page: Page = request.getfixturevalue(window)
    address, shown = TABS[tab]
    page.goto("/" + address.format(image=example_ids(context.gallery("quickstart"))[0]))
    page.locator(shown).first.wait_for()
    found = [
        f"{one['id']} ({one['impact']}): {node['html'][:200]} {node['failureSummary']}"
        for one in axe.Axe().run(page).response["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
        if GRADIOS_OWN.get(one["id"], "\n") not in node["html"]
    ]
    assert found == []
