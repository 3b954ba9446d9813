"""``python -m evaluation summary RUN …``, ``… base_to_novel RUN`` and ``… linear_probe --config experiment.yaml …``.

What the user can mend is told in one line with exit code 2, without a traceback unless ``VITRINE_DEBUG=1``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.user_errors import run_reporting_user_errors
from evaluation import summary

if TYPE_CHECKING:
    from rich.table import Table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    is_probe = options.command == "linear_probe"
    if rest and not (is_probe and rest[0].startswith("--data.")):
        parser.error(f"unknown argument {rest[0]!r}")
    if options.command in _OTHERS:
        return run_reporting_user_errors(lambda: _OTHERS[options.command](options))
    return run_reporting_user_errors(lambda: _show(_probe(options, rest) if is_probe else _summarise(options), options))


def _print(table: Table) -> None:
    from rich.console import Console

    # Wide enough for whole numbers where there is no terminal to fit (a pipe, a log).
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _show(summaries: list[summary.TaskSummary], options: argparse.Namespace) -> None:
    if options.json:
        print(summary.as_json(summaries))
    elif options.markdown:
        print(summary.markdown_table(summaries))
    else:
        _print(summary.rich_table(summaries))


def _summarise(options: argparse.Namespace) -> list[summary.TaskSummary]:
    return [row for run in options.runs for row in summary.summarise_run(run, options.split)]


def _base_to_novel(options: argparse.Namespace) -> None:
    from evaluation import base_to_novel

    after = base_to_novel.read_run(options.run, options.split)
    result: base_to_novel.BaseToNovel | base_to_novel.Cost
    if options.before is None:
        result = base_to_novel.base_to_novel(after, options.base)
    else:
        result = base_to_novel.compare(after, base_to_novel.read_run(options.before, options.split), options.base)
    if options.json is not None:
        base_to_novel.write_json(options.json, result)
    _print(base_to_novel.rich_table(result, f"base to novel: {options.run}"))


def _wise_ft(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import track

    from datamodules.from_experiment import data_parser, parse_data
    from evaluation import wise_ft
    from lightning_modules.checkpoint import load_task, read_checkpoint

    datamodule, _ = parse_data(
        data_parser("python -m evaluation wise_ft"), ["--config", str(options.run / "config.yaml")]
    )
    datamodule.prepare_data()
    datamodule.setup("test")
    folder = options.run / "checkpoints"
    start, end = (read_checkpoint(folder / name) for name in ("start.ckpt", "best.ckpt"))
    mixtures = wise_ft.sweep(
        load_task(folder / "best.ckpt"),
        start["state_dict"],
        end["state_dict"],
        datamodule,
        alphas=options.alphas,
        base_classes=getattr(datamodule, "base_classes", 0),
    )
    progress = Console(stderr=True)
    found = list(track(mixtures, "evaluating mixtures", total=len(options.alphas), console=progress))
    chosen = wise_ft.best_mixture(found)
    wise_ft.save_mixture(folder / "wise_ft.ckpt", start["state_dict"], end, chosen.alpha)
    wise_ft.write_report(options.run, found)
    _print(wise_ft.rich_table(found, chosen))
    print(f"{folder / 'wise_ft.ckpt'} has the weights of α = {chosen.alpha:g}")


def _soup(options: argparse.Namespace) -> None:
    from datamodules.schema import UserError
    from evaluation.soup_command import best_of_sweep, make_soup, place_beside, place_of_sweep

    if bool(options.runs) == (options.sweep is not None):
        raise UserError("soup: name either run directories, or one sweep with --sweep DIR --top N")
    runs = options.runs or best_of_sweep(options.sweep, options.top)
    place = place_beside(runs[0]) if options.runs else place_of_sweep(options.sweep)
    made = make_soup(runs, options.method, metric=options.metric, place=place, test=options.test)
    _print(made.table)
    print(f"{made.directory / 'checkpoints' / 'best.ckpt'} has the weights of the soup")


_OTHERS = {"base_to_novel": _base_to_novel, "wise_ft": _wise_ft, "soup": _soup}


def _probe(options: argparse.Namespace, data_arguments: list[str]) -> list[summary.TaskSummary]:
    from datamodules.from_experiment import data_parser, parse_data
    from evaluation.linear_probe import linear_probe
    from lightning_modules.encoders import ImageEncoder

    configs = [argument for path in options.config for argument in ("--config", path)]
    datamodule, _ = parse_data(data_parser("python -m evaluation linear_probe"), [*configs, *data_arguments])
    datamodule.image_options = {**datamodule.image_options, "size": options.image_size}
    pretrained = {"true": True, "false": False}.get(options.pretrained.lower(), options.pretrained)
    encoder = ImageEncoder(options.backbone, options.image_size, pretrained)
    encoder.load_pretrained()
    return linear_probe(datamodule, encoder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation", description="What the numbers of runs mean.")
    commands = parser.add_subparsers(dest="command", required=True)
    output = argparse.ArgumentParser(add_help=False)
    form = output.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--json", action="store_true", help="print JSON, with cross-checks and further statistics")

    command = commands.add_parser(
        "summary",
        parents=[output],
        help="accuracy and macro F1 of runs with intervals by group, next to the majority baseline",
    )
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    command.add_argument("--split", default="test", help="split whose predictions are read (default: test)")

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

    command = commands.add_parser(
        "linear_probe",
        parents=[output],
        help="logistic regression on a frozen backbone's features: the floor that training has to beat",
        epilog="The data can be changed by --data.init_args.KEY VALUE, as in an experiment.",
        allow_abbrev=False,
    )
    command.add_argument(
        "--config", action="append", required=True, help="experiment YAML; only its `data:` part is read; repeatable"
    )
    command.add_argument("--backbone", required=True, help="timm name, for example resnet18")
    command.add_argument("--pretrained", default="true", help="true (hub), false, or a local file of weights")
    command.add_argument("--image_size", type=int, default=224, help="side of the pictures in pixels (default: 224)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
