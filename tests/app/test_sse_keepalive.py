"""The stream of a page outlives its single requests: none that crosses the end of a stream is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import gradio as gr
import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message, Scope

from app.sse_keepalive import DATA, JOIN, LastingStreams
from app.state.context import AppContext
from tests.app.running import serving

T = TypeVar("T")
WAIT = 30


def played(scenario: Coroutine[Any, Any, T]) -> T:
    """What a scenario gives, played in a thread of its own: a browser of other tests may hold this one's loop."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, scenario).result()


class GradioPage:
    """The stream as Gradio's server writes it, without the waiting; requests are ``(session, event)``."""

    def __init__(self) -> None:
        self.pending: list[str] = []
        self.streams = 0

    async def __call__(self, scope: Scope, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        async def answer(kind: str, *parts: bytes) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]})
            for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        if scope["path"] == JOIN:
            event = json.loads((await receive())["body"])["event"]
            self.pending.append(event)
            await answer("application/json", json.dumps({"event_id": event}).encode())
            return
        self.streams += 1
        parts = [sent("process_completed", event) for event in self.pending]
        self.pending.clear()
        await answer("text/event-stream", *parts, sent("close_stream", None))


def sent(message: str, event: str | None) -> bytes:
    return b"data: " + json.dumps({"msg": message, "event_id": event}, separators=(",", ":")).encode() + b"\n\n"


class Browser:
    """What a page sends and hears."""

    def __init__(self, app: LastingStreams) -> None:
        self.app = app
        self.heard: asyncio.Queue[bytes] = asyncio.Queue()
        self.starts = 0
        self.gone = asyncio.Event()

    async def join(self, event: str, session: str = "s") -> None:
        body = json.dumps({"event": event, "session_hash": session}).encode()

        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            """The answer only has to come."""

        await self.app({"type": "http", "path": JOIN, "query_string": b""}, receive, send)

    async def listen(self, session: str = "s") -> None:
        async def receive() -> Message:
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            self.starts += message["type"] == "http.response.start"
            if message.get("body"):
                self.heard.put_nowait(message["body"])

        await self.app(
            {"type": "http", "path": DATA, "query_string": f"session_hash={session}".encode()}, receive, send
        )

    async def hear(self) -> bytes:
        return await asyncio.wait_for(self.heard.get(), WAIT)


def test_a_request_after_the_last_answer_is_answered_on_the_same_stream() -> None:
    async def scenario() -> None:
        inner = GradioPage()
        page = Browser(LastingStreams(inner, seconds=WAIT))
        await page.join("first")
        listening = asyncio.create_task(page.listen())
        assert await page.hear() == sent("process_completed", "first")
        # Gradio has ended its stream by now; the page was not told, and does not open another one.
        await page.join("second")
        assert await page.hear() == sent("process_completed", "second")
        assert page.starts == 1
        assert inner.streams == 2
        page.gone.set()
        await asyncio.wait_for(listening, WAIT)

    played(scenario())


def test_a_stream_with_nothing_to_say_ends_and_the_page_is_told() -> None:
    async def scenario() -> None:
        page = Browser(LastingStreams(GradioPage(), seconds=0.01))
        await page.join("first")
        await asyncio.wait_for(page.listen(), WAIT)
        assert [await page.hear(), await page.hear()] == [
            sent("process_completed", "first"),
            sent("close_stream", None),
        ]
        await page.join("second")
        await asyncio.wait_for(page.listen(), WAIT)
        assert await page.hear() == sent("process_completed", "second")

    played(scenario())


def test_requests_of_other_pages_do_not_keep_it_open() -> None:
    async def scenario() -> None:
        inner = GradioPage()
        app = LastingStreams(inner, seconds=0.2)
        page, other = Browser(app), Browser(app)
        await page.join("first")
        listening = asyncio.create_task(page.listen())
        await page.hear()
        await other.join("of another", session="t")
        await asyncio.wait_for(listening, WAIT)
        assert inner.streams == 1

    played(scenario())


def test_a_page_that_is_gone_leaves_nothing() -> None:
    async def scenario() -> None:
        app = LastingStreams(GradioPage(), seconds=WAIT)
        page = Browser(app)
        await page.join("first")
        listening = asyncio.create_task(page.listen())
        await page.hear()
        page.gone.set()
        await asyncio.wait_for(listening, WAIT)
        assert not app._streams

    played(scenario())


def test_another_end_goes_through_as_it_is() -> None:
    async def broken(scope: Scope, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b'{"detail":"Not Found"}', "more_body": False})

    async def scenario() -> bytes:
        page = Browser(LastingStreams(broken, seconds=WAIT))
        await asyncio.wait_for(page.listen(), WAIT)
        return await page.hear()

    assert json.loads(played(scenario())) == {"detail": "Not Found"}


@pytest.fixture
def doubling() -> FastAPI:
    """Gradio itself, with one function."""
    with gr.Blocks() as blocks:
        number = gr.Number()
        gr.Button().click(lambda given: 2 * given, number, number)
    app = FastAPI()
    gr.mount_gradio_app(app, blocks, path="/", ssr_mode=False)
    return app


def test_gradio_answers_two_requests_on_one_stream(doubling: FastAPI) -> None:
    limits = AppContext({}, {})
    with serving(LastingStreams(doubling), limits) as served, httpx.Client(base_url=served.url, timeout=WAIT) as client:
        ask = {"fn_index": 0, "session_hash": "s"}
        assert client.post(JOIN, json={**ask, "data": [21]}).status_code == 200
        with client.stream("GET", DATA, params={"session_hash": "s"}) as stream:
            lines = (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))
            completed = (message for message in lines if message["msg"] in {"process_completed", "close_stream"})
            assert next(completed)["output"]["data"] == [42]
            client.post(JOIN, json={**ask, "data": [4]})
            assert next(completed)["output"]["data"] == [8]
