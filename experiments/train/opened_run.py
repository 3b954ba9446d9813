"""A run directory that a stage opens: whose it is, and its configuration without anything that could run code.

``test --ckpt_path RUN/checkpoints/best.ckpt`` and ``test --config RUN/config.yaml --ckpt_path best`` mean the run RUN,
which another person may have made. Its data and model are built where they are classes of ours or of allowed plugins;
callbacks, loggers, plugins and profilers of its trainer are not built at all, because no result depends on them. A
training that continues needs its callbacks, so these are checked in the same way.

``fit --from RUN``: a new run that goes on from the weights of a trained one, heads included.

Its configuration is that of the run, changed by the experiment files and flags of the command.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrail.config import dump_yaml, read_experiment, read_experiments, split_configs
from vitrail.errors import UserError
from vitrail.runs import Run, run_of_checkpoint, run_of_config
from vitrail.trust import refuse_foreign_code

if TYPE_CHECKING:
    from lightning_modules.base import VisionTask


STAGES = ("fit", "validate", "test", "predict")

_NOT_BUILT = ("callbacks", "logger", "plugins", "profiler")
"""Of the trainer: what may name a class, or a function by its path, and changes no result."""
OF_A_STAGE = ("verbose", "return_predictions")
"""Options that not every stage has, so that a run's configuration must not contain them."""

_OF_THE_COMMAND = ("config", "ckpt_path", "weights_only", "runs", *OF_A_STAGE)
_HARMLESS = (
    *(
        f"lightning.pytorch.callbacks.{name}"
        for name in (
            "DeviceStatsMonitor",
            "EarlyStopping",
            "GradientAccumulationScheduler",
            "LearningRateMonitor",
            "ModelSummary",
            "RichModelSummary",
            "RichProgressBar",
            "TQDMProgressBar",
            "Timer",
        )
    ),
    "lightning.pytorch.plugins.environments.SLURMEnvironment",
)
"""Classes of Lightning's that take plain values only and write nothing of their own."""


@contextmanager
def opened_arguments(args: Sequence[str]) -> Iterator[list[str]]:
    """Give the command line with the run that it opens filled in, for the length of the block.

    Args:
        args: as the user gave them.

    Returns:
        Arguments in which ``best`` and ``last`` are files of the run, and its configuration a file that names no
        foreign code.

    Raises:
        UserError: the run names a class that is not to be trusted, has no such checkpoint, or cannot be read.
    """
    arguments = list(args)
    stage = arguments[0] if arguments else ""
    if stage not in STAGES:
        yield arguments
        return
    configs = _values_of(arguments, ("--config", "-c"))
    own = [(place, _located(run)) for place, value in configs if (run := run_of_config(value)) is not None]
    if own:
        _name_checkpoint(arguments, own[-1][1])
    with tempfile.TemporaryDirectory(prefix="vitrail-opened-") as folder:
        if own and stage != "fit":
            # `fit --config FILE` runs what FILE names; nothing else does because a run says so.
            for number, (place, run) in enumerate(own):
                path = _written(Path(folder) / str(number), opened_config(run, stage))
                _replace_value(arguments, place, str(path))
        elif not configs and (run := _run_of(arguments)) is not None:
            path = _written(Path(folder), opened_config(run, stage))
            arguments[1:1] = ["--config", str(path)]
        elif not configs and not any(argument.startswith(("--data", "--model")) for argument in arguments):
            for _, value in _values_of(arguments, ("--ckpt_path",))[-1:]:
                raise UserError(
                    f"--ckpt_path {value}: is not a checkpoint in a run directory, so data and model are not known; "
                    f"give RUN/{Run.CHECKPOINTS}/best.ckpt, or --config as well"
                )
        yield arguments


def opened_config(run: Path, stage: str) -> dict[str, Any]:
    """Return the configuration of a run as far as a stage may follow it.

    Raises:
        UserError: it cannot be read, or names a class that is neither ours nor of an allowed plugin.
    """
    path = run / Run.CONFIG
    config = {key: value for key, value in read_experiment(path).items() if key not in _OF_THE_COMMAND}
    config.setdefault("name", run.parent.name)
    if config["name"] == run.parent.name:
        # New directories go next to it, wherever it was made.
        config["runs"] = str(run.parent.parent)
    if stage != "fit":
        trainer = dict(config.get("trainer") or {})
        callbacks = [_class_name(entry) for entry in trainer.get("callbacks") or []]
        if callbacks:
            sys.stderr.write(f"{stage}: callbacks of {path} have no part in it ({', '.join(callbacks)})\n")
        config["trainer"] = {key: value for key, value in trainer.items() if key not in _NOT_BUILT}
    if stage == "fit":
        for section in ("checkpoint", "last"):
            options = config.get(section)
            if isinstance(options, dict) and options.get("dirpath") is not None:
                sys.stderr.write(
                    f"fit: {section}.dirpath of {path} is not followed, checkpoints go to the run directory; give it "
                    f"with --{section}.dirpath\n"
                )
                config[section] = {**options, "dirpath": None}
        refuse_foreign_code(config, path, _HARMLESS, f", or run what the file names with --config {path}")
    else:
        refuse_foreign_code(config, path)
    return config


