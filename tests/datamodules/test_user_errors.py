"""One line for a mistake, exit code 2."""

from __future__ import annotations

import subprocess
import sys

import pytest
from jsonargparse import ArgumentParser

from datamodules.schema import UserError
from datamodules.user_errors import one_line, run_reporting_user_errors


class Base:
    def __init__(self, depth: int = 1, option: dict[str, int] | None = None) -> None:
        self.depth = depth
        self.option = option


class Refusing(Base):
    def __init__(self) -> None:
        raise UserError("depth: too deep")


def parse(*arguments: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--epochs", type=int | None)
    parser.add_subclass_arguments(Base, "data")
    parser.parse_args(list(arguments))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--epochs=x"], ["epochs", "int", "x"]),
        (["--data", f"{__name__}.Base", "--data.depth=deep"], ["data", "depth", "deep"]),
        (["--data", f"{__name__}.Base", "--data.option.a=b"], ["data", "option", "b"]),
        (["--data", "Nothing"], ["data", "Nothing"]),
        (["--wrong=3"], ["wrong"]),
    ],
)
def test_parser_errors_become_one_line_that_names_key_and_value(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_reporting_user_errors(lambda: parse(*arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error
    assert "NoneType" not in error


def test_user_error_is_printed_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise UserError("labels.csv:3: no such picture")

    assert run_reporting_user_errors(command) == 2
    assert capsys.readouterr().err == "error: labels.csv:3: no such picture\n"


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> None:
        raise UserError("x")

    monkeypatch.setenv("VITRINE_DEBUG", "1")
    with pytest.raises(UserError):
        run_reporting_user_errors(command)


def test_other_errors_are_not_hidden() -> None:
    def command() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_reporting_user_errors(command)


def test_success_is_zero() -> None:
    assert run_reporting_user_errors(lambda: None) == 0


def test_message_without_a_key_is_kept() -> None:
    assert one_line("something\n  else") == "something else"


def test_user_error_that_a_constructor_raises_is_told_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(Base, "data")
        config = parser.parse_args(["--data", f"{__name__}.Refusing"])
        parser.instantiate(config)

    assert run_reporting_user_errors(command) == 2
    assert capsys.readouterr().err == "error: depth: too deep\n"


@pytest.mark.parametrize("lines", [1, 100_000])  # written when the program ends, or before
def test_output_that_nobody_reads_ends_the_command_quietly(lines: int) -> None:
    program = f"""
import sys
from datamodules.user_errors import run_reporting_user_errors
sys.stdin.read()
sys.exit(run_reporting_user_errors(lambda: print("a line\\n" * {lines})))
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_another_broken_pipe_is_an_error_of_ours() -> None:
    def command() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_reporting_user_errors(command)
