"""The DataModule that an experiment file or a run describes, for commands that need the data and no training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from datamodules.base import ImageDataModule
from vitrail.config import dump_yaml, read_experiment, read_experiments, split_configs
from vitrail.errors import UserError
from vitrail.trust import refuse_foreign_code, run_of_config
from vitrail.types import DEFAULT_SEED


def data_parser(program: str, usage: str | None = None) -> ArgumentParser:
    """A parser that knows ``--config``, ``--data`` and ``--seed_everything``; the caller adds its own arguments.

    Args:
        program: name for messages.
        usage: one line, made by the parser if not given.
    """
    parser = ArgumentParser(prog=program, usage=usage, exit_on_error=False)
    parser.add_argument(
        "--config", help="Experiment file whose data: part is used; of a later one only what it says differently."
    )
    parser.add_argument(
        "--seed_everything", type=int, default=DEFAULT_SEED, help="Seed of the data, as in fit: splits depend on it."
    )
    parser.add_subclass_arguments(ImageDataModule, "data", required=True, help="Data set, as in an experiment file.")
    parser.link_arguments("seed_everything", "data.init_args.seed")
    return parser


def parse_data(parser: ArgumentParser, args: list[str]) -> tuple[ImageDataModule, Namespace]:
    """The DataModule that experiment files and further arguments describe, with the seed that a fit would use.

    Args:
        parser: of ``data_parser``.
        args: command-line arguments; ``--config`` may stand in them several times.

    Returns:
        The DataModule, and all arguments as parsed.

    Raises:
        UserError: for a file that cannot be read or says nothing about data.
        ArgumentError: for arguments that are unknown or of the wrong type.
    """
    paths, rest = split_configs(args)
    for path in paths:
        if run_of_config(path) is not None:
            refuse_foreign_code({"data": read_experiment(path).get("data")}, path)
    content = read_experiments(paths)
    known = ["--data", dump_yaml(content["data"], one_line=True)] if isinstance(content.get("data"), dict) else []
    if paths and not known:
        raise UserError(f"--config {paths[0]}: has no data: part; name the data set there with class_path: …")
    if content.get("seed_everything") is not None:
        known += ["--seed_everything", str(content["seed_everything"])]
    parsed = parser.parse_args([*known, *rest])
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
