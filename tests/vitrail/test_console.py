from __future__ import annotations

import pytest

from vitrail import console as progress


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
