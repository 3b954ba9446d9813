"""What no request passes: foreign hosts and pages, closed addresses, unbounded bodies, files from elsewhere.

The guard is in front of everything, so that nothing behind it has to be trusted with these. The application has no
login: any caller who reaches it may use it. So it makes sure that this is a person at this machine, and not a web page
that the person happens to have open.

Gradio's settings do a part of this, see ``app.server``: `allowed_paths` and `blocked_paths` for files that it serves,
`max_file_size` for a single upload, `strict_cors` (its default) for what other pages can read of a response. They do
not check the `Host` (DNS rebinding), do not refuse requests of other pages (they only hide the response), leave all
other routes open, fetch an address that is given in place of an upload, and bound neither other bodies nor all
uploads together.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.state.context import Limits
from vitrail.errors import UserError

JOIN, DATA = "/gradio_api/queue/join", "/gradio_api/queue/data"
_UPLOAD, _FILE = "/gradio_api/upload", "/gradio_api/file="

_READ = re.compile(
    r"/(|images|pending|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(assets|static|svelte)/.*)"
    r"|/gradio_api/(file=.*|queue/data|upload_progress|heartbeat/[^/]+|startup-events|app_id|info/?|theme\.css)"
)
_WRITE = re.compile(r"/gradio_api/(queue/join|upload|cancel|reset)/?")
"""All that the page needs. What else Gradio offers (a proxy, calls past the queue, recordings, logins, code editing) is
closed: each would be one more attack surface."""

_logger = logging.getLogger(__name__)

_LOGGED = 100
"""Different lines about refused requests that are logged; more could fill the disk."""

_HOST = re.compile(
    r"(?=.{1,253}(?::|$))[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*(:\d{1,5})?"
)
_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_PROXY_HEADERS = re.compile(rb"forwarded|x-(forwarded|original|real|gradio)-.*")
"""Headers with which a proxy, or any caller, states who asked and for what; nothing behind may believe them."""

_SESSION = 64
"""Longest name of a session; the page's own have a dozen letters."""

# Gradio compiles its templates in the browser, hence `unsafe-eval`. The page loads nothing from anywhere else.
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
        "worker-src 'self' blob:; frame-src 'none'; frame-ancestors 'none'; object-src 'none'; base-uri 'self'; "
        "form-action 'self'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
}


class RefusedError(Exception):
    """A request that is refused, with a status and one line."""

    def __init__(self, status: HTTPStatus, line: str) -> None:
        super().__init__(line)
        self.status, self.line = status, line


class Callers:
    """Which requests are accepted: those that call the server by a name of its own, from no other page.

    Args:
        hosts: names, in addition to numeric addresses and ``localhost``, under which the server may be reached.
        allowed: further such names from the user; their pages may send requests even where a reverse proxy passes
            another ``Host`` on.
    """

    def __init__(self, hosts: Iterable[str] = (), allowed: Iterable[str] = ()) -> None:
        self._allowed = set(allowed)
        self._hosts = {"localhost", *(host.lower() for host in hosts)}

    def check(self, headers: Headers) -> None:
        """Raise ``RefusedError`` for another ``Host``, or a request of another page."""
        host = headers.get("host", "")
        if not self._is_own(host):
            name = _bare(host) if _HOST.fullmatch(host.lower()) else "NAME"
            raise RefusedError(
                HTTPStatus.MISDIRECTED_REQUEST,
                f"this server is not called {_quoted(host)}; if people reach it by that name, such as through a "
                f"reverse proxy, start it with --allow-host {name}",
            )
        self._check_origin(headers, host)

    def _is_own(self, host: str) -> bool:
        """Whether a ``Host`` is ours: another page can make its own name point here, but not a number."""
        name = _bare(host)
        if name in self._hosts or not self._allowed.isdisjoint({name, host.lower()}):
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True

    def _check_origin(self, headers: Headers, host: str) -> None:
        """Refuse requests of other pages: calls, images and scripts. A link on another page only shows the page."""
        origin = headers.get("origin")
        if origin is not None and not self._is_own_origin(origin.lower(), host.lower()):
            name = urlsplit(origin).netloc.lower() if re.match(r"https?://", origin.lower()) else ""
            hint = (
                f"; if this is the application's own page behind a reverse proxy, start it with --allow-host {name} "
                "and let the proxy pass the Host header on"
            )
            raise RefusedError(
                HTTPStatus.FORBIDDEN,
                f"requests from other pages are refused: the page is from {_quoted(origin)}, the server was reached "
                f"as {_quoted(host)}{hint if _HOST.fullmatch(name) else ''}",
            )
        if headers.get("sec-fetch-site") in {"cross-site", "same-site"} and headers.get("sec-fetch-mode") != "navigate":
            raise RefusedError(HTTPStatus.FORBIDDEN, "requests from other pages are refused")

    def _is_own_origin(self, origin: str, host: str) -> bool:
        scheme, _, name = origin.partition("://")
        if scheme not in {"http", "https"}:
            return False
        usual = {"http": ":80", "https": ":443"}[scheme]
        if name.removesuffix(usual) == host.removesuffix(usual):
            return True
        return bool(_HOST.fullmatch(name)) and not self._allowed.isdisjoint({name, _bare(name)})


