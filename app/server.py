"""The whole application: four tabs in one page, the route of the images, and the guard in front of both."""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

# Gradio reads these when it is imported: nothing is reported to its makers, and no newer version is looked for.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Nor are there statistics of calls, which Gradio would compute with pandas after each of them.
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(2**62)
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.security import Guard, own_names
from app.state.context import AppContext
from app.widgets.page import add_images
from vitrail.errors import UserError

Builder = Callable[[AppContext], None]

_LOGGER = logging.getLogger("vitrail.app")
_STATIC = Path(__file__).parent / "static"
_HOUR = 3600

# Blue that white text can be read on.
_THEME = gr.themes.Default(
    primary_hue="blue",
    neutral_hue="zinc",
).set(
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    body_text_color_subdued="*neutral_500",
    body_text_color_subdued_dark="*neutral_400",
)


def build_blocks(context: AppContext) -> gr.Blocks:
    """Lay out the page with its four tabs."""
    from app.tabs.classify import build as classify
    from app.tabs.classify import build_zero_shot as zero_shot
    from app.tabs.explore import build as explore
    from app.tabs.search import build as search

    return blocks_of(
        context, [("Classify", classify), ("Zero-shot", zero_shot), ("Search", search), ("Explore", explore)]
    )


def blocks_of(context: AppContext, tabs: Sequence[tuple[str, Builder]]) -> gr.Blocks:
    """Lay out a page with tabs, each a title and what builds it; links name it by its title (``?tab=zero-shot``)."""
    names = [title.lower() for title, _ in tabs]

    def choose(request: gr.Request) -> Any:
        asked = str(request.query_params.get("tab", "")).lower()
        # Without one the first tab is open already, or the one that was chosen by now.
        return gr.Tabs(selected=asked) if asked in names else gr.skip()

    # What was uploaded is removed after a day; while the page is open it is still needed.
    blocks = gr.Blocks(title="Vitrail", analytics_enabled=False, delete_cache=(_HOUR, 24 * _HOUR))
    with blocks:
        gr.HTML(_masthead(context), elem_id="masthead", apply_default_css=False, js_on_load=None)
        with gr.Tabs(elem_id="tabs", selected=names[0]) as chosen:
            for name, (title, build) in zip(names, tabs, strict=True):
                with gr.Tab(title, id=name, elem_id=f"tab-{name}"):
                    build(context)
        blocks.load(choose, outputs=chosen, show_progress="hidden")
    for function in blocks.fns.values():
        # Without the queue there would be no bound; and nothing of the page is offered as a programming interface.
        function.queue = function.queue or function.fn is not None
        function.api_visibility = "private"
    limits = context.limits
    blocks.queue(max_size=limits.queue, default_concurrency_limit=limits.at_once, api_open=False)
    return blocks


def build_app(
    context: AppContext,
    *,
    host: str = "127.0.0.1",
    allowed: Sequence[str] = (),
    prefix: str = "",
    blocks: Callable[[AppContext], gr.Blocks] = build_blocks,
) -> ASGIApp:
    """Make the whole application.

    Args:
        context: what is served.
        host: that the server binds to.
        allowed: further names that people reach it by, such as a reverse proxy's.
        prefix: path below which a reverse proxy serves it, such as ``/vitrail``.
        blocks: what builds the page.
    """
    uploads = _upload_folder()
    app = FastAPI(title="Vitrail", docs_url=None, redoc_url=None, openapi_url=None)
    # Before the page, which handles all other paths.
    add_images(app, context)
    app.get("/pending")(lambda: {"line": context.pending.line if context.pending else ""})
    page = blocks(context)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        root_path=prefix or None,
        server_name=host,
        footer_links=[],
        run_history=False,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        allowed_paths=[],
        blocked_paths=[str(Path.cwd()), str(Path.home())],
        show_error=True,
        max_file_size=context.limits.upload_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=_THEME,
        css_paths=sorted(_STATIC.glob("*.css")),
        head="".join(f"<script>{path.read_text(encoding='utf-8')}</script>" for path in sorted(_STATIC.glob("*.js"))),
    )
    functions = (number for number, function in page.fns.items() if function.fn is not None)
    return Guard(app, context.limits, uploads, functions, own_names(host), allowed=allowed, prefix=prefix)


def serve(
    context: AppContext,
    listening: socket.socket,
    host: str = "127.0.0.1",
    *,
    allowed: Sequence[str] = (),
    prefix: str = "",
) -> None:
    """Serve the application on a bound socket until it is interrupted; for the others see ``build_app``."""

    def build(context: AppContext) -> ASGIApp:
        return build_app(context, host=host, allowed=allowed, prefix=prefix)

    app = Growing(build(context))
    if context.pending is not None:
        threading.Thread(target=app.grow, args=(context, build), daemon=True).start()
    uvicorn.Server(server_config(app, context)).run(sockets=[listening])


class Growing:
    """An application that another one takes the place of when there is more to be served.

    Args:
        app: that is served until then.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._next: tuple[ASGIApp, Callable[[], None]] | None = None
        self._lifespans: list[asyncio.Task[None]] = []

    def grow(self, context: AppContext, build: Callable[[AppContext], ASGIApp]) -> None:
        """Complete what is pending, and serve it from the next request on; pages that are open load themselves again.

        Args:
            context: that is served now.
            build: makes an application.
        """
        pending = context.pending
        assert pending is not None

        def report(line: str) -> None:
            pending.line = line

        try:
            app = build(dataclasses.replace(pending.complete(report), limits=context.limits, pending=None))
        except UserError as error:
            _LOGGER.error("%s", error)
            report("failed; the reason is in the terminal")
        else:
            self._next = (app, lambda: report(""))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the newest application."""
        if self._next is not None and scope["type"] == "http":
            (app, served), self._next = self._next, None
            await self._start(app)
            self._app = app
            served()
        await self._app(scope, receive, send)

    async def _start(self, app: ASGIApp) -> None:
        """Do what a server does before the first request: Gradio's queue begins to work then."""
        started, never = asyncio.Event(), asyncio.Event()

        async def receive() -> Message:
            if started.is_set():
                await never.wait()
            return {"type": "lifespan.startup"}

        async def send(_: Message) -> None:
            started.set()

        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self._lifespans.append(asyncio.create_task(_lifespan(app, scope, receive, send)))
        await started.wait()


async def _lifespan(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


def server_config(app: ASGIApp, context: AppContext) -> uvicorn.Config:
    """Bound the connections of the server, and how long it waits for open ones at the end."""
    return uvicorn.Config(
        app,
        log_level="warning",
        # Each open page holds two connections, and loads images over six.
        limit_concurrency=16 * context.limits.queue,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
        # The response does not name the server, and headers of proxies are not believed.
        server_header=False,
        proxy_headers=False,
    )


@cache
def _upload_folder() -> Path:
    """A folder of this process alone, removed at its end; Gradio's own would be shared with other applications."""
    folder = Path(tempfile.mkdtemp(prefix="vitrail-app-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    return folder


def _masthead(context: AppContext) -> str:
    runs, galleries = len(context.runs), len(context.galleries)
    models = f"{runs} {'model' if runs == 1 else 'models'}"
    served = f"{models} · {galleries} {'gallery' if galleries == 1 else 'galleries'}"
    pending = ""
    if context.pending is not None:
        pending = (
            '<p id="pending" role="status">Zero-shot and search by text are coming: a model of images and texts is '
            "being trained, <span>starting</span>. The page loads itself again then.</p>"
        )
    return f"<header><h1>Vitrail</h1><p>{served} · nothing leaves the machine that serves it</p>{pending}</header>"
