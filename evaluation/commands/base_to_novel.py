"""``python -m evaluation base-to-novel``: what fine-tuning on some of the classes cost on the others."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``base-to-novel``."""
    command.description = (
        "Accuracy on the classes that were trained and on the others, with their harmonic mean: what fine-tuning cost."
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run directory, or a file of predictions")
    command.add_argument(
        "--before", type=Path, metavar="RUN", help="the same of the model before fine-tuning, on the same samples"
    )
    command.add_argument("--base", type=int, help="number of base classes, the first ones (default: half, rounded up)")
    command.add_argument("--split", default="test", help="split whose predictions are read (default: test)")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Print the table."""
    from evaluation.weights import zero_shot as base_to_novel

    after = base_to_novel.read_run(options.run, options.split)
    note = base_to_novel.check_novel(options.run, after, options.base)
    result: base_to_novel.BaseToNovel | base_to_novel.Cost
    if options.before is None:
        result = base_to_novel.base_to_novel(after, options.base)
    else:
        result = base_to_novel.compare(after, base_to_novel.read_run(options.before, options.split), options.base)
    if options.json is not None:
        base_to_novel.write_json(options.json, result, note)
    base_to_novel.accuracy_table(result, f"base to novel: {options.run}", note).show()
