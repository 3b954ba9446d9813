"""The whole application under attack: hostile uploads, addresses and calls; after each test it answers as before."""

from __future__ import annotations

import concurrent.futures
import http.client
import itertools
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from app.security import DATA, JOIN
from app.server import blocks_of, build_app
from app.state.context import AppContext, Limits
from tests.app.hostile_files import HTML, SVG, encoded, harmless_files, hostile_files
from tests.app.running import Served, serving

UPLOAD = "/gradio_api/upload"


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def functions(client: httpx.Client) -> list[dict[str, Any]]:
    """What can be called, as the page itself knows it."""
    found = [function for function in client.get("/config").json()["dependencies"] if function["backend_fn"]]
    assert len(found) > 10
    return found


def call(client: httpx.Client, function: Any, data: Any, **more: Any) -> dict[str, Any]:
    """Calls a function of the page as a browser does; the last message about it, or the refusal."""
    session = uuid.uuid4().hex
    asked = {"fn_index": function, "data": data, "session_hash": session, **more}
    joined = client.post(JOIN, json=asked)
    if joined.status_code != 200:
        return {"refused": joined.status_code, "said": joined.text}
    with client.stream("GET", DATA, params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if message.get("msg") in {"process_completed", "unexpected_error"}:
                return dict(message)
    raise AssertionError("the answer ended early")


def raw_get(url: str, target: str) -> tuple[int, bytes]:
    """Asks for a target exactly as it is written: no client in between makes it harmless."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        connection.putrequest("GET", target)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture(autouse=True)
def lives_on(client: httpx.Client) -> Iterator[None]:
    """After every test the page and an image of the gallery are there."""
    yield
    assert "<html" in client.get("/").text
    assert client.get("/config").status_code == 200


ROOTS = ["/gradio_api/file=", "/static/", "/assets/", "/svelte/", "/images?gallery=quickstart&id=", "/images/", "/"]
TARGETS = [
    "/etc/passwd", "../../../../../../../../etc/passwd", "..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "%252e%252e%252f%252e%252e%252fetc%252fpasswd",
    "..%5c..%5c..%5cetc%5cpasswd", "..%c0%af..%c0%afetc%c0%afpasswd", "/etc/passwd%00.png", "/proc/self/environ",
    "/proc/self/cwd/pyproject.toml", "file:///etc/passwd", "http://127.0.0.1:9/secret", "https://example.org/a.png",
    "//etc/passwd", "./././etc/passwd", "~/.bashrc",
]  # fmt: skip


def test_no_file_of_the_machine_can_be_fetched(server: Served, context: AppContext) -> None:
    secret = (context.run("quickstart").path / "run.json").read_bytes()
    own = [str(context.run("quickstart").path / "run.json"), str(Path.cwd() / "pyproject.toml"), "pyproject.toml"]
    own += [f"{os.environ['GRADIO_TEMP_DIR']}/../run.json", f"{os.environ['GRADIO_TEMP_DIR']}/%2e%2e/hosts"]
    asked = list(itertools.product(ROOTS, [*TARGETS, *own]))
    assert len(asked) > 140
    for root, target in asked:
        status, body = raw_get(server.url, root + target)
        assert status in {400, 403, 404}, (root, target, status)
        assert not any(word in body for word in (b"root:", b"[project]", secret, b"GRADIO_TEMP_DIR")), (root, target)


@pytest.mark.slow
def test_hostile_uploads_do_no_harm(client: httpx.Client, functions: list[dict[str, Any]]) -> None:
    """Every file is uploaded and fetched back, some are given to what takes images."""
    takers = [function for function in functions if _takes_images(client, function)]
    assert takers
    for number, (_, name, content) in enumerate(itertools.chain(hostile_files(), harmless_files())):
        answer = client.post(UPLOAD, files={"files": (name, content)})
        assert answer.status_code == 200, name
        (path,) = answer.json()
        back = client.get(f"/gradio_api/file={path}")
        assert back.content == content
        kind = back.headers["content-type"]
        # What a browser would run is only ever saved.
        assert (kind.startswith("image/") and "svg" not in kind) or "attachment" in back.headers["content-disposition"]
        if number % 5 == 0:
            function = takers[number % len(takers)]
            _is_answered(call(client, function["id"], _data(client, function, path)))


def test_names_of_uploads_stay_in_their_folder(client: httpx.Client) -> None:
    names = [
        "../../a.png",
        "/etc/cron.d/a.png",
        "..\\..\\a.png",
        "a\0.png",
        "a" * 1000 + ".png",
        "con.png",
        ".png",
        "-rf",
    ]
    names += ["<img src=x>.png", "a\r\nX-Evil: 1.png", "%2e%2e%2fa.png", "ä漢.png", "$(touch x).png", "a;b.png", " "]
    for name in names:
        form = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode() + encoded()
        headers = {"content-type": "multipart/form-data; boundary=b"}
        answer = client.post(UPLOAD, content=form + b"\r\n--b--\r\n", headers=headers)
        if answer.status_code == 200:
            for path in answer.json():
                assert Path(path).resolve().is_relative_to(os.environ["GRADIO_TEMP_DIR"]), name
        else:
            assert answer.status_code in {400, 500}, name


def test_an_upload_has_a_limit_and_a_form(client: httpx.Client, context: AppContext) -> None:
    large = b"\xff\xd8" + b" " * context.limits.upload_bytes
    assert client.post(UPLOAD, files={"files": ("a.jpg", large)}).status_code == 413
    for kind, content in (
        ("text/plain", b"a"),
        ("multipart/form-data", b"a"),
        ("multipart/form-data; boundary=b", b""),
    ):
        assert client.post(UPLOAD, content=content, headers={"content-type": kind}).status_code in {200, 400}
    assert client.post(UPLOAD, files={"other": ("a.jpg", b"a")}).json() == []


def _of_wrong_kinds() -> list[Any]:
    deep: Any = "a"
    for _ in range(200):
        deep = [deep]
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    return [
        None,
        "",
        "x" * 1_000_000,
        "../../etc/passwd",
        "<script>alert(1)</script>",
        "'; DROP TABLE images; --",
        "class = 'a' OR 1 = 1",
        "\0\u202e\ud7ff",
        -1,
        10**400,
        1e308,
        True,
        [],
        {},
        [[], [None]],
        {"a": {"b": None}},
        {"__class__": "x", "constructor": {"prototype": 1}},
        deep,
        ["quickstart", "quickstart"],
        file,
        [{"image": file, "caption": None}],
        [{"image": {"path": "http://127.0.0.1:9/a.png", "meta": {"_type": "gradio.FileData"}}}],
        {"path": "a", "url": "data:image/png;base64,AAAA", "meta": {"_type": "gradio.FileData"}},
    ]


@pytest.mark.slow
def test_calls_with_whatever_is_sent_are_answered(client: httpx.Client, functions: list[dict[str, Any]]) -> None:
    """Each function gets each third value, in every place at once, and the next function the values after these."""
    values = _of_wrong_kinds()
    asked = [(one, value) for start, one in enumerate(functions) for value in values[start % 3 :: 3]]
    assert len(asked) > 100

    def answered(number: int) -> None:
        function, value = asked[number]
        _is_answered(call(client, function["id"], [value] * len(function["inputs"]), event_data=value))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(answered, range(len(asked))))


def test_calls_of_no_form_are_refused(client: httpx.Client, functions: list[dict[str, Any]]) -> None:
    known = functions[0]["id"]
    for function in (-1, 10**6, None, "a", [known], {"id": known}, 1.5, "__class__", 10**30):
        assert call(client, function, [])["refused"] == 400
    for data in (None, "a", 3, {"a": 1}, [None] * 10_000, []):
        _is_answered(call(client, known, data))
    for session in (None, "", 3, ["a"], {"a": 1}, "x" * 100_000):
        assert client.post(JOIN, json={"fn_index": known, "data": [], "session_hash": session}).status_code == 400
    for body in (b"", b"{", b"[1]", b"null", b"\x00", b"a=1&b=2", b"[" * 100_000):
        assert client.post(JOIN, content=body, headers={"content-type": "application/json"}).status_code == 400
    huge = b'{"data": ["' + b"a" * 3 * 2**20 + b'"]}'
    assert client.post(JOIN, content=huge, headers={"content-type": "application/json"}).status_code == 413


def test_nothing_is_offered_as_a_programming_interface(client: httpx.Client) -> None:
    offered = client.get("/gradio_api/info").json()
    assert offered == {"named_endpoints": {}, "unnamed_endpoints": {}}
    for path in ("/docs", "/openapi.json", "/gradio_api/openapi.json", "/monitoring", "/gradio_api/mcp/sse"):
        assert client.get(path).status_code == 404


def test_the_page_names_no_path_of_the_machine(client: httpx.Client, context: AppContext) -> None:
    page = client.get("/").text + client.get("/config").text
    for secret in (str(Path.cwd()), str(Path.home()), str(context.run("quickstart").path)):
        assert secret not in page
    assert json.loads(client.get("/config").text)["enable_queue"]


def test_other_pages_and_hosts_are_refused_by_the_whole_application(client: httpx.Client) -> None:
    asked = {"fn_index": 0, "data": [], "session_hash": "a"}
    assert client.post(JOIN, json=asked, headers={"origin": "http://evil.example"}).status_code == 403
    assert client.post(JOIN, json=asked, headers={"host": "evil.example"}).status_code == 421
    assert client.post("/gradio_api/run/predict", json=asked).status_code == 404


def test_a_full_queue_says_so_and_empties_again(context: AppContext) -> None:
    """Three requests are computed or wait; the others get an error to come back."""
    import threading

    import gradio as gr

    go_on = threading.Event()

    def tab(_: AppContext) -> None:
        button = gr.Button("wait")
        said = gr.Textbox()
        button.click(lambda: "done" if go_on.wait(30) else "late", None, said)

    small = AppContext(context.runs, context.galleries, Limits(queue=2, at_once=1))
    app = build_app(small, blocks=lambda served: blocks_of(served, [("Wait", tab)]))
    with serving(app, small) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        waiting = next(f["id"] for f in client.get("/config").json()["dependencies"] if f["targets"][0][1] == "click")
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            calls = [pool.submit(call, client, waiting, []) for _ in range(12)]
            done, _ = concurrent.futures.wait(calls, 30, concurrent.futures.FIRST_COMPLETED)
            assert {answer.result()["refused"] for answer in done} == {503}
            go_on.set()
            answers = [answer.result() for answer in calls]
        served = [answer for answer in answers if "refused" not in answer]
        assert 1 <= len(served) <= 4
        assert all(answer["output"]["data"] == ["done"] for answer in served)
        assert all("full" in answer["said"] for answer in answers if "refused" in answer)
        assert call(client, waiting, [])["output"]["data"] == ["done"]


def test_a_page_and_a_drawing_are_never_shown_by_the_server(client: httpx.Client) -> None:
    for name, content in (("a.html", HTML), ("a.svg", SVG), ("a.xhtml", HTML), ("a.js", b"alert(1)"), ("a.xml", SVG)):
        (path,) = client.post(UPLOAD, files={"files": (name, content)}).json()
        answer = client.get(f"/gradio_api/file={path}")
        assert "attachment" in answer.headers["content-disposition"], name
        assert answer.headers["x-content-type-options"] == "nosniff"


def _takes_images(client: httpx.Client, function: dict[str, Any]) -> bool:
    kinds = {part["id"]: part["type"] for part in client.get("/config").json()["components"]}
    return any(kinds[place] in {"gallery", "image", "file"} for place in function["inputs"])


def _data(client: httpx.Client, function: dict[str, Any], path: str) -> list[Any]:
    """What the page would send: the values it begins with, and the file in the place of the images."""
    parts = {part["id"]: part for part in client.get("/config").json()["components"]}
    file = {"path": path, "orig_name": Path(path).name, "meta": {"_type": "gradio.FileData"}}
    shown = {"gallery": [{"image": file, "caption": None}], "image": file, "file": [file]}
    return [shown.get(parts[place]["type"], parts[place]["props"].get("value")) for place in function["inputs"]]


def _is_answered(message: dict[str, Any]) -> None:
    """A call is answered, or refused, without any detail of the inside."""
    said = json.dumps(message)
    assert message.get("refused", 400) in {400, 413, 422, 503}, said[:500]
    for inside in ("Traceback", str(Path.cwd()), "site-packages", "root:"):
        assert inside not in said, said[:2000]