class Guard:
    """ASGI middleware.

    Args:
        app: the application behind it.
        limits: of sizes.
        uploads: folder of uploaded files; a request can name files in it and no others.
        functions: numbers of what the page can call; for others Gradio fails with a traceback in the log.
        hosts: names, in addition to numeric addresses and ``localhost``, under which the application may be reached.
        allowed: further such names from the user; their pages may send requests even where a reverse proxy passes
            another ``Host`` on.
        prefix: path below which a reverse proxy serves the application, such as ``/vitrail``; proxies may remove it.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        uploads: Path,
        functions: Iterable[int] = (),
        hosts: Iterable[str] = (),
        *,
        allowed: Iterable[str] = (),
        prefix: str = "",
    ) -> None:
        self._app = app
        self._functions = set(functions)
        self._limits = limits
        self._uploads = uploads.resolve()
        self._callers = Callers(hosts, allowed)
        self._prefix = prefix
        self._logged: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with one line."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # Nothing here uses WebSockets.
            await send({"type": "websocket.close", "code": 1008})
            return
        started = False

        async def with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        body = Body(receive)
        if scope["path"] == self._prefix != "":  # Relative addresses of the page need the slash.
            await RedirectResponse(f"{self._prefix}/")(scope, receive, with_headers)
            return
        scope = _below(scope, self._prefix)
        try:
            self._check(scope)
            await self._app(scope, await self._admitted(scope, body), with_headers)
        except RefusedError as refused:
            if started:  # Too late for another response: the connection ends.
                raise
            self._log(refused)
            await body.drain()
            await PlainTextResponse(refused.line, refused.status)(scope, receive, with_headers)

    def _log(self, refused: RefusedError) -> None:
        """Report once, to the person at the server, what an option would change."""
        if "--" in refused.line and refused.line not in self._logged and len(self._logged) < _LOGGED:
            self._logged.add(refused.line)
            _logger.warning("%d %s: %s", refused.status, refused.status.phrase, refused.line)

    def _check(self, scope: Scope) -> None:
        self._callers.check(Headers(scope=scope))
        path, method = scope["path"], scope["method"]
        if not (_READ if method in {"GET", "HEAD"} else _WRITE).fullmatch(path) or method not in {
            "GET",
            "HEAD",
            "POST",
        }:
            raise RefusedError(
                HTTPStatus.NOT_FOUND,
                f"there is nothing at {_quoted(path)}; if a reverse proxy serves the application below a prefix, start "
                f"it with --root-path {_likely_prefix(path)}" + (f" (now: {self._prefix})" if self._prefix else ""),
            )
        if path.startswith(_FILE) and not self._is_upload(path.removeprefix(_FILE)):
            raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such file")

    def _is_upload(self, path: str) -> bool:
        """Whether a path is in the folder of uploads, links followed, as it is and unquoted."""
        try:
            readings = [Path(path), Path(unquote(path))]
            return all(one.is_absolute() and one.resolve().is_relative_to(self._uploads) for one in readings)
        except (OSError, ValueError, RuntimeError):
            return False

    async def _admitted(self, scope: Scope, body: Body) -> Receive:
        """What the application behind reads the body from, with its checks."""
        upload = scope["path"].startswith(_UPLOAD)
        # A little more than the files themselves: the form around them.
        body.limit = self._limits.images * self._limits.upload_bytes + 2**20 if upload else self._limits.request_bytes
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length) > body.limit:
            raise _too_long(body.limit)
        if upload:
            self._check_space(int(length))
        if scope["path"].rstrip("/") == JOIN:
            return _replayed(self._checked(await body.whole()))
        return body

    def _check_space(self, coming: int) -> None:
        """Uploads are kept for a day; they must not fill the disk until then."""
        kept = sum(file.stat().st_size for file in self._uploads.rglob("*") if file.is_file())
        if kept + coming > self._limits.uploads_kept:
            raise RefusedError(HTTPStatus.INSUFFICIENT_STORAGE, "too many uploads are kept; try again later")

    def _checked(self, body: bytes) -> bytes:
        """A call whose files are uploads: Gradio would fetch addresses, and decode files in the request."""
        try:
            asked = json.loads(body)
            if not isinstance(asked, dict) or type(asked.get("fn_index")) is not int:
                raise ValueError
            if not isinstance(asked.get("session_hash"), str) or not 0 < len(asked["session_hash"]) <= _SESSION:
                raise ValueError
            self._check_files(asked.get("data"))
        except (ValueError, RecursionError):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the request cannot be read") from None
        if asked["fn_index"] not in self._functions:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the page has changed; load it again")
        return body

    def _check_files(self, given: Any) -> None:
        if isinstance(given, dict):
            path, url = given.get("path"), given.get("url")
            if path is not None and not (isinstance(path, str) and self._is_upload(path)):
                raise RefusedError(HTTPStatus.BAD_REQUEST, "a file has to be uploaded first")
            if url is not None and (path is None or not isinstance(url, str) or url.lower().startswith("data:")):
                raise RefusedError(HTTPStatus.BAD_REQUEST, "a file has to be uploaded first")
        for value in given.values() if isinstance(given, dict) else given if isinstance(given, list) else ():
            self._check_files(value)


def own_names(host: str) -> set[str]:
    """Return names of this machine for a server that binds to a host; none where others cannot reach it."""
    return set() if is_loopback(host) else {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that binds to the host."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def allowed_host(text: str) -> str:
    """Return the host name of ``--allow-host`` in the spelling of browsers (lower case, IDNA); refuse anything else."""
    name, colon, port = text.strip().lower().rpartition(":")
    if not colon or not port.isdecimal():
        name, colon, port = text.strip().lower(), "", ""
    with suppress(UnicodeError):
        name = name.removesuffix(".").encode("idna").decode()
    if not _HOST.fullmatch(f"{name}{colon}{port}"):
        raise UserError(f"--allow-host {text}: must be one host name, such as app.example.org or app.example.org:8443")
    return f"{name}{colon}{port}"


def root_path(text: str) -> str:
    """Return the prefix of ``--root-path``: empty, or ``/a/b`` without a slash at the end; refuse anything else."""
    prefix = text.rstrip("/")
    if prefix and (not _PREFIX.fullmatch(prefix) or {".", ".."} & set(prefix.split("/"))):
        raise UserError(
            f"--root-path {text}: must be the path below which the proxy serves the application, such as /vitrail"
        )
    return prefix


def _below(scope: Scope, prefix: str) -> Scope:
    """A request without the prefix, if the proxy left it, and without a proxy's headers."""
    headers = [(name, value) for name, value in scope["headers"] if not _PROXY_HEADERS.fullmatch(name)]
    scope = {**scope, "headers": headers}
    if prefix and scope["path"].startswith(f"{prefix}/"):
        scope["path"] = scope["path"].removeprefix(prefix)
        scope["raw_path"] = scope.get("raw_path", b"").removeprefix(prefix.encode())
    return scope


