"""``python -m experiments sweep FILE``: a Weights & Biases sweep file, run without an account and without a network.

Trials are processes that ``fit``, and their database is a file in ``runs/sweeps/<name>/`` or, for several machines, at
any URL that SQLAlchemy knows. The same command goes on where a sweep was stopped or killed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.launch.sweep_file import SweepFile, read_sweep
from vitrail.errors import UserError, same_command
from vitrail.trust import plain_name
from vitrail.types import DEFAULT_SEED

if TYPE_CHECKING:
    from experiments.launch.study import SweepStudy
    from experiments.launch.workers import Runner, Workers


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sweep``."""
    command.description = "Run a W&B sweep file without an account: grid, random or TPE, early stopping, workers."
    command.usage = f"{command.prog} FILE [options] [-- ARGUMENT …]"
    command.epilog = (
        "Arguments after -- go to every trial, before its values: -- --config experiments/overlays/two_cores.yaml"
    )
    command.add_argument("file", type=Path, metavar="FILE", help="sweep file, such as experiments/sweeps/….yaml")
    command.add_argument("--count", type=_positive, metavar="N", help="trials; by default run_cap:, or the whole grid")
    add_search_options(command)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run a sweep, or go on with one.

    Returns:
        Exit code: 0, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        UserError: the file or an option is wrong, or no trial was a success.
    """
    from rich.console import Console

    from experiments.launch.study import best_trial, sweep_frame, trials_table, write_reports

    sweep = read_sweep(options.file)
    count = _count(sweep, options)
    name = plain_name(options.file.stem if options.name is None else options.name, "--name")
    folder = Path(options.runs) / "sweeps" / name
    study, workers, stopped_by = search(sweep, name, folder, options, count, rest)

    trials = study.trials()
    written = write_reports(folder, study.study, trials, sweep.metric, Path(options.runs))
    # Wide enough for whole paths where there is no terminal to fit (a pipe, a log).
    out = Console(width=None if sys.stdout.isatty() else 200)
    out.print(trials_table(sweep_frame(trials, sweep.metric), f"{name}: {sweep.metric.name}"))
    out.print(written, soft_wrap=True, highlight=False)
    if stopped_by:
        out.print(f"Stopped. The same command goes on. ({same_command()})", soft_wrap=True, markup=False)
    elif workers.refusal:
        raise UserError(
            f"{workers.refusal} (the first trial of {options.file} was refused, so the sweep has ended; logs in "
            f"{folder / 'logs'}; the same command runs it again)"
        )
    elif best_trial(trials, sweep.metric) is None:
        errors = [error for trial in trials if (error := trial.user_attrs.get("error"))]
        raise UserError(
            f"{options.file}: no trial of {len(trials)} was a success; the last error: "
            f"{(errors or ['none'])[-1]} (all in {folder / 'logs'}; --retry-failed runs them again)"
        )
    return stopped_by and 128 + stopped_by


def search(
    sweep: SweepFile,
    name: str,
    folder: Path,
    options: argparse.Namespace,
    count: int,
    more: Sequence[str] = (),
    runner: Runner | None = None,
) -> tuple[SweepStudy, Workers, int]:
    """Run the trials of a sweep that have no result yet.

    Returns:
        The study, its workers, and the signal that stopped them, 0 for none.
    """
    from rich.console import Console

    from experiments.launch.study import SweepStudy
    from experiments.launch.workers import Workers, run_trial

    folder.mkdir(parents=True, exist_ok=True)
    study = SweepStudy(options.storage or f"sqlite:///{folder / 'sweep.db'}", name, sweep, options.seed)
    if options.retry_failed or not study.has_progress():
        study.retry_failed(refused_only=not options.retry_failed)
    console = Console(stderr=True)
    console.print(
        f"{name}: {sweep.method}, {count} trials, {options.workers} at once, in {folder}", soft_wrap=True, markup=False
    )
    workers = Workers(study, folder, runner or run_trial, more, console)
    return study, workers, workers.run(count, options.workers, options.gpus)


def _count(sweep: SweepFile, options: argparse.Namespace) -> int:
    """How many trials there are to be."""
    limit: int | None = options.count or sweep.run_cap
    if sweep.method == "grid":
        return min(len(sweep.grid()), limit or sys.maxsize)
    if limit is None:
        raise UserError(
            f"{options.file}: method: {sweep.method} has no end of its own; give --count N, or run_cap: N in the file"
        )
    return limit


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


_positive.__name__ = "number from 1"  # argparse shows it


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``search`` takes, also for the command line of ablations."""
    parser.add_argument("--workers", type=_positive, default=1, metavar="N", help="trials at once (default: 1)")
    parser.add_argument(
        "--gpus", nargs="+", default=[], metavar="GPU", help="one for each worker in turn (CUDA_VISIBLE_DEVICES)"
    )
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help=f"of the samples (default: {DEFAULT_SEED})")
    parser.add_argument("--name", help="of the results; by default that of the file")
    parser.add_argument("--runs", default="runs", help="directory of all runs (default: runs)")
    parser.add_argument(
        "--storage", metavar="URL", help="database; one that several machines reach shares the trials between them"
    )
    parser.add_argument("--retry-failed", action="store_true", help="run failed trials again")
