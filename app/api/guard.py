"""What no request to the API passes: foreign callers, wrong tokens, floods and bodies without a bound; and metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.security import Body, Callers, RefusedError, own_names
from app.state.context import Limits

OPEN = ("/health", "/docs", "/openapi.json")
"""Paths that need no token: they hold nothing of the model or the data."""

_STATIC = "/static-offline-docs/"
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_BODY_SECONDS = 60.0
"""Until a body has to be there: a slow sender would keep others out."""

_CALLERS = 10_000
"""Addresses whose rate is remembered."""

_logger = logging.getLogger("vitrail.api")


@dataclass(frozen=True)
class Settings:
    """How the API is served.

    Attributes:
        host: that the server binds to.
        token: that requests have to have; empty for none.
        allowed: further names that the server is reached by.
        rate: requests a second of one address; 0 for any number.
        queue: requests that wait or run at the same time.
        batch: images that pass through the model together.
        limits: of one request.
    """

    host: str = "127.0.0.1"
    token: str = ""
    allowed: Sequence[str] = ()
    rate: float = 100.0
    queue: int = 64
    batch: int = 16
    limits: Limits = field(default_factory=Limits)


class Metrics:
    """What ``/metrics`` reports, of this server alone."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second number for each, of when it was made
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vitrail_requests", "Requests by endpoint and status.", ("endpoint", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "vitrail_request_seconds", "Seconds from request to response.", ("endpoint",), registry=self.registry
        )
        self.running = Gauge("vitrail_requests_running", "Requests that wait or run.", registry=self.registry)
        self.waiting = Gauge("vitrail_images_waiting", "Images that wait for the model.", registry=self.registry)
        self.batches = Histogram(
            "vitrail_batch_images",
            "Images that passed through the model together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )


class ApiGuard:
    """ASGI middleware in front of the endpoints.

    Args:
        app: the application behind it.
        settings: limits, token and names.
        metrics: that it counts.
        paths: of the endpoints.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._paths = set(paths)
        self._callers = Callers(own_names(settings.host), settings.allowed)
        self._rate = _Rate(settings.rate)
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with one line."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        begin, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        body = _TimedBody(receive)
        try:
            await self._guarded(scope, body, counted)
        except RefusedError as refused:
            if status == 0:
                await body.drain(2**20)
                await error_response(refused.status, refused.line)(scope, receive, counted)
        except Exception:
            _logger.exception("%s %s", scope["method"], scope["path"])
            if status == 0:
                line = "internal error; the reason is in the server's log"
                await error_response(HTTPStatus.INTERNAL_SERVER_ERROR, line)(scope, receive, counted)
        finally:
            endpoint = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.seconds.labels(endpoint).observe(time.perf_counter() - begin)

    async def _guarded(self, scope: Scope, body: _TimedBody, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        self._check_caller(headers, path)
        if scope["method"] != "POST":
            await self._app(scope, body, send)
            return
        client = scope.get("client") or ("", 0)
        if wait := self._rate.wait(client[0]):
            line = f"more than {self._settings.rate:g} requests a second; try again in {wait:.1f} s"
            raise RefusedError(HTTPStatus.TOO_MANY_REQUESTS, line)
        if self._running >= self._settings.queue:
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests are waiting; try again later")
        if path in self._paths and not headers.get("content-type", "").lower().startswith(_FORMS):
            line = "the body must be a form (multipart/form-data), such as of curl -F images=@photo.jpg"
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, line)
        body.limit = self._settings.limits.request_bytes
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > body.limit:
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"larger than {body.limit / 2**20:g} MiB")
        self._running += 1
        self._metrics.running.set(self._running)
        try:
            await self._app(scope, body, send)
        finally:
            self._running -= 1
            self._metrics.running.set(self._running)

    def _check_caller(self, headers: Headers, path: str) -> None:
        """With a token it alone decides; without one a web page that a person has open must not get through."""
        if not self._settings.token:
            self._callers.check(headers)
            return
        if path in OPEN or path.startswith(_STATIC):
            return
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self._settings.token.encode()):
            line = "needs the server's token: Authorization: Bearer TOKEN"
            raise RefusedError(HTTPStatus.UNAUTHORIZED, line)


_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))


def error_response(status: int, line: str) -> Response:
    """Return an error as JSON, ``{"error": line}``, with the headers that belong to its status."""
    headers = {
        HTTPStatus.UNAUTHORIZED: {"www-authenticate": "Bearer"},
        HTTPStatus.TOO_MANY_REQUESTS: {"retry-after": "1"},
        HTTPStatus.SERVICE_UNAVAILABLE: {"retry-after": "1"},
    }
    return JSONResponse({"error": " ".join(line.split())}, status, headers.get(HTTPStatus(status)))


class _TimedBody(Body):
    """A body that has to arrive in time."""

    def __init__(self, receive: Receive) -> None:
        super().__init__(receive)
        self._deadline = time.monotonic() + _BODY_SECONDS

    async def __call__(self) -> Message:
        """Return the next part."""
        if self._ended:  # what comes now is the end of the connection, whenever that is
            return await super().__call__()
        try:
            return await asyncio.wait_for(super().__call__(), self._deadline - time.monotonic())
        except TimeoutError:
            line = f"the body took more than {_BODY_SECONDS:g} s to arrive"
            raise RefusedError(HTTPStatus.REQUEST_TIMEOUT, line) from None


class _Rate:
    """Tokens of a bucket for each caller: ``rate`` of them come back each second, and twice as many fit into it."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, caller: str) -> float:
        """Take one of a caller's; return the seconds until there is one, 0 where there was."""
        if self._rate <= 0:
            return 0.0
        now = time.monotonic()
        most = max(1.0, 2 * self._rate)
        left, then = self._buckets.pop(caller, (most, now))
        left = min(most, left + (now - then) * self._rate)
        wait = 0.0 if left >= 1 else (1 - left) / self._rate
        self._buckets[caller] = (left if wait else left - 1, now)
        while len(self._buckets) > _CALLERS:
            self._buckets.popitem(last=False)
        return wait