def _bare(host: str) -> str:
    return re.sub(r":\d+$", "", host).lower()


def _quoted(text: str) -> str:
    """Untrusted text, short and in one line."""
    return ascii(text if len(text) <= 80 else f"{text[:80]}...")


def _likely_prefix(path: str) -> str:
    """The prefix that would make a path one of ours."""
    parts = path.split("/")
    for number in range(2, len(parts) + 1):
        prefix, rest = "/".join(parts[:number]), "/".join(["", *parts[number:]])
        if _PREFIX.fullmatch(prefix) and (_READ.fullmatch(rest) or _WRITE.fullmatch(rest)):
            return prefix if len(prefix) <= 80 else "/PREFIX"
    return "/PREFIX"


class Body:
    """The body of a request; reading it raises an error where it is longer than allowed."""

    def __init__(self, receive: Receive) -> None:
        self.limit = 0
        self._receive = receive
        self._length = 0
        self._ended = False

    async def __call__(self) -> Message:
        """Return the next part."""
        message = await self._receive()
        self._length += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        if self._length > self.limit:
            raise _too_long(self.limit)
        return message

    async def whole(self) -> bytes:
        """Read all of it."""
        parts = []
        while not self._ended:
            parts.append((await self()).get("body", b""))
        return b"".join(parts)

    async def drain(self, most: int = 64 * 2**20) -> None:
        """Read on for a while: a browser that is still sending would not show a response to it."""
        self.limit = self._length + most
        while not self._ended:
            try:
                await self()
            except RefusedError:
                return


def _replayed(body: bytes) -> Receive:
    """A body that was read already."""
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _too_long(limit: int) -> RefusedError:
    return RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"larger than {limit / 2**20:g} MiB; send less at once")
