"""The DataModule that an experiment file or a run describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from datamodules.base import ImageDataModule
from datamodules.table_file import SUFFIXES
from vitrail.config import FullNames, dump_yaml, merged, read_experiment, read_experiments, split_configs
from vitrail.errors import UserError
from vitrail.runs import run_of_config
from vitrail.trust import refuse_foreign_code
from vitrail.types import DEFAULT_SEED


class _Parser(FullNames, ArgumentParser):
    pass


def data_parser(program: str) -> ArgumentParser:
    """Return a parser that knows ``--config``, ``--data`` and ``--seed_everything``; the caller adds its arguments."""
    parser = _Parser(prog=program, exit_on_error=False)
    parser.add_argument(
        "--config", help="Experiment file whose data: part is used; a later one overrides what it names."
    )
    parser.add_argument(
        "--seed_everything", type=int, default=DEFAULT_SEED, help="Seed of the data, as in fit: splits depend on it."
    )
    parser.add_subclass_arguments(ImageDataModule, "data", required=True, help="Data set, as in an experiment file.")
    parser.link_arguments("seed_everything", "data.init_args.seed")
    return parser


def parse_data(parser: ArgumentParser, args: list[str]) -> tuple[ImageDataModule, Namespace]:
    """Return the DataModule that experiment files and further arguments describe, and all arguments as parsed.

    Raises:
        UserError: for a file that cannot be read or has no data.
        ArgumentError: for arguments that are unknown or of the wrong type.
    """
    paths, rest = split_configs(args)
    return _parse(parser, _read(paths), rest, f"--config {paths[0]}" if paths else "")


def load_datamodule(
    source: str | Path | Sequence[str | Path] | Mapping[str, Any], args: Sequence[str] = (), program: str = "vitrail"
) -> ImageDataModule:
    """Build a DataModule, with the seed that a fit would use.

    Args:
        source: a folder of images, a table of them (see ``Table``), an experiment file or several, the content of one,
            or a class such as ``Wares``.
        args: command-line arguments that change it, such as ``--data.init_args.root FOLDER``.
        program: name for messages.

    Raises:
        UserError: for a file that cannot be read, has no data, or is of a run and names foreign code.
        ArgumentError: for arguments that are unknown or of the wrong type.
    """
    if isinstance(source, Mapping):
        content = dict(source)
    elif not isinstance(source, str | Path):
        content = _read(source)
    elif Path(source).expanduser().is_dir():
        content = {"data": {"class_path": "datamodules.UnlabeledFolder", "init_args": {"root": str(source)}}}
    elif Path(source).suffix.lower() in SUFFIXES:
        content = {"data": {"class_path": "datamodules.Table", "init_args": {"path": str(source)}}}
    elif Path(source).suffix in (".yaml", ".yml", ".json"):
        content = _read([source])
    else:
        content = {"data": {"class_path": str(source) if "." in str(source) else f"datamodules.{source}"}}
    parser = data_parser(program)
    origin = (
        "experiment" if isinstance(source, Mapping) else f"{source if isinstance(source, str | Path) else source[0]}"
    )
    overlays, rest = split_configs(args)
    return _parse(parser, merged(content, _read(overlays)), rest, origin)[0]


def _read(paths: Sequence[str | Path]) -> dict[str, Any]:
    for path in paths:
        if run_of_config(path) is not None:
            refuse_foreign_code({"data": read_experiment(path).get("data")}, path)
    return read_experiments(paths)


def _parse(
    parser: ArgumentParser, content: Mapping[str, Any], rest: Sequence[str], origin: str
) -> tuple[ImageDataModule, Namespace]:
    known = ["--data", dump_yaml(content["data"], one_line=True)] if isinstance(content.get("data"), dict) else []
    if origin and not known:
        raise UserError(f"{origin}: has no data: part; name the data set there with class_path: …")
    if content.get("seed_everything") is not None:
        known += ["--seed_everything", str(content["seed_everything"])]
    parsed = parser.parse_args([*known, *rest])
    datamodule = parser.instantiate(parsed).data
    assert isinstance(datamodule, ImageDataModule)
    return datamodule, parsed
