"""Ctrl-C: one line, the command that goes on, exit code 130."""

from __future__ import annotations

import sys
from typing import NoReturn

import pytest

from vitrail.errors import EXIT_INTERRUPTED, run_program, run_reporting_user_errors, was_interrupted


def interrupted() -> NoReturn:
    raise KeyboardInterrupt


def as_lightning_does() -> NoReturn:
    try:
        interrupted()
    except KeyboardInterrupt:
        sys.exit(1)


def test_ctrl_c_is_one_line_with_the_same_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "-m", "retrieval", "index", "--run", "a run"])
    for command in (interrupted, as_lightning_does):
        assert run_reporting_user_errors(command) == 130
        assert capsys.readouterr().err == (
            "interrupted; run the same command again: python3 -m retrieval index --run 'a run'\n"
        )
    assert run_program(interrupted) == EXIT_INTERRUPTED == 130
    assert capsys.readouterr().err.startswith("interrupted; ")


def test_a_command_may_know_better_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise KeyboardInterrupt("go on with: this")

    assert run_reporting_user_errors(command) == 130
    assert capsys.readouterr().err == "interrupted; go on with: this\n"


def test_one_of_several_processes_tells_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_reporting_user_errors(interrupted) == 130
    assert capsys.readouterr().err == ""


def test_other_exits_stay_what_they_are() -> None:
    assert run_program(lambda: 3) == 3
    assert not was_interrupted(SystemExit(1))
    assert not was_interrupted(ValueError())
    with pytest.raises(SystemExit):
        run_reporting_user_errors(lambda: sys.exit(1))
