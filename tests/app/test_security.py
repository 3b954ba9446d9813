"""Tests of what no request passes, without the application behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from app.security import Guard, allowed_host, is_loopback, own_names, root_path
from app.state.context import Limits
from vitrail.errors import UserError

LIMITS = Limits(upload_bytes=1000, images=2, request_bytes=5000, uploads_kept=1_200_000)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Says how long the body is, once it has read all of it."""
    body = await Request(scope, receive).body()
    await PlainTextResponse(f"{len(body)}")(scope, receive, send)


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"image")
    return folder


@pytest.fixture
def client(uploads: Path) -> TestClient:
    return TestClient(Guard(echo, LIMITS, uploads, [7]), base_url="http://127.0.0.1:7860")


OWN_HOSTS = ["127.0.0.1", "127.0.0.1:7860", "localhost", "LOCALHOST:7860", "[::1]:7860", "192.168.0.9:7860"]
FOREIGN_HOSTS = [
    "", "evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example",
    "127.0.0.1.nip.io:7860", "localhost:7860@evil.example", "127.0.0.1:7860:1", "2130706433", "0x7f000001", "127.1",
    "[::1].evil.example", "local host", "localhost/", "localhost#",
]  # fmt: skip


@pytest.mark.parametrize("host", OWN_HOSTS)
def test_own_hosts_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
@pytest.mark.parametrize("path", ["/", "/images?gallery=g&id=a", "/gradio_api/info"])
def test_a_foreign_name_that_points_here_is_refused(client: TestClient, host: str, path: str) -> None:
    assert client.get(path, headers={"host": host}).status_code == 421


FOREIGN_ORIGINS = [
    "null", "http://evil.example", "https://evil.example", "http://127.0.0.1:7861", "http://127.0.0.1",
    "http://localhost:7860", "http://127.0.0.1:7860.evil.example", "http://evil.example/?http://127.0.0.1:7860",
    "file://", "chrome-extension://abc", "",
]  # fmt: skip


