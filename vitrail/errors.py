"""User errors and Ctrl-C as one line instead of a traceback."""

from __future__ import annotations

import errno
import linecache
import os
import re
import select
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, an exceeded quota, and a file larger than allowed."""


class UserError(ValueError):
    """An error that the user can fix: one line with what, where (file and row, or YAML key) and the fix.

    Commands print it without a traceback and exit with code 2.
    """


def first_line(error: BaseException) -> str:
    """First line of an error's text, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as by SIGINT."""


def run_program(main: Callable[[], int]) -> int:
    """Run a program and return its exit code; Ctrl-C during imports is reported, too."""
    try:
        return main()
    except KeyboardInterrupt as error:
        return report_interruption(str(error))


def was_interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C ended a command; Lightning turns it into an exit with code 1."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    )


def report_interruption(how_to_go_on: str = "") -> int:
    """Print one line after Ctrl-C on the first of several processes, and return the exit code.

    Args:
        how_to_go_on: how to continue, by default by the same command.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"interrupted; {how_to_go_on or f'run the same command again: {same_command()}'}\n")
    return EXIT_INTERRUPTED


def same_command() -> str:
    """The command line of this process, to be run again, without passwords."""
    return without_passwords(shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]))


_PASSWORD = re.compile(r"([a-z][a-z0-9+.-]*://[^:/@\s]*):(?!\d+/)[^@\s]+@", re.IGNORECASE)
_TOKEN = re.compile(r"(https?://)(?!\*\*\*@)[^:/@\s]+@", re.IGNORECASE)


def without_passwords(text: str) -> str:
    """Return a text in which the passwords of addresses are stars: logs are read by others.

    Example:
        >>> without_passwords("sweep --storage postgresql://me:secret@host/sweeps")
        'sweep --storage postgresql://me:***@host/sweeps'
    """
    return _TOKEN.sub(r"\1***@", _PASSWORD.sub(r"\1:***@", text))


def refuse_passwords(content: object, where: str) -> None:
    """Refuse addresses with a password or a key in them: they would be written to records, checkpoints and logs.

    Args:
        content: an address, or a configuration.
        where: file, option or YAML key, for the message.

    Raises:
        UserError: names the key and the address, without its password.
    """
    if isinstance(content, Mapping):
        for key, value in content.items():
            refuse_passwords(value, f"{where}.{key}".lstrip("."))
    elif isinstance(content, list | tuple):
        for value in content:
            refuse_passwords(value, where)
    elif isinstance(content, str) and (shown := without_passwords(content)) != content:
        raise UserError(
            f"{where}: {shown[:200]} has a password in it, which would be recorded; leave it out and give it by the "
            "store's own variables or files (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.netrc)"
        )


EXIT_USER_ERROR = 2
"""Exit code after a user error."""

EXIT_BROKEN_PIPE = 141
"""Exit code of a command whose output is no longer read, as by SIGPIPE."""

_SCAFFOLDING = ("Problem with", "Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a path but")
"""Lines of jsonargparse's report without information."""

_OUT_OF_RANGE = re.compile(
    r"1 validation error for [^;\n]+[;\n]\s*Input should ([^\[]+?) \[type=.*?\]([;\n].*pydantic\.dev\S*)?"
)
"""Pydantic's report of a number out of range; the group is the restriction."""


def run_reporting_user_errors(command: Callable[[], None]) -> int:
    """Run a command; print user errors as one line instead of a traceback, unless ``VITRAIL_DEBUG=1`` is set.

    Returns:
        The exit code: 0, 2 after a user error or a file that cannot be read or written, 130 after Ctrl-C, or 141 if the
        output is no longer read, as by ``head``.
    """
    _report_former_variables()
    try:
        command()
        sys.stdout.flush()
    except (KeyboardInterrupt, SystemExit) as error:
        if not was_interrupted(error):
            raise
        return report_interruption(str(error) if isinstance(error, KeyboardInterrupt) else "")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return EXIT_BROKEN_PIPE
        line = _line_for_user(error)
        if line is None or os.environ.get("VITRAIL_DEBUG") == "1":
            raise
        sys.stderr.write(f"error: {line}\n")
        return EXIT_USER_ERROR
    return 0


