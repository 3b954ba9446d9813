"""Tables and progress bars."""

from __future__ import annotations

import json

import pytest

from vitrail import console as progress
from vitrail.console import Table


@pytest.mark.parametrize("patience", [1e9, -1.0])
def test_items_pass_unchanged(
    patience: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", patience)
    assert list(progress.tracked(iter("abc"), "doing", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == "", "no bar where there is no terminal"


def test_a_bar_is_shown_on_a_terminal_where_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert list(progress.tracked([1, 2], "doing", 2)) == [1, 2]
    assert capsys.readouterr().err == "", "it was quick"
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    assert list(progress.tracked([1, 2], "doing", 2)) == [1, 2]
    assert "doing" in capsys.readouterr().err


def test_the_bar_is_taken_away_when_the_work_fails() -> None:
    bar = progress.tracked([1, 2], "doing", 2)
    assert next(bar) == 1
    del bar
    assert list(progress.tracked([3], "doing", 1)) == [3]


def test_a_table_is_shown_as_text_markdown_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(["run", "n"], [["[red]a|b", "1"], ["\x1b[2Jc\x07", "2"]], title="[bold]", styles={1: "bold"})
    table.show()
    shown = capsys.readouterr().out
    assert "[red]a|b" in shown
    assert "[bold]" in shown
    assert "\x1b[2J" not in shown
    assert "\x07" not in shown
    table.show(as_markdown=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == ["[bold]", "", "| run | n |", "| --- | --- |", r"| [red]a\|b | 1 |"]
    table.show(as_json=True)
    assert json.loads(capsys.readouterr().out)[0] == {"run": "[red]a|b", "n": "1"}


def test_json_of_a_table_may_be_other_values() -> None:
    table = Table(["n"], [["–"]], values=[{"n": float("nan"), "interval": (0.1, float("nan"))}])
    assert json.loads(table.json()) == [{"n": None, "interval": [0.1, None]}]
