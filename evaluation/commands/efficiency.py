"""``python -m evaluation efficiency RUN EXPERIMENT.yaml …``: what models cost, compared with each other."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.files import write_text_atomically
from vitrail.runs import Run
from vitrail.runtime import check_device

if TYPE_CHECKING:
    from evaluation.cost.efficiency import Costs, Counts, ModelSource

FILE = "efficiency.json"
BATCH_SIZES = [1, 8]
REPEATS = 10

_EPILOG = """\
examples:
  python -m evaluation efficiency experiments/products_multitask_deit.yaml experiments/products_multitask_mobilevit.yaml
  python -m evaluation efficiency runs/NAME/TIME --batch-sizes 1 8 32 --device cuda
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``efficiency``."""
    command.epilog = _EPILOG
    command.add_argument(
        "models", nargs="+", type=Path, metavar="MODEL", help="run directory, or experiment file (random weights)"
    )
    command.add_argument(
        "--config", action="append", default=[], type=Path, metavar="OVERLAY", help="laid over experiment files"
    )
    add_measuring(command)
    command.add_argument("--counts-only", action="store_true", help="measure nothing")
    command.add_argument("--markdown", action="store_true", help="a Markdown table")
    command.add_argument("--json", type=Path, metavar="FILE", help=f"(default for runs: RUN/{FILE})")


def add_measuring(command: argparse.ArgumentParser) -> None:
    """Add how time is measured; also for the ablation's command line."""
    command.add_argument(
        "--batch-sizes", nargs="+", type=_positive, default=BATCH_SIZES, metavar="N", help="(default: 1 8)"
    )
    command.add_argument(
        "--repeats", type=_positive, default=REPEATS, metavar="N", help=f"rounds that count (default: {REPEATS})"
    )
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="that is measured (default: cpu)")
    command.add_argument("--threads", type=_positive, default=0, metavar="N", help="of the CPU (default: PyTorch's)")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Count, measure, write and print.

    Raises:
        UserError: if a model cannot be built or measured.
    """
    from evaluation.cost.efficiency import build, by_model, count, ratios_to, source_of
    from vitrail.runs import runs_among

    check_device(options.device)
    runs = [path for path in options.models if path.suffix not in (".yaml", ".yml")]
    kept = runs_among(runs, "efficiency", Run.BEST, unfinished_only=True) if len(runs) > 1 else runs
    options.models = [path for path in options.models if path not in runs or path in kept]
    sources = {path.resolve(): source_of(path, options.config) for path in options.models}
    names = _names(list(sources))
    counts: dict[str, Counts] = {}
    for path, source in sources.items():
        counts[names[path]] = count(*build(source, "meta"))
    costs: Mapping[str, Costs] = {}
    sizes: list[int] = []
    if not options.counts_only:
        sizes = sorted(set(options.batch_sizes))
        costs = measured({names[path]: source for path, source in sources.items()}, counts, options)
    rows = {name: (counts[name], costs.get(name)) for name in counts}
    for path, name in names.items():
        if path.is_dir():
            write(path / FILE, {name: rows[name]})
    if options.json is not None:
        write(options.json, rows)
    if options.markdown:
        sys.stdout.write(f"{by_model(rows, sizes).markdown()}\n")
    else:
        _by_cost(by_model(rows, sizes)).show()
    if note := ratios_to(rows):
        sys.stdout.write(f"{note}\n")
    if failed := [f"{name}: {one.error}" for name, one in costs.items() if one.error]:
        raise UserError(failed[0])


def measured(
    sources: Mapping[str, ModelSource], counts: Mapping[str, Counts], options: argparse.Namespace
) -> dict[str, Costs]:
    """Costs of the models by the options of ``add_measuring``."""
    from evaluation.cost.efficiency import measure

    return measure(
        sources,
        {name: counts[name].weight_bytes for name in sources},
        sorted(set(options.batch_sizes)),
        options.repeats,
        device=options.device,
        threads=options.threads,
    )


def write(path: Path, rows: Mapping[str, tuple[Counts, Costs | None]]) -> None:
    """Write the numbers as JSON, atomically."""
    values = {name: {"counts": asdict(one), "costs": other and asdict(other)} for name, (one, other) in rows.items()}
    write_text_atomically(path, json.dumps(values, indent=2) + "\n")


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """A name for each, no two alike."""
    names = {path: "/".join(path.parts[-2:]) if path.is_dir() else path.stem for path in paths}
    twice = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {path: str(path) if name in twice else name for path, name in names.items()}


def _by_cost(table: Table) -> Table:
    """One column per model: there are more numbers than models."""
    names = ["", *(row[0] for row in table.rows)]
    rows = [[name, *(row[place] for row in table.rows)] for place, name in enumerate(table.columns) if place]
    return Table(names, rows, None, "what the models cost")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


_positive.__name__ = "number from 1"  # for argparse's message
