"""Options of ``fit``, ``validate``, ``test`` and ``predict`` that belong to no class, and the help in short."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from experiments.train.own_data import own_data_help
from vitrail.types import DEFAULT_SEED

_RUN_OPTIONS: dict[str, tuple[Any, str]] = {
    "seed_everything": (DEFAULT_SEED, "Seed of weights, order, augmentation and dropout."),
    "name": (None, "Name of the experiment; by default that of its YAML."),
    "runs": ("runs", "Directory of all runs."),
    "from": (None, "In `fit`, go on from the best weights of this run, heads included, with its configuration."),
    "test_best": (False, "After `fit`, test the best checkpoint in the same process."),
    "report": (False, "After `test_best`, write the run's report, report.html."),
    "ema": (None, "Averaged weights, in training."),
    "wandb": (None, "Weights & Biases."),
    "trackers": (
        [],
        "Further experiment trackers, with their files in the run directory: tensorboard, mlflow.",
    ),
}

SECTIONS = {
    "data": "the data set: a class and its arguments",
    "model": "the task: a class and its arguments",
    "trainer": "Lightning's Trainer: max_epochs, accelerator, devices, precision, callbacks …",
    "checkpoint": "the best epoch: monitor, mode",
    "last": "how often the checkpoint to resume from is written",
    "non_finite": "what happens where the loss is not finite",
    "predictions": "of which splits predictions are written",
    "confusion_matrix": "how often confusion matrices are drawn in training",
    "class_report": "scores of each class",
    "retrieval": "retrieval metrics of dual encoders",
    "features": "cached features of a frozen backbone",
}
"""Keys of an experiment file that hold several options."""


def add_run_options(parser: argparse.ArgumentParser, types: Mapping[str, Any] | None = None) -> None:
    """Add the options of a run.

    Args:
        parser: of argparse or jsonargparse.
        types: of each option, for jsonargparse.
    """
    for name, (default, text) in _RUN_OPTIONS.items():
        add: Callable[..., Any] = parser.add_argument
        add(f"--{name}", default=default, help=text, **({"type": types[name]} if types else {}))


def short_help(program: str, stage: str, description: str) -> str:
    """Return the help of a stage without the arguments of classes, whose modules take seconds to load.

    Args:
        program: as the user called it.
        stage: fit, validate, test or predict.
        description: one line.
    """
    parser = argparse.ArgumentParser(
        prog=f"{program} {stage}",
        usage="%(prog)s --config NAME [--config OVERLAY …] [--SECTION.KEY VALUE …] [options]"
        + ("\n       %(prog)s --data FOLDER_OR_TABLE [options]" if stage == "fit" else " --ckpt_path CHECKPOINT"),
        description=description,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_options(parser)
    parser.add_argument("--ckpt_path", help="Checkpoint: a path, or best or last of the newest run of that name.")
    widest = max(map(len, SECTIONS))
    lines = [f"  {name:{widest}}  {text}" for name, text in SECTIONS.items()]
    classes = textwrap.fill(
        f"`{program} {stage} --help=all` has every key with its default, `--model.help CLASS` and `--data.help CLASS` "
        "have the arguments of a class, `--print_config` the whole configuration.",
        width=100,
    )
    sections = "\n".join(["sections of an experiment file:", *lines, "", classes])
    return "\n".join([parser.format_help(), sections, *(["", own_data_help()] if stage == "fit" else [""])])