@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/queue/join"), ("POST", "/gradio_api/upload"), ("POST", "/gradio_api/cancel"),
        ("GET", "/config"), ("GET", "/images"), ("OPTIONS", "/gradio_api/queue/join"),
    ],
)  # fmt: skip
def test_other_pages_cannot_ask(client: TestClient, origin: str, method: str, path: str) -> None:
    answer = client.request(method, path, headers={"origin": origin})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def test_the_own_page_may_ask(client: TestClient) -> None:
    own = {"origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}
    assert client.post("/gradio_api/cancel", headers=own, content=b"abc").text == "3"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_pages_cannot_embed_but_link(client: TestClient, site: str) -> None:
    embedded = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
    assert client.get("/images", headers=embedded).status_code == 403
    assert client.get("/", headers={**embedded, "sec-fetch-mode": "navigate"}).status_code == 200


CLOSED = [
    ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/gradio_api/openapi.json"),
    ("GET", "/gradio_api/proxy=https://example.org/"), ("HEAD", "/gradio_api/proxy=https://example.org/"),
    ("GET", "/gradio_api/file/etc/passwd"), ("GET", "/gradio_api/dev/reload"), ("GET", "/gradio_api/deep_link"),
    ("GET", "/gradio_api/vibe-code"), ("GET", "/gradio_api/runs"), ("GET", "/gradio_api/token"),
    ("GET", "/gradio_api/profiling/summary"), ("GET", "/gradio_api/call/predict/1"),
    ("GET", "/gradio_api/custom_component/1/client/component/index.js"), ("GET", "/monitoring"),
    ("GET", "/monitoring/summary"), ("GET", "/logout"), ("GET", "/pwa_icon"), ("GET", "/images/quickstart/a"),
    ("GET", "//evil.example"), ("POST", "/"), ("POST", "/login"), ("POST", "/gradio_api/run/predict"),
    ("POST", "/gradio_api/api/predict"), ("POST", "/gradio_api/call/predict"),
    ("POST", "/gradio_api/call/v2/predict"), ("POST", "/gradio_api/component_server"),
    ("POST", "/gradio_api/process_recording"), ("POST", "/gradio_api/vibe-edit"), ("POST", "/gradio_api/stream/abc"),
    ("POST", "/gradio_api/run-history/connect"), ("PUT", "/gradio_api/upload"), ("DELETE", "/images"),
    ("PATCH", "/gradio_api/queue/join"), ("TRACE", "/"), ("OPTIONS", "/"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_what_the_page_does_not_need_is_not_there(client: TestClient, method: str, path: str) -> None:
    assert client.request(method, f"http://127.0.0.1:7860{path}").status_code == 404


def test_web_sockets_are_closed(client: TestClient) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/"):
        pass


def test_every_answer_forbids_what_a_page_could_be_made_to_do(client: TestClient) -> None:
    for answer in (client.get("/"), client.get("/docs"), client.get("/", headers={"host": "evil.example"})):
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["form-action"] == "'self'"
        assert policy["frame-ancestors"] == policy["object-src"] == "'none'"
        assert "http" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"


def outside(uploads: Path) -> list[str]:
    (uploads.parent / "secret").write_text("secret")
    (uploads / "link").symlink_to(uploads.parent / "secret")
    (uploads.parent / "uploads-too").mkdir(exist_ok=True)
    return [
        "/etc/passwd",
        "etc/passwd",
        "/proc/self/environ",
        str(uploads.parent / "secret"),
        f"{uploads}/../secret",
        f"{uploads}/%2e%2e/secret",
        f"{uploads}/..%2fsecret",
        f"{uploads}/link",
        f"{uploads}-too/a.png",
        f"{uploads}\0.png",
        "../secret",
        "a.png",
        "~/secret",
        "file:///etc/passwd",
        "http://169.254.169.254/latest/meta-data",
        "https://example.org/a.png",
        "//evil.example/a.png",
        "\\\\evil.example\\a",
        "data:text/html,<script>alert(1)</script>",
        "x" * 5000,
        "",
    ]


@pytest.mark.parametrize("number", range(21))
def test_only_uploads_can_be_fetched_or_named(client: TestClient, uploads: Path, number: int) -> None:
    path = outside(uploads)[number]
    for shown in ({"path": path}, {"path": path, "meta": {"_type": "gradio.FileData"}}, {"a": [{"b": {"path": path}}]}):
        assert client.post(
            "/gradio_api/queue/join", json={"fn_index": 7, "session_hash": "a", "data": [shown]}
        ).status_code in {400, 413}
    if "\0" not in path:
        assert client.get(f"/gradio_api/file={path}").status_code == 404


def test_uploads_can_be_fetched_and_named(client: TestClient, uploads: Path) -> None:
    path = str(uploads / "a.png")
    assert client.get(f"/gradio_api/file={path}").status_code == 200
    body = {
        "fn_index": 7,
        "session_hash": "a",
        "data": [{"path": path, "url": f"http://127.0.0.1:7860/gradio_api/file={path}"}, None, "a text", 3],
    }
    answer = client.post("/gradio_api/queue/join", json=body)
    assert answer.status_code == 200
    assert int(answer.text) == len(json.dumps(body, separators=(",", ":")))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"[" * 4000,
        b'{"data":' * 500,
        b"{}",
        b'{"fn_index": 8}',
        b'{"fn_index": "7"}',
        b'{"fn_index": true}',
        b'{"fn_index": 7, "session_hash": "a".0}',
        b'{"fn_index": [7]}',
        b'{"fn_index": 7, "session_hash": "a", "data": [{"path": 3}]}',
        b'{"fn_index": 7, "session_hash": "a", "data": [{"path": ["/etc/passwd"]}]}',
        b'{"fn_index": 7, "session_hash": "a", "data": [{"path": {"path": "/etc/passwd"}}]}',
        b'{"fn_index": 7, "session_hash": "a", "data": [{"url": "data:image/png;base64,AAAA"}]}',
        b'{"fn_index": 7, "session_hash": "a", "data": [{"url": "http://169.254.169.254/"}]}',
        b'{"fn_index": 7, "session_hash": "a", "data": {"path": "/etc/passwd"}}',
    ],
)
def test_calls_that_are_none_are_refused(client: TestClient, body: bytes) -> None:
    assert client.post("/gradio_api/queue/join", content=body).status_code == 400


@pytest.mark.parametrize(
    ("path", "limit"),
    [("/gradio_api/queue/join", 5000), ("/gradio_api/cancel", 5000), ("/gradio_api/upload", 1_050_576)],
)
def test_bodies_are_bounded_whatever_their_length_claims(client: TestClient, path: str, limit: int) -> None:
    def pieces(length: int) -> Iterator[bytes]:
        for start in range(0, length, 1000):
            yield b" " * min(1000, length - start)

    fits = b'{"fn_index": 7, "session_hash": "a"}'.ljust(limit)
    assert client.post(path, content=fits).text == str(limit)
    assert client.post(path, content=fits + b" ").status_code == 413
    assert client.post(path, content=pieces(limit + 1)).status_code == 413  # sent in pieces, without a length
    for length in ("-1", "1e3", "a", "99999999999999999999"):
        assert client.post(path, content=b"{}", headers={"content-length": length}).status_code == 413


def test_uploads_do_not_fill_the_disk(client: TestClient, uploads: Path) -> None:
    form = b"x" * 1000
    assert client.post("/gradio_api/upload", content=form).status_code == 200
    (uploads / "kept").mkdir()
    (uploads / "kept" / "b.png").write_bytes(b" " * 1_199_100)
    assert client.post("/gradio_api/upload", content=form).status_code == 507


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True), ("[::1]", True),
        ("0.0.0.0", False), ("::", False), ("192.168.0.9", False), ("example.org", False), ("", False),
    ],
)  # fmt: skip
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
    assert bool(own_names(host)) is not loopback


def test_names_of_this_machine_hold_only_where_it_listens_to_others(uploads: Path) -> None:
    asked = {"host": "Gallery.Example:7860"}
    named = TestClient(Guard(echo, LIMITS, uploads, hosts=["gallery.example"]), base_url="http://localhost")
    assert named.get("/", headers=asked).status_code == 200
    unnamed = TestClient(Guard(echo, LIMITS, uploads), base_url="http://localhost")
    assert unnamed.get("/", headers=asked).status_code == 421


