"""The short help of the stages describes the parser that runs them."""

from __future__ import annotations

import contextlib
import re

import pytest

from vitrail.programs import main


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with contextlib.suppress(SystemExit):
        main("vitrail", arguments)
    return capsys.readouterr().out


def test_options_and_sections_are_those_of_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "fit", "--help").partition("your own images:")[0]
    options = set(re.findall(r"^  --(\w+)", found, re.MULTILINE))
    sections = set(re.findall(r"^  (\w+)  ", found, re.MULTILINE))
    assert not options & sections
    usage = printed(capsys, "fit", "--help=all").partition("\n\n")[0]
    keys = set(re.findall(r"\[--(\w+)", usage))
    # The first two have no options.
    assert keys == (options | sections) - {"class_report", "retrieval"} | {"weights_only"}


def test_a_stage_without_data_of_ones_own_has_no_section_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    own = printed(capsys, "fit", "--help")
    assert "your own images:" in own
    assert printed(capsys, "fit", "-h") == own
    other = printed(capsys, "test", "--help")
    assert other.startswith("usage: ")
    assert "Evaluate a checkpoint on the test split." in other
    assert "your own images:" not in other
