"""The load test counts what a server answers, and fails where it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.api.guard import Settings
from app.api.server import build_app, server_config
from app.state.exports import ServedExport
from benchmarks.app.serve import clients, processor_seconds
from tests.app.hostile_files import encoded
from tests.app.running import running
from tests.support.runs import kinds_onnx


def test_clients_count_answers_and_notice_refusals(tmp_path: Path) -> None:
    photo, settings = tmp_path / "photo.jpg", Settings(rate=0)
    photo.write_bytes(encoded("JPEG", (32, 32)))
    before = processor_seconds(os.getpid())
    with running(server_config(build_app(ServedExport(kinds_onnx()), None, settings), settings)) as served:
        port = int(served.url.rpartition(":")[2])
        found = clients(port, str(photo), 2, 0.2)
        assert found["images"] >= 2
        assert 0 < found["p95"] < 10
        photo.write_bytes(b"no image")
        with pytest.raises(RuntimeError, match="415"):
            clients(port, str(photo), 2, 0.2)
    assert processor_seconds(os.getpid()) > before
