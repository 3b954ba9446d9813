"""``vitrail serve`` as a process: with PyTorch blocked, asked to end, and started wrongly."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from app.state.runs import ServedRun
from tests.app.hostile_files import encoded
from tests.docs.blocks import ROOT
from tests.support.runs import flowers_onnx, flowers_run, kinds_onnx, kinds_run
from vitrail.__main__ import main
from vitrail.runs import Run

WITHOUT_TORCH = """
import sys

# None stands for what is not installed.
missing = ("torch", "torchvision", "lightning", "lightning_utilities", "torchmetrics", "timm", "transformers", "gradio")
sys.modules.update(dict.fromkeys(missing))
from vitrail.programs import main
sys.exit(main("vitrail"))
"""


@contextmanager
def started(*arguments: str, code: str = WITHOUT_TORCH) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process of a server and its address."""
    command = [sys.executable, "-c", code, "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        line = process.stdout.readline()
        if not line.startswith("Vitrail: http"):
            process.kill()
            raise AssertionError(process.stderr.read())
        yield process, line.split()[1].removesuffix("/docs")
    finally:
        process.kill()
        process.wait(10)


def accepts(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.TransportError:
        return False
    return True


def refused(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["serve", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.slow
def test_an_export_is_served_without_torch_and_predicts_as_the_run() -> None:
    content = encoded("PNG", (32, 32))
    with started(str(kinds_onnx())) as (_, url):
        response = httpx.post(f"{url}/v1/classify", files={"images": ("a.png", content)}, timeout=30)
        about = httpx.get(f"{url}/v1/model").json()
    assert about["engine"] == "onnx"
    assert response.status_code == 200
    [found] = response.json()["predictions"]
    [expected] = Run(kinds_run()).iter_predictions([("a.png", content)])
    for task, one in expected.tasks.items():
        result = found["tasks"][task]
        assert result["calibrated"] == (one.calibrated and one.kind != "regression")
        if one.kind == "regression":
            assert result["value"] == pytest.approx(one.value, rel=1e-4)
            assert result["deviation"] == pytest.approx(one.deviation, rel=1e-4)
        else:
            shares = {choice["label"]: choice["confidence"] for choice in result["top_k"]}
            assert shares == pytest.approx(dict(one.top_k(5)), abs=1e-4)


@pytest.mark.slow
def test_a_dual_encoder_searches_and_compares_without_torch(tmp_path: Path) -> None:
    gallery = tmp_path / "gallery"
    assert main(["index", "--run", str(flowers_run()), "--gallery", str(gallery)]) == 0
    run = ServedRun(flowers_run(), device="cpu")
    assert flowers_onnx().parent == flowers_run() / "export"
    with started(str(flowers_run()), "--engine", "onnx", "--gallery", str(gallery)) as (_, url):
        found = httpx.post(f"{url}/v1/search", data={"text": "a rose", "top_k": "3"}, timeout=30).json()["results"]
        compared = httpx.post(
            f"{url}/v1/zero-shot",
            files={"images": ("a.png", encoded("PNG", (32, 32)))},
            data={"labels": ["rose", "lily"]},
            timeout=30,
        ).json()["predictions"][0]["labels"]
        image = httpx.get(f"{url}{found[0]['image_url']}", timeout=30)
    assert (image.status_code, image.content[:2]) == (200, b"\xff\xd8")
    from retrieval.gallery import Gallery

    [expected] = Gallery.open(str(gallery)).nearest(run.encode_texts(["a rose"]), 3)
    assert [one["score"] for one in found] == pytest.approx([float(hit.score) for hit in expected], abs=1e-4)
    scale = run.logit_scale
    margin = scale * (compared[0]["similarity"] - compared[1]["similarity"]) / run.temperatures.get("class", 1.0)
    assert compared[0]["confidence"] == pytest.approx(1 / (1 + 2.718281828**-margin), abs=1e-3)


@pytest.mark.slow
def test_a_request_that_runs_is_answered_after_sigterm() -> None:
    with started(str(kinds_onnx())) as (process, url):
        begun, codes = threading.Event(), list[int]()

        def parts() -> Iterator[bytes]:
            yield b'--b\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
            begun.set()
            assert ended.wait(10)
            yield encoded("PNG", (32, 32)) + b"\r\n--b--\r\n"

        ended = threading.Event()
        headers = {"content-type": "multipart/form-data; boundary=b"}

        def ask() -> None:
            codes.append(httpx.post(f"{url}/v1/classify", content=parts(), headers=headers, timeout=30).status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        assert begun.wait(10)
        while httpx.get(f"{url}/metrics").text.count("vitrail_requests_running 1.0") == 0:
            pass
        process.send_signal(signal.SIGTERM)
        while accepts(url):
            pass
        ended.set()
        thread.join(30)
        assert codes == [200]
        assert process.wait(30) in (0, -signal.SIGTERM)


def test_a_taken_port_is_reported_before_the_model_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot be used" in refused(["no-such-run", "--port", taken.getsockname()[1]], capsys)
    assert "no such run directory" in refused(["no-such-run", "--port", 0], capsys)


def test_others_are_served_only_with_a_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VITRAIL_SERVE_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "example.org"):
        assert "give a token" in refused(["run", "--host", host], capsys)
    short = tmp_path / "token"
    for text in ("", "short", "a" * 15, "é" * 20, "a" * 20 + "\n" + "b" * 20):
        short.write_text(text, encoding="utf-8")
        assert "16 or more printable" in refused(["run", "--token-file", short], capsys)
    assert "cannot be read" in refused(["run", "--token-file", tmp_path / "none"], capsys)
    monkeypatch.setenv("VITRAIL_SERVE_TOKEN", "short")
    assert "$VITRAIL_SERVE_TOKEN" in refused(["run"], capsys)
    monkeypatch.setenv("VITRAIL_SERVE_TOKEN", "a" * 32)
    assert "no such run directory" in refused(["no-such-run", "--host", "0.0.0.0", "--port", 0], capsys)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--max-bytes", 0], "--max-bytes: must be at least 1"),
        (["--queue", -1], "--queue: must be at least 1"),
        (["--rate", -1], "at least 0"),
        (["--allow-host", "a b"], "must be one host name"),
        (["--port", 65536], "--port 65536"),
    ],
)
def test_options_out_of_range(arguments: list[object], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert reason in refused(["run", *arguments], capsys)


def test_a_run_without_an_export_has_no_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    assert "vitrail export" in refused([tmp_path, "--engine", "onnx", "--port", 0], capsys)
