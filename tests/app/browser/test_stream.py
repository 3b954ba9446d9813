"""Requests and answers of a page when the network is slow: each counts, in order, and none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import gradio as gr
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.security import DATA, JOIN
from app.server import blocks_of, build_app
from app.state.context import AppContext
from tests.app.conftest import fresh_page
from tests.app.running import serving

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

Chosen = Callable[[str, bytes], bool]


class SlowNetwork:
    """ASGI middleware that holds a message of the server: the first one that is chosen by its path and body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._chosen: Chosen | None = None
        self.holding = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def slowly(message: Message) -> None:
            body = message.get("body", b"")
            if self._chosen is not None and self._chosen(scope["path"], body):
                self._chosen, self.holding = None, True
                while self.holding:
                    await asyncio.sleep(0.01)
            await send(message)

        await self._app(scope, receive, slowly)

    @contextmanager
    def hold(self, chosen: Chosen) -> Iterator[None]:
        """Holds it until the block ends."""
        self._chosen = chosen
        try:
            yield
        finally:
            self._chosen, self.holding = None, False


def letters(_: AppContext) -> None:
    """Two buttons; the page shows which were pressed."""
    pressed, shown = gr.State(""), gr.HTML("nothing", elem_id="shown")
    for letter in "ab":

        def press(before: str, letter: str = letter) -> tuple[str, str]:
            return before + letter, before + letter

        gr.Button(letter, elem_id=letter).click(
            press, pressed, [pressed, shown], trigger_mode="multiple", concurrency_limit=1, concurrency_id="letters"
        )


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[SlowNetwork, str]]:
    context = AppContext({}, {})
    network = SlowNetwork(build_app(context, blocks=lambda given: blocks_of(given, [("Letters", letters)])))
    with serving(network, context) as server:
        yield network, server.url


@pytest.fixture
def network(served: tuple[SlowNetwork, str]) -> SlowNetwork:
    return served[0]


@pytest.fixture
def page(browser: Browser, served: tuple[SlowNetwork, str]) -> Iterator[Page]:
    for page in fresh_page(browser, served[1]):
        page.goto("/")
        page.locator("#a").click()
        expect(page.locator("#shown")).to_contain_text("a")
        yield page


def test_an_answer_before_the_reply_to_its_request_is_not_shown_over_later_ones(
    page: Page, network: SlowNetwork
) -> None:
    with network.hold(lambda path, body: path == JOIN and b"event_id" in body):
        page.locator("#a").click()
        wait_until(page, lambda: network.holding)
        page.locator("#b").click()
        page.wait_for_timeout(500)
    page.wait_for_timeout(300)
    expect(page.locator("#shown")).to_contain_text("aab")


def test_requests_arrive_in_their_order(page: Page) -> None:
    held: list[Route] = []
    page.route(f"**{JOIN}*", lambda route: route.continue_() if held else held.append(route))
    page.locator("#a").click()
    wait_until(page, lambda: bool(held))
    page.locator("#b").click()
    page.wait_for_timeout(300)
    held[0].continue_()
    expect(page.locator("#shown")).to_contain_text("aab")


def test_a_request_that_crosses_the_end_of_the_stream_is_answered(page: Page, network: SlowNetwork) -> None:
    with network.hold(lambda path, body: path == DATA and b'"close_stream"' in body):
        page.locator("#a").click()
        wait_until(page, lambda: network.holding)
        page.locator("#b").click()
        page.wait_for_timeout(300)
    expect(page.locator("#shown")).to_contain_text("aab")


def wait_until(page: Page, reached: Callable[[], bool]) -> None:
    for _ in range(3000):
        if reached():
            return
        page.wait_for_timeout(20)
    raise AssertionError("it did not happen within a minute")
