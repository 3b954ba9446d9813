"""One line for a mistake, exit code 2."""

from __future__ import annotations

import errno
import os
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


def _os_error(number: int, *files: str) -> OSError:
    first, second = [*files, None, None][:2]
    return OSError(number, os.strerror(number), first, None, second)


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (_os_error(errno.EACCES, "run/report.html"), ["run/report.html: Permission denied"]),
        (_os_error(errno.EROFS, "run/report.html"), ["run/report.html: Read-only file system"]),
        (_os_error(errno.ENOENT, "gone.txt"), ["gone.txt: No such file or directory"]),
        (_os_error(errno.ENAMETOOLONG, "x" * 300), ["File name too long"]),
        (_os_error(errno.ENOSPC, "run/best.ckpt"), ["run/best.ckpt: cannot be written", "free some space"]),
        (_os_error(errno.EACCES, ".best.part", "run/best.ckpt"), ["run/best.ckpt: Permission denied"]),
        (OSError("a library's own words"), ["a library's own words"]),
        (PermissionError("Caught it in worker 0.\nTraceback …\nPermissionError: [Errno 13] 'a.png'"), ["'a.png'"]),
        (RuntimeError("IoError(Os { code: 13, kind: PermissionDenied, message: \"Permission denied\" })"), ["denied"]),
        (RuntimeError("[enforce fail at x.cc] . PytorchStreamWriter failed writing file data/1"), ["space"]),
    ],
)  # fmt: skip
def test_a_file_that_the_system_refuses_is_one_line(
    error: Exception, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    assert run_reporting_user_errors(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in parts)


def test_errors_of_ours_keep_their_traceback() -> None:
    for error in (RuntimeError("shapes differ"), KeyError("os"), BrokenPipeError(errno.EPIPE, "of a worker")):

        def command(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            run_reporting_user_errors(command)
