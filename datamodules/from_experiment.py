"""A DataModule from the ``data:`` part of an experiment file, for command lines that need no model and no trainer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from datamodules.base import ImageDataModule
from datamodules.schema import UserError
from datamodules.trust import refuse_foreign_code, run_of_config


def data_parser(program: str, usage: str | None = None) -> ArgumentParser:
    """A parser that knows ``--config`` and ``--data``; the caller adds its own arguments.

    Args:
        program: name for messages.
        usage: one line, made by the parser if not given.
    """
    parser = ArgumentParser(prog=program, usage=usage, exit_on_error=False)
    parser.add_argument(
        "--config", help="Experiment file whose data: part is used; of a later one only what it says differently."
    )
    parser.add_subclass_arguments(ImageDataModule, "data", required=True, help="Data set, as in an experiment file.")
    return parser


def parse_data(parser: ArgumentParser, args: list[str]) -> tuple[ImageDataModule, Namespace]:
    """The DataModule that experiment files and further arguments describe.

    Args:
        parser: of ``data_parser``.
        args: command-line arguments; ``--config`` may stand in them several times.

    Returns:
        The DataModule, and all arguments as parsed.

    Raises:
        UserError: for a file that cannot be read or says nothing about data.
        ArgumentError: for arguments that are unknown or of the wrong type.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", action="append", default=[])
    known, rest = files.parse_known_args(args)
    data = _data_part([Path(name) for name in known.config])
    parsed = parser.parse_args([*(["--data", json.dumps(data)] if data else []), *rest])
    datamodule = parser.instantiate(parsed).data
    assert isinstance(datamodule, ImageDataModule)
    return datamodule, parsed


def data_of_run(program: str, run: Path, args: Sequence[str] = ()) -> ImageDataModule:
    """The DataModule of a run directory, which somebody else may have made: no code of theirs is run.

    Args:
        program: name for messages.
        run: the run directory.
        args: command-line arguments that change it, such as ``--data.init_args.root FOLDER``.

    Raises:
        UserError: for a configuration that cannot be read, or names a class that is neither ours nor of a plugin.
        ArgumentError: for arguments that are unknown or of the wrong type.
    """
    config = run / "config.yaml"
    refuse_foreign_code({"data": read_experiment(config).get("data")}, config)
    return parse_data(data_parser(program), ["--config", str(config), *args])[0]


def _data_part(paths: list[Path]) -> dict[str, Any]:
    """What the experiment files say about the data, the later file last; everything else in them is left aside.

    As in a run, ``seed_everything`` is the seed of the data, on which random splits depend.

    Raises:
        UserError: for a file that cannot be read or says nothing about data.
    """
    data: dict[str, Any] = {}
    seed: dict[str, Any] = {}
    for path in paths:
        content = read_experiment(path)
        if run_of_config(path) is not None:
            refuse_foreign_code({"data": content.get("data")}, path)
        part = content.get("data") or {}
        data = merged(data, {"class_path": part} if isinstance(part, str) else part)
        if isinstance(content.get("seed_everything"), int):
            seed = {"init_args": {"seed": int(content["seed_everything"])}}
    if paths and not data:
        raise UserError(f"--config {paths[0]}: has no data: part; name the data set there with class_path: …")
    return merged(seed, data) if data else {}


def read_experiment(path: Path) -> dict[str, Any]:
    """What an experiment file or an overlay holds.

    Raises:
        UserError: for a file that cannot be read, is no YAML or holds no keys.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"--config {path}: {reason}; give an experiment's YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: holds no keys; give an experiment's YAML file")
    return content


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The second mapping over the first, key by key; another class does not inherit the arguments of the first."""
    if second.get("class_path") not in (None, first.get("class_path")) and "class_path" in first:
        return second
    both = dict(first)
    for key, value in second.items():
        nested = isinstance(value, dict) and isinstance(first.get(key), dict)
        both[key] = merged(first[key], value) if nested else value
    return both