def _class_name(entry: object) -> str:
    named = entry.get("class_path", "") if isinstance(entry, dict) else entry
    return str(named).rpartition(".")[2][:80]


def _name_checkpoint(arguments: list[str], run: Path) -> None:
    """Let ``best`` and ``last`` mean those of the run whose own configuration is given."""
    for place, value in _values_of(arguments, ("--ckpt_path",)):
        if value in ("best", "last"):
            checkpoint = run / Run.CHECKPOINTS / f"{value}.ckpt"
            if not checkpoint.is_file():
                there = ", ".join(path.stem for path in sorted((run / Run.CHECKPOINTS).glob("*.ckpt"))) or "none"
                raise UserError(f"--ckpt_path {value}: {run} has no {Run.CHECKPOINTS}/{value}.ckpt; it has {there}")
            _replace_value(arguments, place, str(checkpoint))


def _run_of(arguments: Sequence[str]) -> Path | None:
    """Return the run whose checkpoint is given, if its configuration is there."""
    given = _values_of(arguments, ("--ckpt_path",))
    run = run_of_checkpoint(Path(given[-1][1])) if given else None
    return None if run is None else _located(run)


def _located(run: Path) -> Path:
    """Return a run directory whose parents are names, also where the command is given inside of it."""
    return run if len(run.parts) > 2 and ".." not in run.parts else run.absolute()


def _values_of(arguments: Sequence[str], options: Sequence[str]) -> list[tuple[int, str]]:
    """Return places and values of an option, given as two arguments or as one with ``=``."""
    found = []
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in options and equals:
            found.append((place, value))
        elif option in options and place + 1 < len(arguments):
            found.append((place + 1, arguments[place + 1]))
    return found


def _replace_value(arguments: list[str], place: int, value: str) -> None:
    option, equals, _ = arguments[place].partition("=")
    arguments[place] = f"{option}={value}" if equals and option.startswith("-") else value


def _written(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / Run.CONFIG
    path.write_text(dump_yaml(config), encoding="utf-8")
    return path


KEY = "from"


def parent_checkpoint(given: str) -> Path:
    """Return the checkpoint that ``--from`` names: a file in a run, or the best one of a run directory.

    Raises:
        UserError: there is none.
    """
    path = Path(given)
    checkpoint = Run(path).checkpoint() if path.is_dir() else path
    if run_of_checkpoint(checkpoint) is None or not checkpoint.is_file():
        raise UserError(f"--from {given}: no run; give a run directory (runs/NAME/TIME) or a checkpoint in it")
    return checkpoint


def from_parent(args: Sequence[str]) -> list[str]:
    """Return arguments of ``fit`` with the configuration of the run that ``--from`` names in front of all others.

    A resumed run has its whole configuration, so nothing is put in front of it.

    Raises:
        UserError: there is no such run, or it names classes that are not to be trusted.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in (KEY, "ckpt_path", "name"):
        parser.add_argument(f"--{option}", default=None)
    given = vars(parser.parse_known_args(list(args[1:]))[0])
    if not args or args[0] != "fit":
        return list(args)
    configs = split_configs(args)[0]
    source = given[KEY] or (read_experiments(configs).get(KEY) if configs else None)
    if not source or given["ckpt_path"]:
        return list(args)
    checkpoint = parent_checkpoint(str(source))
    content = opened_config(checkpoint.parents[1], "fit")
    if configs and not given["name"]:
        content.pop("name")  # that of the first experiment file
    text = dump_yaml({**content, KEY: str(source)}, one_line=True)
    name = [] if "name" in content or given["name"] else ["--name", Path(configs[0]).stem]
    return ["fit", "--config", text, *args[1:], *name]


def take_over(model: VisionTask, checkpoint: Path) -> list[str]:
    """Give a model the weights of a run's checkpoint; return what it does not take over, one line each.

    Raises:
        UserError: the weights do not fit.
    """
    from lightning_modules.checkpoint import read_checkpoint

    content: dict[str, Any] = read_checkpoint(checkpoint)
    state, notes = model.fitting_state(content)
    model.on_load_checkpoint({**content, "epoch_sums": {}, "monitored": []})
    try:
        model.load_state_dict(state)
    except UserError as error:
        raise UserError(
            f"--from {checkpoint}: {error}; --from needs the parent's model, with other classes at most"
        ) from error
    return notes
