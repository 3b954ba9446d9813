from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.support.runs import MadePhotos, tiny_classifier, tiny_trainer
from vitrail.errors import (
    EXIT_INTERRUPTED,
    UserError,
    one_line,
    refuse_passwords,
    run_program,
    run_reporting_user_errors,
    same_command,
    was_interrupted,
)


class Base:
    def __init__(self, depth: int = 1, option: dict[str, int] | None = None) -> None:
        self.depth = depth
        self.option = option


class Refusing(Base):
    def __init__(self) -> None:
        raise UserError("depth: too deep")


def fail(error: BaseException) -> NoReturn:
    raise error


def parse(*arguments: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--epochs", type=int | None)
    parser.add_subclass_arguments(Base, "data")
    parser.parse_args(list(arguments))


class Broken(Callback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        raise ValueError("a bug")


def train(**options: Any) -> None:
    tiny_trainer(Path(), **options).fit(tiny_classifier(), MadePhotos())


def instantiate_callback() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=list[Callback] | Callback | None)
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
    values = parser.parse_object({"callback": {**stopping, "init_args": {"monitor": "val/loss", "mode": "foo"}}})
    parser.instantiate_classes(values)


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (lambda: Trainer(accelerator="cpu", devices=0), "devices"),
        (lambda: Trainer(strategy="ddq"), "invalid strategy name"),
        (lambda: Trainer(max_time="5 minutes"), "valid duration"),
        (lambda: torch.optim.AdamW([torch.zeros(1)], lr=-1.0), "Invalid learning rate"),
        (lambda: DataLoader(TensorDataset(torch.zeros(1)), num_workers=-1), "num_workers"),
        (lambda: train(val_check_interval=100), "val_check_interval"),
        (lambda: nn.BatchNorm1d(3)(torch.zeros(1, 3)), "loader.batch_size: BatchNorm"),
        (instantiate_callback, "EarlyStopping: `mode` can be min, max, got foo"),
    ],
)
def test_what_lightning_and_torch_refuse_is_one_line(
    command: Callable[[], None], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_reporting_user_errors(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert word in line


@pytest.mark.parametrize(
    "bug",
    [
        lambda: train(callbacks=[Broken()], fast_dev_run=True),
        lambda: next(iter(DataLoader([object()]))),  # type: ignore[arg-type]  # cannot be collated
        lambda: torch.zeros(2) @ torch.zeros(3),
        lambda: Trainer(unknown=3),  # type: ignore[call-arg]  # the mistake
        lambda: getattr(Trainer, "nothing"),  # noqa: B009  # a name that is not there
    ],
)
def test_bugs_stay_tracebacks(bug: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, RuntimeError, TypeError, AttributeError)):
        run_reporting_user_errors(bug)


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError(), RuntimeError("shapes differ"), KeyError("os"), BrokenPipeError(errno.EPIPE, "of a worker")],
)
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_reporting_user_errors(lambda: fail(error))


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


def test_a_user_error_is_printed_without_traceback_unless_debugging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = UserError("labels.csv:3: no such image")
    assert run_reporting_user_errors(lambda: fail(error)) == 2
    assert capsys.readouterr().err == "error: labels.csv:3: no such image\n"
    assert run_reporting_user_errors(lambda: None) == 0
    monkeypatch.setenv("VITRAIL_DEBUG", "1")
    with pytest.raises(UserError):
        run_reporting_user_errors(lambda: fail(error))


def test_message_without_a_key_is_kept() -> None:
    assert one_line("something\n  else") == "something else"


def test_the_error_of_a_constructor_is_printed_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(Base, "data")
        config = parser.parse_args(["--data", f"{__name__}.Refusing"])
        parser.instantiate(config)

    assert run_reporting_user_errors(command) == 2
    assert capsys.readouterr().err == "error: depth: too deep\n"


@pytest.mark.parametrize("lines", [1, 100_000])  # written when the program ends, or before
def test_output_that_is_no_longer_read_ends_the_command_quietly(lines: int) -> None:
    program = f"""
import sys
from vitrail.errors import run_reporting_user_errors
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
    assert run_reporting_user_errors(lambda: fail(error)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in parts)


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


def test_a_command_may_say_how_to_continue_and_only_one_process_prints_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_reporting_user_errors(lambda: fail(KeyboardInterrupt("go on with: this"))) == 130
    assert capsys.readouterr().err == "interrupted; go on with: this\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_reporting_user_errors(interrupted) == 130
    assert capsys.readouterr().err == ""


def test_other_exits_stay_what_they_are() -> None:
    assert run_program(lambda: 3) == 3
    assert not was_interrupted(SystemExit(1))
    assert not was_interrupted(ValueError())
    with pytest.raises(SystemExit):
        run_reporting_user_errors(lambda: sys.exit(1))


def test_the_command_to_repeat_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["/usr/bin/python", "-m", "experiments", "sweep", "a.yaml", "--storage", "postgresql://me:secret@host/db"]
    monkeypatch.setattr(sys, "orig_argv", command)
    assert same_command() == "python -m experiments sweep a.yaml --storage postgresql://me:***@host/db"


@pytest.mark.parametrize(
    "address",
    ["s3://key:se/c:ret@bucket/a.tar", "https://me:secret@host/a.tar", "https://secret@host/a", "gs://:secret@b/c"],
)
def test_addresses_with_passwords_are_refused_without_showing_them(address: str) -> None:
    with pytest.raises(UserError, match=r"data\.shards\.train: .*\*\*\*@.* has a password") as caught:
        refuse_passwords({"data": {"shards": {"train": ["a.tar", address]}}}, "")
    assert "ret@" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["s3://bucket/a@2x.tar", "http://host:8080/a@b.tar", "abfs://box@account.dfs.core.windows.net/a", "a:b@c", "", 3],
)
def test_addresses_without_passwords_are_not_refused(address: object) -> None:
    refuse_passwords({"train": address}, "data")
