"""``python -m evaluation wise-ft``: weights between start and end of a fine-tuning, the best on validation kept."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``wise-ft``."""
    command.description = (
        "Evaluates weights between start and end of a fine-tuning (callbacks.StartWeights) and keeps the best on "
        "validation."
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run directory with checkpoints/start.ckpt")
    command.add_argument(
        "--alphas",
        type=float,
        nargs="+",
        default=[number / 10 for number in range(11)],
        help="shares of the end, 0 to 1 (default: 0 to 1 in tenths)",
    )


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Evaluate the mixtures, save the best one and print the table."""
    from rich.console import Console
    from rich.progress import track

    from evaluation.weights import wise_ft
    from evaluation.weights.zero_shot import start_weights_of
    from lightning_modules.checkpoint import read_checkpoint
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
    wise_ft.mixtures_table(found, chosen).show()
    sys.stdout.write(f"{mixed} has the weights of α = {chosen.alpha:g}\n")
