"""Tests of the command line: what it refuses before anything is loaded, and what it hands on."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest

from app.__main__ import main
from app.command import listening_socket
from app.state.context import AppContext


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be loaded and served, instead of doing it."""
    seen: list[Any] = []

    def load(*given: Any, **named: Any) -> AppContext:
        seen.append((*given, named))
        return AppContext({}, {})

    monkeypatch.setattr("app.state.startup.load", load)

    def serve(context: AppContext, listening: socket.socket, host: str, **named: Any) -> None:
        seen.append((host, listening.getsockname()[1], named))

    monkeypatch.setattr("app.server.serve", serve)
    monkeypatch.setattr("app.command.listening_socket", _Bound)
    return seen


class _Bound:
    """A socket that binds nothing: the tests are about addresses that are not all this machine's."""

    def __init__(self, host: str, port: int) -> None:
        self._name = host, port

    def __enter__(self) -> _Bound:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def getsockname(self) -> tuple[str, int]:
        return self._name


def test_it_listens_to_this_machine_only(handed_on: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", "a", "--run", "b", "--gallery", "g"]) == 0
    assert handed_on == [
        ([Path("a"), Path("b")], ["g"], {"demo": False, "root": Path("runs"), "data_roots": []}),
        ("127.0.0.1", 7860, {"allowed": [], "prefix": ""}),
    ]
    said = capsys.readouterr()
    assert said.out == "Vitrail: http://127.0.0.1:7860 (Ctrl-C ends it)\n"
    assert "warning" not in said.err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.9", "example.org"])
def test_other_machines_are_let_in_only_on_purpose(
    host: str, handed_on: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--demo", "--host", host]) == 2
    said = capsys.readouterr().err
    assert "--allow-remote" in said
    assert said.count("\n") == 1
    assert not handed_on
    assert main(["--demo", "--host", host, "--allow-remote"]) == 0
    assert "no login and no encryption" in capsys.readouterr().err
    assert handed_on[1][:2] == (host, 7860)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to serve"),
        (["--demo", "--port", "70000"], "--port 70000: must be 0 to 65535"),
        (["--demo", "--port", "-1"], "--port -1"),
        (["--demo", "--allow-host", "https://a.example"], "--allow-host https://a.example: must be one host name"),
        (["--demo", "--root-path", "vitrail"], "--root-path vitrail: must be the path"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, handed_on: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not handed_on


def test_without_the_extra_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "gradio" else find(name))
    assert main(["--demo"]) == 2
    assert "pip install -e '.[app]'" in capsys.readouterr().err


def test_ctrl_c_while_loading_ends_it_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> AppContext:
        raise KeyboardInterrupt

    monkeypatch.setattr("app.state.startup.load", interrupted)
    assert main(["--demo"]) == 130
    message = capsys.readouterr().err
    assert message.strip().startswith("interrupted; run the same command again: ")
    assert len(message.strip().splitlines()) == 1


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "missing", tmp_path):
        assert main(["--run", str(path)]) == 2
    assert "no such run directory" in capsys.readouterr().err
    assert main(["--gallery", str(tmp_path / "missing")]) == 2
    assert "there is no gallery here" in capsys.readouterr().err


def test_a_port_that_is_taken_is_reported_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("app.state.startup.load", lambda *given, **named: pytest.fail("it loads"))
    with listening_socket("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        assert main(["--demo", "--port", str(port)]) == 2
    assert f"--port {port}: cannot be used" in capsys.readouterr().err


def test_the_place_behind_a_proxy_is_handed_on(handed_on: list[Any]) -> None:
    assert main(["--demo", "--allow-host", "A.example", "--allow-host", "b.example:8443", "--root-path", "/v/"]) == 0
    assert handed_on[1] == ("127.0.0.1", 7860, {"allowed": ["a.example", "b.example:8443"], "prefix": "/v"})
