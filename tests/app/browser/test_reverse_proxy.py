"""The whole application behind a real reverse proxy with a name and a prefix of its own, for a client and a browser."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
import httpx
import pytest

from app.security import DATA, JOIN
from app.server import blocks_of, build_app
from app.state.context import AppContext
from app.widgets.page import Card, card_grid
from tests.app.conftest import fresh_page
from tests.app.explored_gallery import explored_gallery
from tests.app.running import reverse_proxy, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAME, PREFIX = "app.localhost", "/shop/vitrail"


def _tab(context: AppContext) -> None:
    """A card with its image, and a button that answers."""
    sample_id = context.gallery("explored").metadata.column("id")[0].as_py()
    card_grid([Card("explored", sample_id, "card", ["a line"])], elem_id="grid")
    said = gr.Textbox(label="Said")
    gr.Button("Ask").click(lambda: "answered", None, said)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> AppContext:
    return AppContext({}, {"explored": explored_gallery(tmp_path_factory.mktemp("proxied") / "gallery", "explored")})


@pytest.fixture(scope="module", params=[False, True], ids=["prefix removed", "prefix left"])
def proxied(context: AppContext, request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of the page, by the proxy's name."""
    app = build_app(context, allowed=[NAME], prefix=PREFIX, blocks=lambda served: blocks_of(served, [("Trial", _tab)]))
    with ExitStack() as stack:
        behind = stack.enter_context(serving(app, context))
        proxy = stack.enter_context(serving(reverse_proxy(behind.url, PREFIX, keeps_prefix=request.param), context))
        yield f"{proxy.url.replace('127.0.0.1', NAME)}{PREFIX}"


def test_a_client_gets_the_page_its_images_and_answers(proxied: str) -> None:
    url = httpx.URL(proxied)
    own = {"host": f"{NAME}:{url.port}", "origin": f"http://{NAME}:{url.port}", "x-forwarded-host": "evil.example"}
    with httpx.Client(base_url=url.copy_with(host="127.0.0.1"), headers=own, timeout=60) as client:
        page = client.get("/")
        assert page.status_code == 200
        assert "evil.example" not in page.text
        config = client.get("/config").json()
        assert httpx.URL(config["root"]).path == PREFIX
        (grid,) = [part for part in config["components"] if "images?" in json.dumps(part["props"])]
        assert ' src="/images' not in str(grid)
        (asked,) = [one for one in config["dependencies"] if one["targets"][0][1] == "click"]
        session = uuid.uuid4().hex
        joined = client.post(JOIN, json={"fn_index": asked["id"], "data": [], "session_hash": session})
        assert joined.status_code == 200, joined.text
        with client.stream("GET", DATA, params={"session_hash": session}) as stream:
            assert any("answered" in line for line in stream.iter_lines())


@pytest.mark.slow
def test_a_browser_does_too(proxied: str, browser: Browser) -> None:
    url = httpx.URL(proxied)
    for page in fresh_page(browser, f"http://{NAME}:{url.port}"):
        page.goto(f"{PREFIX}/")
        page.wait_for_function("document.querySelector('#grid img')?.naturalWidth > 0")
        page.get_by_role("button", name="Ask").click()
        page.wait_for_function("document.querySelector('textarea, input[type=text]')?.value === 'answered'")


def test_without_the_options_it_says_which_are_missing(
    context: AppContext, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    app = build_app(context, blocks=lambda served: blocks_of(served, [("Trial", _tab)]))
    with serving(app, context) as behind:
        with serving(reverse_proxy(behind.url, PREFIX, keeps_prefix=True, keeps_host=False), context) as proxy:
            refused = httpx.get(f"{proxy.url}{PREFIX}/")
            assert (refused.status_code, "--root-path /shop" in refused.text) == (404, True)
            assert f"--root-path {PREFIX}" in httpx.get(f"{proxy.url}{PREFIX}/config").text
        with serving(reverse_proxy(behind.url, PREFIX, keeps_host=False), context) as proxy:
            refused = httpx.post(f"{proxy.url}{PREFIX}{JOIN}", json={}, headers={"origin": f"http://{NAME}"})
            assert (refused.status_code, f"--allow-host {NAME}" in refused.text) == (403, True)
        refused = httpx.get(f"{behind.url}/", headers={"host": NAME})
        assert (refused.status_code, f"--allow-host {NAME}" in refused.text) == (421, True)
    assert caplog.text.count("--allow-host") == 2
