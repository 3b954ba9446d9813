"""``python -m evaluation summary RUN …``, ``… base_to_novel RUN``, ``… retrieval --gallery G``; ``--help`` has all.

What the user can mend is told in one line with exit code 2, without a traceback unless ``VITRAIL_DEBUG=1``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from vitrail.errors import run_program
from vitrail.types import DATA_ARGUMENTS

if TYPE_CHECKING:
    from evaluation.tables.summary import TaskSummary

_COMMANDS = (
    "summary",
    "report",
    "compare",
    "ensemble",
    "calibrate",
    "explore",
    "learning_curve",
    "select",
    "explain",
    "retrieval",
    "efficiency",
)
"""Commands that are modules ``evaluation.commands.<name>``; each imports what is slow when it runs."""

_WITH_DATA_ARGUMENTS = {"linear_probe", "report", "explore", "learning_curve", "select"}
"""Commands that take ``--data.init_args.KEY VALUE`` as an experiment does, in ``rest``."""


class _Command(Protocol):
    """What such a module has."""

    def add_parser(self, commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        """Adds the command."""

    def run(self, options: argparse.Namespace, rest: list[str]) -> None:
        """Runs it."""


def _command(name: str) -> _Command:
    return cast("_Command", importlib.import_module(f"evaluation.commands.{name}"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # Only the module of the command that is meant, so that one command does not wait for the imports of the others.
    parser = _parser([name for name in _COMMANDS if name in arguments[:1]] or _COMMANDS)
    options, rest = parser.parse_known_args(arguments)
    if rest and not (options.command in _WITH_DATA_ARGUMENTS and rest[0].startswith(DATA_ARGUMENTS)):
        parser.error(f"unknown argument {rest[0]!r}")
    from vitrail.errors import run_reporting_user_errors  # after --help, which it would make slow

    return run_reporting_user_errors(lambda: _run(options, rest))


def _run(options: argparse.Namespace, rest: list[str]) -> None:
    from vitrail.trust import plain_name

    if hasattr(options, "split"):
        plain_name(options.split, "--split")  # it becomes a part of files' names
    if options.command in _COMMANDS:
        _command(options.command).run(options, rest)
    elif options.command in _OTHERS:
        _OTHERS[options.command](options)
    else:
        from evaluation.commands import summary as summary_command

        summary_command.show(_probe(options, rest), options)


def _base_to_novel(options: argparse.Namespace) -> None:
    from evaluation.weights import zero_shot as base_to_novel
    from vitrail.console import print_table

    after = base_to_novel.read_run(options.run, options.split)
    note = base_to_novel.check_novel(options.run, after, options.base)
    result: base_to_novel.BaseToNovel | base_to_novel.Cost
    if options.before is None:
        result = base_to_novel.base_to_novel(after, options.base)
    else:
        result = base_to_novel.compare(after, base_to_novel.read_run(options.before, options.split), options.base)
    if options.json is not None:
        base_to_novel.write_json(options.json, result, note)
    print_table(base_to_novel.rich_table(result, f"base to novel: {options.run}", note))


def _wise_ft(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import track

    from evaluation.weights import wise_ft
    from evaluation.weights.zero_shot import start_weights_of
    from lightning_modules.checkpoint import read_checkpoint
    from vitrail.console import print_table
    from vitrail.runs import Run

    run = Run(options.run)
    datamodule = run.datamodule
    datamodule.prepare_data()
    datamodule.setup("test")
    start, end = (read_checkpoint(path) for path in (start_weights_of(options.run), run.checkpoint()))
    mixtures = wise_ft.sweep(
        run.load_model(),
        start["state_dict"],
        end["state_dict"],
        datamodule,
        alphas=options.alphas,
        base_classes=getattr(datamodule, "base_classes", 0),
    )
    progress = Console(stderr=True)
    found = list(track(mixtures, "evaluating mixtures", total=len(options.alphas), console=progress))
    chosen = wise_ft.best_mixture(found)
    mixed = run.path / Run.CHECKPOINTS / "wise_ft.ckpt"
    wise_ft.save_mixture(mixed, start["state_dict"], end, chosen.alpha)
    wise_ft.write_report(options.run, found)
    print_table(wise_ft.rich_table(found, chosen))
    print(f"{mixed} has the weights of α = {chosen.alpha:g}")


def _soup(options: argparse.Namespace) -> None:
    from evaluation.commands.soup import best_of_sweep, make_soup, place_beside, place_of_sweep
    from vitrail.console import print_table
    from vitrail.errors import UserError
    from vitrail.runs import Run, runs_among

    if bool(options.runs) == (options.sweep is not None):
        raise UserError("soup: name either run directories, or one sweep with --sweep DIR --top N")
    named = runs_among(options.runs, "soup", Run.BEST, unfinished_only=True)
    runs = named or best_of_sweep(options.sweep, options.top)
    place = place_beside(runs[0]) if options.runs else place_of_sweep(options.sweep)
    made = make_soup(runs, options.method, metric=options.metric, place=place, test=options.test)
    print_table(made.table)
    print(f"{made.directory / Run.BEST} has the weights of the soup")


_OTHERS = {"base_to_novel": _base_to_novel, "wise_ft": _wise_ft, "soup": _soup}


def _probe(options: argparse.Namespace, data_arguments: list[str]) -> list[TaskSummary]:
    from datamodules.cli import load_datamodule
    from evaluation.commands.linear_probe import linear_probe
    from lightning_modules.encoders.image import ImageEncoder

    datamodule = load_datamodule(options.config, data_arguments, "python -m evaluation linear_probe")
    datamodule.image_options = {**datamodule.image_options, "size": options.image_size}
    pretrained = {"true": True, "false": False}.get(options.pretrained.lower(), options.pretrained)
    encoder = ImageEncoder(options.backbone, options.image_size, pretrained)
    encoder.load_pretrained()
    return linear_probe(datamodule, encoder)


def _parser(names: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation", description="What the numbers of runs mean.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in names:
        _command(name).add_parser(commands)

    command = commands.add_parser(
        "base_to_novel",
        help="accuracy on trained and on other classes with their harmonic mean: what fine-tuning cost",
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run directory, or a file of predictions")
    command.add_argument(
        "--before", type=Path, metavar="RUN", help="the same of the model before fine-tuning, on the same samples"
    )
    command.add_argument("--base", type=int, help="number of base classes, the first ones (default: half, rounded up)")
    command.add_argument("--split", default="test", help="split whose predictions are read (default: test)")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")

    command = commands.add_parser(
        "wise_ft",
        help="weights between start and end of a fine-tuning (callbacks.StartWeights), the best on validation kept",
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run directory with checkpoints/start.ckpt")
    command.add_argument(
        "--alphas",
        type=float,
        nargs="+",
        default=[number / 10 for number in range(11)],
        help="shares of the end, 0 to 1 (default: 0 to 1 in tenths)",
    )

    _add_soup(commands)

    command = commands.add_parser(
        "linear_probe",
        help="logistic regression on a frozen backbone's features: the floor that training has to beat",
        epilog="The data can be changed by --data.init_args.KEY VALUE, as in an experiment.",
        allow_abbrev=False,
    )
    command.add_argument(
        "--config", action="append", required=True, help="experiment YAML; only its `data:` part is read; repeatable"
    )
    command.add_argument("--backbone", required=True, help="timm name, for example resnet18")
    command.add_argument("--pretrained", default="true", help="true (hub), false, or a local file of weights")
    command.add_argument("--image_size", type=int, default=224, help="side of the images in pixels (default: 224)")
    from evaluation.commands.summary import add_forms

    add_forms(command)
    return parser


def _add_soup(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "soup", help="mean of the weights of several runs of one experiment, chosen on validation, kept as a new run"
    )
    command.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories, at least two")
    command.add_argument("--sweep", type=Path, metavar="DIR", help="the best members of a sweep instead")
    command.add_argument("--top", type=int, default=5, metavar="N", help="how many of the sweep (default: 5)")
    command.add_argument(
        "--method",
        choices=("uniform", "greedy"),
        default="greedy",
        help="all, or only those that do not make the validation metric fall (default: greedy)",
    )
    command.add_argument("--metric", help="val/… metric to choose by (default: that of the runs' best checkpoints)")
    command.add_argument("--test", action="store_true", help="test the best member and the soup as well")


if __name__ == "__main__":
    sys.exit(run_program(main))
