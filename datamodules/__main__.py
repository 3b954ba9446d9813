"""The command line of the data sets: ``python -m datamodules audit --config experiments/quickstart.yaml``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from datamodules.schema import UserError

if TYPE_CHECKING:
    from datamodules.audit import AuditReport
    from datamodules.base import ImageDataModule

EXIT_USER_ERROR = 2
"""Exit code for leaks that are not allowed and for everything else that the user can mend."""

USAGE = "python -m datamodules audit --config FILE [--config OVERLAY] [--data.init_args.KEY VALUE] [--json FILE]"


def main(args: list[str]) -> int:
    """Runs the command line.

    Args:
        args: arguments without the program's name.

    Returns:
        Exit code: 0, or 2 for leaks that are not allowed and for mistakes of the user, told in one line.
    """
    try:
        if not args or args[0] != "audit":
            asks = bool(args) and args[0] in ("-h", "--help")
            (sys.stdout if asks else sys.stderr).write(f"usage: {USAGE}\n")
            return 0 if asks else EXIT_USER_ERROR
        _audit(args[1:])
    except Exception as error:
        line = _line_for_user(error)
        if line is None or os.environ.get("VITRINE_DEBUG") == "1":
            raise
        sys.stderr.write(f"error: {line}\n")
        return EXIT_USER_ERROR
    return 0


def _audit(args: list[str]) -> None:
    """Prints the report, writes it where that is asked for, and then refuses what a fit would refuse."""
    from rich.console import Console

    from datamodules.audit import audit
    from datamodules.audit_tables import print_report

    datamodule, json_file = _parse(args)
    report = audit(datamodule)
    print_report(report, Console())
    if json_file is not None:
        _write_json(Path(json_file), report)
    report.refuse()


def _parse(args: list[str]) -> tuple[ImageDataModule, str | None]:
    """The DataModule that the experiment files and further arguments describe, and the file for the report."""
    from jsonargparse import ArgumentParser

    from datamodules.base import ImageDataModule

    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--config", action="append", default=[])
    known, rest = given.parse_known_args(args)

    parser = ArgumentParser(prog="python -m datamodules audit", usage=USAGE, exit_on_error=False)
    parser.add_argument(
        "--config", help="Experiment file whose data: part is used; of a later one only what it says differently."
    )
    parser.add_argument("--json", type=str | None, default=None, help="File to write the whole report to.")
    parser.add_subclass_arguments(ImageDataModule, "data", required=True, help="Data set, as in an experiment file.")
    data = _data_part([Path(name) for name in known.config])
    parsed = parser.parse_args([*(["--data", json.dumps(data)] if data else []), *rest])
    datamodule = parser.instantiate(parsed).data
    assert isinstance(datamodule, ImageDataModule)
    return datamodule, parsed.json


def _data_part(paths: list[Path]) -> dict[str, Any]:
    """What the experiment files say about the data, the later file last; everything else in them is left aside.

    As in a run, ``seed_everything`` is the seed of the data, on which random splits depend.

    Raises:
        UserError: for a file that cannot be read or says nothing about data.
    """
    data: dict[str, Any] = {}
    seed: dict[str, Any] = {}
    for path in paths:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise UserError(f"--config {path}: {reason}; give an experiment's YAML file") from error
        except yaml.YAMLError as error:
            raise UserError(f"--config {path}: not a YAML file ({' '.join(str(error).split())})") from error
        if not isinstance(content, dict):
            raise UserError(f"--config {path}: holds no keys; give an experiment's YAML file")
        part = content.get("data") or {}
        data = _merged(data, {"class_path": part} if isinstance(part, str) else part)
        if isinstance(content.get("seed_everything"), int):
            seed = {"init_args": {"seed": int(content["seed_everything"])}}
    if paths and not data:
        raise UserError(f"--config {paths[0]}: has no data: part; name the data set there with class_path: …")
    return _merged(seed, data) if data else {}


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The second over the first, key by key; another class does not inherit the arguments of the first."""
    if second.get("class_path") not in (None, first.get("class_path")) and "class_path" in first:
        return second
    merged = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(first.get(key), dict)
        merged[key] = _merged(first[key], value) if both else value
    return merged


def _write_json(path: Path, report: AuditReport) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from error


def _line_for_user(error: BaseException) -> str | None:
    """What to tell of a mistake of the user; nothing where the error is ours."""
    from jsonargparse import ArgumentError

    cause: BaseException | None = error
    # jsonargparse wraps what a constructor raises.
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    return " ".join(str(error).split()) if isinstance(error, ArgumentError) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