def _report_former_variables() -> None:
    """Warn of environment variables of version 0.1 that are no longer read."""
    for name in sorted(os.environ):
        present = name.replace("VITRINE_", "VITRAIL_", 1)
        if name.startswith("VITRINE_") and present not in os.environ:
            sys.stderr.write(f"warning: {name} is no longer read; set {present} instead\n")


def _reader_has_gone() -> bool:
    """Whether our output is no longer read; the rest of it is then discarded."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError):
        return False
    if not hasattr(select, "poll"):
        return False  # Windows
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


EXTRAS = {
    "alembic": "sweeps",
    "coremltools": "coreml",
    "executorch": "executorch",
    "fastapi": "serve",
    "fastapi_offline": "serve",
    "gradio": "app",
    "lancedb": "retrieval",
    "mlflow": "mlflow",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "open_clip": "open_clip",
    "openvino": "openvino",
    "optuna": "sweeps",
    "psycopg": "postgresql",
    "s3fs": "s3",
    "sqlalchemy": "sweeps",
    "sqlglot": "retrieval",
    "prometheus_client": "serve",
    "starlette": "serve",
    "tensorboard": "tensorboard",
    "torchao": "export",
    "uvicorn": "serve",
}
"""The extra that a library belongs to; others are said to be missing where they are used."""


def _line_for_user(error: BaseException) -> str | None:
    """Return the line for a user error; None for a bug."""
    cause: BaseException | None = error
    # jsonargparse wraps the error of a constructor into a report of all types it tried.
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get(str(error.name).partition(".")[0])):
        return f"{error.name} is not installed; install it with: pip install 'vitrail[{extra}]'"
    if (line := _line_of_system(error)) is not None:
        return line
    from jsonargparse import ArgumentError  # not needed until something goes wrong

    return one_line(str(error)) if isinstance(error, ArgumentError) else _refusal_by_library(error)


def _refusal_by_library(error: BaseException) -> str | None:
    """Return the line for a setting that Lightning or PyTorch refuse; None for a bug.

    Few of their refusals have a class of their own. A ``raise`` statement with a message is one; an error that merely
    happens inside of them, such as an unknown attribute, is not, nor is a batch that cannot be collated.
    """
    message = " ".join(str(error).split())
    classes = {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, ValueError) and message.startswith("Expected more than 1 value per channel when training"):
        return (
            "data.init_args.loader.batch_size: BatchNorm cannot normalise a training batch of one sample; use batches "
            "of 2 or more, or drop_last: true where the last one of an epoch has a single sample"
        )
    if "OutOfMemoryError" in classes and _raised_in(error)[0].startswith(("torch", "lightning_modules", "timm")):
        return f"data loader.batch_size, image.size: the accelerator's memory is full; lower one of them ({message})"
    module, statement = _raised_in(error)
    if module.startswith("jsonargparse.") and isinstance(error, ValueError):
        return _refusal_by_constructor(str(error))
    is_refusal = "MisconfigurationException" in classes or "use_deterministic_algorithms(True)" in message
    if statement.startswith("raise ") and module.startswith(_REFUSING) and not module.startswith(_COLLATING):
        is_refusal |= isinstance(error, _REFUSALS) and bool(message)
    return f"{message} (VITRAIL_DEBUG=1 shows where)" if is_refusal else None


def _refusal_by_constructor(message: str) -> str:
    """Extract a constructor's own message from jsonargparse's report."""
    named = re.search(r"class_path='([^']+)'", message)
    reasons = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip().startswith("- ")]
    reasons = [reason for reason in reasons if not reason.startswith("Expected a ")]
    if not reasons:
        return one_line(message)
    return f"{named[1] if named else 'configuration'}: {'; '.join(dict.fromkeys(reasons))}"


_REFUSING = ("lightning.", "torch.optim.", "torch.utils.data.", "torch.distributed.")
_COLLATING = "torch.utils.data._utils."
_REFUSALS = (ValueError, TypeError, RuntimeError, ImportError, KeyError)  # KeyError: a checkpoint lacks an entry


def _raised_in(error: BaseException) -> tuple[str, str]:
    """Name of the module that raised an error, and the source line."""
    trace = error.__traceback__
    if trace is None:
        return "", ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
    return str(trace.tb_frame.f_globals.get("__name__", "")), line.strip()


def _line_of_system(error: BaseException) -> str | None:
    """Return the line for a file that cannot be read or written, otherwise None."""
    if isinstance(error, BrokenPipeError):
        return None  # of a worker process
    number, where, reason = _system_error(error)
    if number is None:
        # Libraries raise it with a text only, and a loader's worker sends a whole traceback.
        return _last_line(str(error)) if isinstance(error, OSError) else None
    if number in DISK_FULL:
        return f"{where}cannot be written ({reason}); free some space; what was there is untouched"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}{reason}; change its permissions, or choose another place; what was there is untouched"
    return f"{where}{reason}; check the path"


def _system_error(error: BaseException) -> tuple[int | None, str, str]:
    """Number, file and reason of an error of the operating system; no number for other errors."""
    if isinstance(error, OSError) and error.errno is not None:
        name = error.filename2 if error.filename2 is not None else error.filename
        return error.errno, f"{name}: " if name is not None else "", error.strerror or str(error)
    # PyTorch and libraries in Rust have their own exceptions.
    text = str(error)
    if isinstance(error, RuntimeError) and "PytorchStreamWriter failed writing file" in text:
        return errno.ENOSPC, "", _last_line(text)
    found = re.search(r"\b(?:os error|Os \{ code:) (\d+)", text)
    return (int(found[1]), "", _last_line(text)) if found else (None, "", "")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "a file cannot be read or written"


_NUMBER = re.compile(r"Not of type \w+: (?:(\S+) )?does not conform to restriction (.+)")
_CHOICE = re.compile(r"Expected a (?:typing\.)?Literal\[(.+?)\](?:\. Got value: (.+))?")
"""What jsonargparse reports of a number out of range and of an unknown choice."""


def _in_range(found: re.Match[str]) -> str:
    return f"must be {found[2].replace('v', '')}" + (f"; got {found[1]}" if found[1] else "")


def _one_of(found: re.Match[str]) -> str:
    return f"must be one of {found[1].replace(chr(39), '')}" + (f"; got {found[2]}" if found[2] else "")


def one_line(message: str) -> str:
    """Condense jsonargparse's report, a tree of all types it tried, to the innermost key and reason."""
    keys = re.findall(r'[Pp]arser key "([^"]+)"', message)
    if not keys:
        return " ".join(message.split())
    class_path = re.search(r"Problem with given class_path '([^']+)'", message)
    where = ".".join(keys) + (f" ({class_path[1]})" if class_path else "")
    message = _OUT_OF_RANGE.sub(r"must \1", message)
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    # The text after the key, and the leaf nodes of the tree.
    lines = [re.sub(r'^.*[Pp]arser key "[^"]+":? ?', "", line) for line in lines]
    lines = [_CHOICE.sub(_one_of, _NUMBER.sub(_in_range, line)) for line in lines]
    reasons = [line for line in lines if line and "NoneType" not in line and not line.startswith(_SCAFFOLDING)]
    given = re.findall(r"Given value: (?!NestedArg)(.+)", message)
    reason = "; ".join(dict.fromkeys(reasons)) or "not a valid value"
    return f"{where}: {reason}" + (f"; got {given[0]}" if given and given[0] not in reason else "")
