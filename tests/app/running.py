"""A server in a thread of the test's own process, a browser on it, and a reader of HTML."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import uvicorn
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from app.state.context import AppContext

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PATIENCE = 60_000
"""Milliseconds that the browser waits for what has to appear; it appears at once unless the machine is busy."""


@dataclass(frozen=True)
class Served:
    """A server that listens.

    Attributes:
        url: without a slash at the end.
    """

    url: str


class HtmlPage(HTMLParser):
    """Elements of well-formed HTML with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "img":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, css_class: str = "") -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag and css_class in (found.get("class") or "")]


@contextmanager
def serving(app: ASGIApp, context: AppContext) -> Iterator[Served]:
    """Serves an application on a free port of this machine while the block runs."""
    from app.server import server_config

    with running(server_config(app, context)) as served:
        yield served


@contextmanager
def running(config: uvicorn.Config) -> Iterator[Served]:
    """Runs a server on a free port of this machine while the block runs."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server ended before it began"
            time.sleep(0.01)
        try:
            yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(timeout=10)


def chromium() -> Path | None:
    """The browser of this machine: ``$VITRAIL_CHROMIUM``, else Debian's."""
    path = Path(os.environ.get("VITRAIL_CHROMIUM", "/usr/bin/chromium"))
    return path if path.is_file() else None


@contextmanager
def opened_browser() -> Iterator[Browser]:
    """A browser without a window; the test is skipped where there is none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    path = chromium()
    if path is None:
        pytest.skip("no browser: `make browser` installs Debian's, or name one with VITRAIL_CHROMIUM")
    playwright.expect.set_options(timeout=PATIENCE)
    with playwright.sync_playwright() as driver:
        # Without a sandbox of its own, which a container does not allow; it only sees pages of this test.
        # Its camera shows a test image, and there is no prompt for permission.
        camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", *camera]
        browser = driver.chromium.launch(executable_path=str(path), args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def reverse_proxy(target: str, prefix: str, *, keeps_prefix: bool = False, keeps_host: bool = True) -> ASGIApp:
    """A reverse proxy that serves another server below a prefix, as nginx and Traefik may be set up.

    Args:
        target: URL of the server behind.
        prefix: such as ``/vitrail``.
        keeps_prefix: whether the server behind is asked for the path with it.
        keeps_host: whether the server behind learns the ``Host`` that the browser asked for.
    """

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        asked = Request(scope, receive)
        if not scope["path"].startswith(prefix):
            await PlainTextResponse("not proxied", 502)(scope, receive, send)
            return
        path = scope["path"] if keeps_prefix else scope["path"].removeprefix(prefix)
        headers = [(key, value) for key, value in asked.headers.items() if key not in {"connection", "content-length"}]
        if not keeps_host:
            headers = [(key, value) for key, value in headers if key != "host"]
        client = httpx.AsyncClient(base_url=target, timeout=60)
        query = f"?{asked.url.query}" if asked.url.query else ""
        body = await asked.body()
        request = client.build_request(asked.method, path + query, headers=headers, content=body)
        answer = await client.send(request, stream=True)

        async def end() -> None:
            await answer.aclose()
            await client.aclose()

        response = StreamingResponse(answer.aiter_raw(), answer.status_code, background=BackgroundTask(end))
        response.raw_headers = [(key.lower(), value) for key, value in answer.headers.raw]
        await response(scope, receive, send)

    return proxy
