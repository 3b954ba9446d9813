from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from app.api import guard as module
from app.api.guard import ApiGuard, Metrics, Settings
from app.state.context import Limits

TOKEN = "t" * 20
FORM = {"content-type": "multipart/form-data; boundary=b"}


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the length of the body; ``/broken`` is a bug."""
    if scope["path"] == "/broken":
        raise RuntimeError("a bug")
    body = await Request(scope, receive).body()
    await PlainTextResponse(f"{len(body)}")(scope, receive, send)


def client(app: Any = echo, base_url: str = "http://127.0.0.1:8000", **changes: Any) -> TestClient:
    settings = Settings(**{"limits": Limits(request_bytes=1000), **changes})
    return TestClient(ApiGuard(app, settings, Metrics(), ["/v1/classify"]), base_url=base_url)


def one_line(response: Any) -> str:
    assert list(response.json()) == ["error"]
    line: str = response.json()["error"]
    assert line
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": TOKEN},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer ttttttttttttttttttt\xe9"},
    ],
)
def test_only_the_token_opens_what_is_not_open(headers: dict[str, str]) -> None:
    served = client(token=TOKEN)
    for path in ("/v1/model", "/metrics", "/v1/image?id=a", "/docs/", "//docs", "/health/../metrics"):
        refused = served.get(path, headers=[(key.encode(), value.encode("latin-1")) for key, value in headers.items()])
        assert refused.status_code == 401, path
        assert refused.headers["www-authenticate"] == "Bearer"
        assert "Bearer TOKEN" in one_line(refused)
    for path in ("/health", "/docs", "/openapi.json"):
        assert served.get(path).status_code == 200


def test_with_the_token_any_name_and_page_may_ask() -> None:
    headers = {"authorization": f"bearer {TOKEN}", "origin": "https://shop.example"}
    assert client(token=TOKEN, base_url="http://api.example").get("/v1/model", headers=headers).status_code == 200


def test_without_a_token_other_names_and_pages_are_refused() -> None:
    assert client().get("/v1/model").status_code == 200
    refused = client(base_url="http://evil.example").get("/v1/model")
    assert refused.status_code == 421
    assert "--allow-host evil.example" in one_line(refused)
    assert client(base_url="http://evil.example", allowed=["evil.example"]).get("/v1/model").status_code == 200
    assert client().post("/v1/classify", headers={**FORM, "origin": "http://evil.example"}).status_code == 403


def test_bodies_are_forms_and_bounded_announced_or_not() -> None:
    served = client()
    assert served.post("/v1/classify", content=b"a" * 1000, headers=FORM).text == "1000"
    assert served.post("/v1/classify", content=b"a" * 1001, headers=FORM).status_code == 413
    chunked = served.post("/v1/classify", content=iter([b"a" * 600, b"b" * 600]), headers=FORM)
    assert chunked.status_code == 413
    assert "MiB" in one_line(chunked)
    for kind in ("application/json", "image/jpeg", ""):
        refused = served.post("/v1/classify", content=b"{}", headers={"content-type": kind})
        assert refused.status_code == 415
        assert "multipart/form-data" in one_line(refused)


def test_a_body_has_to_arrive_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BODY_SECONDS", 0.05)
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.sleep(0.2)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", FORM["content-type"].encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/classify", "headers": headers, "client": ("::1", 1)}
    guarded = ApiGuard(echo, Settings(), Metrics(), ["/v1/classify"])
    asyncio.run(guarded(scope, never, send))
    assert sent[0]["status"] == 408


def test_a_caller_has_a_rate_and_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    rate = module._Rate(2.0)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert [rate.wait("a") for _ in range(4)] == [0] * 4
    assert rate.wait("a") == pytest.approx(0.5)
    assert rate.wait("b") == 0
    now[0] += 0.5
    assert [rate.wait("a") == 0 for _ in range(2)] == [True, False]
    now[0] += 1000
    assert [rate.wait("a") == 0 for _ in range(5)] == [True] * 4 + [False]
    for number in range(module._CALLERS + 10):
        rate.wait(f"flood {number}")
    assert len(rate._buckets) == module._CALLERS


def test_the_rate_is_refused_with_429() -> None:
    served = client(rate=0.5)
    codes = [served.post("/v1/classify", headers=FORM).status_code for _ in range(3)]
    assert codes == [200, 429, 429]
    assert served.post("/v1/classify", headers=FORM).headers["retry-after"] == "1"
    assert served.get("/health").status_code == 200


@pytest.fixture
def held() -> Iterator[tuple[Any, threading.Event, threading.Event]]:
    """An application whose requests wait, what is set when one is in it, and what lets them go."""
    begun, free = threading.Event(), threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        if scope["method"] == "POST":
            await asyncio.to_thread(free.wait, 10)
        await PlainTextResponse("done")(scope, receive, send)

    yield app, begun, free
    free.set()


def test_requests_beyond_the_queue_get_503_at_once(held: tuple[Any, threading.Event, threading.Event]) -> None:
    app, begun, free = held
    served = client(app, queue=1)
    first: list[int] = []
    thread = threading.Thread(
        target=lambda: first.append(served.post("/v1/classify", headers=FORM).status_code), daemon=True
    )
    thread.start()
    assert begun.wait(10)
    refused = served.post("/v1/classify", headers=FORM)
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert served.get("/health").status_code == 200
    free.set()
    thread.join(10)
    assert first == [200]
    assert served.post("/v1/classify", headers=FORM).status_code == 200


def test_a_bug_is_a_500_without_its_text_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    served = TestClient(ApiGuard(echo, Settings(), metrics, ["/broken"]), base_url="http://localhost")
    response = served.get("/broken")
    assert response.status_code == 500
    assert "a bug" not in one_line(response)
    assert "a bug" in caplog.text
    assert served.get("/anything/else").headers["x-content-type-options"] == "nosniff"
    count = metrics.registry.get_sample_value
    assert count("vitrail_requests_total", {"endpoint": "/broken", "status": "500"}) == 1
    assert count("vitrail_requests_total", {"endpoint": "other", "status": "200"}) == 1
    assert count("vitrail_request_seconds_count", {"endpoint": "/broken"}) == 1