@pytest.fixture
def proxied(uploads: Path) -> TestClient:
    """Behind a reverse proxy that serves it as ``https://app.example.org/vitrail``."""
    guard = Guard(echo, LIMITS, uploads, [7], allowed=["app.example.org", "b.example.org:8443"], prefix="/vitrail")
    return TestClient(guard, base_url="http://127.0.0.1:7860", follow_redirects=False)


@pytest.mark.parametrize("host", ["app.example.org", "APP.example.org:444", "b.example.org:8443", "127.0.0.1:7860"])
def test_stated_names_are_answered(proxied: TestClient, host: str) -> None:
    assert proxied.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["example.org", "x.app.example.org", "app.example.org.evil.example", "b.example.org"])
def test_other_names_are_refused_with_the_option_that_would_allow_them(
    proxied: TestClient, host: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        answer = proxied.get("/", headers={"host": host, "x-forwarded-host": "app.example.org"})
        assert answer.status_code == 421
        assert f"--allow-host {host}" in answer.text
    assert caplog.text.count(f"--allow-host {host}") == 1  # said once, however often it is asked


def test_what_a_refusal_repeats_is_one_short_line(proxied: TestClient) -> None:
    for host in ("a\u00e9 b; rm -rf", "x" * 5000, "a..b"):
        answer = proxied.get("/", headers=[(b"host", host.encode("latin-1"))])
        assert answer.status_code == 421
        assert "--allow-host NAME" in answer.text
        assert len(answer.text) < 400
        assert answer.text.isascii()
    assert "\n" not in proxied.get("/a%0Ab").text


ORIGINS = [
    ("https://app.example.org", "app.example.org", 200),
    ("https://app.example.org", "app.example.org:443", 200),
    ("https://app.example.org", "127.0.0.1:7860", 200),  # a proxy that does not pass the Host on
    ("https://b.example.org:8443", "b.example.org:8443", 200),
    ("https://b.example.org:8444", "127.0.0.1:7860", 403),
    ("https://evil.example", "app.example.org", 403),
    ("https://app.example.org.evil.example", "app.example.org", 403),
    ("https://user@app.example.org", "app.example.org", 403),
    ("null", "app.example.org", 403),
]


@pytest.mark.parametrize(("origin", "host", "status"), ORIGINS)
def test_pages_of_stated_names_may_ask(proxied: TestClient, origin: str, host: str, status: int) -> None:
    answer = proxied.post("/gradio_api/cancel", headers={"origin": origin, "host": host}, content=b"abc")
    assert answer.status_code == status
    if origin == "https://evil.example":
        assert "--allow-host evil.example" in answer.text


@pytest.mark.parametrize("prefix", ["", "/vitrail"])
def test_a_proxy_may_remove_the_prefix_or_leave_it(proxied: TestClient, prefix: str) -> None:
    assert proxied.get(f"{prefix}/config").status_code == 200
    assert proxied.post(f"{prefix}/gradio_api/cancel", content=b"abc").text == "3"
    assert proxied.get(f"{prefix}/docs").status_code == 404


def test_the_prefix_without_a_slash_leads_to_the_page(proxied: TestClient) -> None:
    assert proxied.get("/vitrail").headers["location"] == "/vitrail/"
    assert proxied.get("/vitrailtte").status_code == 404


@pytest.mark.parametrize("path", ["/shop/demo/", "/shop/demo/config", "/shop/demo/gradio_api/upload_progress"])
def test_a_prefix_that_was_not_stated_is_named(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert "--root-path /shop/demo" in answer.text or "--root-path /shop" in client.get("/shop/").text


def test_nothing_behind_learns_what_a_proxy_says(uploads: Path) -> None:
    async def headers(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse(" ".join(Request(scope).headers))(scope, receive, send)

    client = TestClient(Guard(headers, LIMITS, uploads), base_url="http://127.0.0.1:7860")
    said = ["forwarded", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-for", "x-real-ip", "x-gradio-server"]
    seen = client.get("/", headers=dict.fromkeys(said, "evil.example")).text.split()
    assert "host" in seen
    assert not set(said) & set(seen)


@pytest.mark.parametrize("text", ["https://a.example", "*", "*.a.example", "a b", "", ":80", "a.example/x", "a..b"])
def test_what_is_no_host_name_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--allow-host"):
        allowed_host(text)


def test_host_names_are_spelled_as_browsers_do() -> None:
    assert allowed_host("B\u00fccher.Example.") == "xn--bcher-kva.example"
    assert allowed_host("App.example.org:8443") == "app.example.org:8443"


@pytest.mark.parametrize("text", ["vitrail", "/a//b", "/a/../b", "/a?b", "/a b", "https://a.example/x", "/a/."])
def test_what_is_no_prefix_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--root-path"):
        root_path(text)


def test_a_prefix_loses_its_last_slash() -> None:
    assert [root_path(text) for text in ("", "/", "/a", "/a/b/")] == ["", "", "/a", "/a/b"]
