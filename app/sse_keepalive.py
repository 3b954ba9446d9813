"""Keeps the stream that answers come by open between two requests of a page, so that none of them is lost.

Gradio ends the stream of a page (server-sent events) whenever nothing of the page is pending, and the page opens
another one for its next request. A request that is on its way while the end is on its way the other way is lost: the
page, which has not seen the end, waits for its answer on a stream that nobody writes to any more. That happens when
somebody presses a key as soon as an answer is there, the more often the busier the machine is. Here the end is held
back for a while; a request that comes meanwhile is answered by the same stream, which also saves the opening of
another one.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.datastructures import QueryParams
from starlette.types import ASGIApp, Message, Receive, Scope, Send

JOIN, DATA = "/gradio_api/queue/join", "/gradio_api/queue/data"

_CLOSE = b'data: {"msg":"close_stream"'
_COMPLETED = b'data: {"msg":"process_completed"'


class _Stream:
    """Of one page: what it waits for."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self._joined: set[str] = set()
        self._early: set[str] = set()

    def join(self, event: str) -> None:
        """A request of the page is in the queue; its answer may have been quicker than this message."""
        if event in self._early:
            self._early.remove(event)
        else:
            self._joined.add(event)
            self.changed.set()

    def complete(self, event: str) -> None:
        """Its answer went out."""
        if event in self._joined:
            self._joined.remove(event)
        else:
            self._early.add(event)

    @property
    def waits(self) -> bool:
        """Whether a request was not answered yet."""
        return bool(self._joined)


class LastingStreams:
    """ASGI middleware.

    Args:
        app: what Gradio's page is mounted in.
        seconds: how long a stream is kept with nothing to say. Each holds one of the six connections that a browser
            makes to a server, hence not for ever.
    """

    def __init__(self, app: ASGIApp, seconds: float = 10.0) -> None:
        self._app = app
        self._seconds = seconds
        self._streams: dict[str, _Stream] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes everything on; streams are kept."""
        path = scope["path"].rstrip("/") if scope["type"] == "http" else ""
        if path == JOIN:
            await self._join(scope, receive, send)
        elif path == DATA:
            await self._stream(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _join(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked, answered = bytearray(), bytearray()

        async def seen() -> Message:
            message = await receive()
            asked.extend(message.get("body", b""))
            return message

        async def told(message: Message) -> None:
            answered.extend(message.get("body", b""))
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                # Before the page knows: it may ask for the answer at once.
                stream = self._streams.get(str(_object(asked).get("session_hash")))
                event = _object(answered).get("event_id")
                if stream is not None and event:
                    stream.join(str(event))
            await send(message)

        await self._app(scope, seen, told)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = QueryParams(scope["query_string"]).get("session_hash", "")
        stream = self._streams[session] = _Stream()
        begun, end = False, b""

        async def told(message: Message) -> None:
            nonlocal begun, end
            body = message.get("body", b"")
            if message["type"] == "http.response.start":
                if begun:
                    return
                begun = True
            elif body.startswith(_CLOSE):
                end = body
                return
            elif end and not message.get("more_body", False):
                return
            elif body.startswith(_COMPLETED):
                stream.complete(str(_object(body.removeprefix(b"data: ")).get("event_id")))
            await send(message)

        try:
            while True:
                end = b""
                await self._app(scope, receive, told)
                if not end:  # It ended in another way, which the page was told.
                    return
                if not await self._asked_again(stream, receive):
                    break
        finally:
            if self._streams.get(session) is stream:
                del self._streams[session]
        await send({"type": "http.response.body", "body": end, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _asked_again(self, stream: _Stream, receive: Receive) -> bool:
        """Waits for the next request of a page; False when none comes, or the page is gone."""
        if stream.waits:
            return True
        stream.changed.clear()
        asked = asyncio.create_task(stream.changed.wait())
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({asked, gone}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            return asked.done() and not gone.done()
        finally:
            asked.cancel()
            gone.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _object(body: bytes | bytearray) -> dict[str, Any]:
    """JSON that ought to be an object; an empty one where it is not."""
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
