"""``python -m experiments sweep FILE``: a Weights & Biases sweep file, run without an account and without a network.

Grid, random search and TPE (for ``bayes``) are Optuna's, trials are processes that ``fit``, and their database is a
file in ``runs/sweeps/<name>/`` or, for several machines, at any URL that SQLAlchemy knows. The same command goes on
where a sweep was stopped or killed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.launch.sweep_file import SweepFile, read_sweep
from vitrail.errors import UserError, run_reporting_user_errors, same_command
from vitrail.trust import plain_name

if TYPE_CHECKING:
    from experiments.launch.workers import Runner

_DEFAULT_SEED = 42


def main(args: Sequence[str], runner: Runner | None = None) -> int:
    """Run a sweep, or go on with one.

    Args:
        args: arguments after ``sweep``.
        runner: runs a trial; by default as a process of its own.

    Returns:
        Exit code: 0, 2 after a mistake of the user or if no trial was a success, 130 after Ctrl-C, 143 after SIGTERM.
    """
    ours, more = _divided(list(args))
    options = _parser().parse_args(ours)
    stopped_by: list[int] = []
    code = run_reporting_user_errors(lambda: stopped_by.append(_run(options, more, runner) or 0))
    return 128 + stopped_by[0] if any(stopped_by) else code


def _run(options: argparse.Namespace, more: list[str], runner: Runner | None) -> int | None:
    from rich.console import Console

    from experiments.launch.study import SweepStudy
    from experiments.launch.sweep_report import best_trial, rich_table, sweep_frame, write_reports
    from experiments.launch.workers import Workers, run_trial

    sweep = read_sweep(options.file)
    count = _count(sweep, options)
    name = plain_name(options.file.stem if options.name is None else options.name, "--name")
    folder = Path(options.runs) / "sweeps" / name
    folder.mkdir(parents=True, exist_ok=True)
    study = SweepStudy(options.storage or f"sqlite:///{folder / 'sweep.db'}", name, sweep, options.seed)
    study.find_lost()
    study.ask_for(count, retry_failed=options.retry_failed, retry_refused=True)
    console = Console(stderr=True)
    console.print(
        f"{name}: {sweep.method}, {count} trials, {options.workers} at once, in {folder}", soft_wrap=True, markup=False
    )
    workers = Workers(study, folder, runner or run_trial, more, console)
    stopped_by = workers.run(count, options.workers, options.gpus)

    trials = study.trials()
    said = write_reports(folder, study.study, trials, sweep.metric, Path(options.runs))
    # Wide enough for whole paths where there is no terminal to fit (a pipe, a log).
    out = Console(width=None if sys.stdout.isatty() else 200)
    out.print(rich_table(sweep_frame(trials, sweep.metric), sweep.metric, f"{name}: {sweep.metric.name}"))
    out.print(said, soft_wrap=True, highlight=False)
    if stopped_by:
        out.print(f"Stopped. The same command goes on. ({same_command()})", soft_wrap=True, markup=False)
    elif workers.refusal:
        raise UserError(
            f"{workers.refusal} (the first trial of {options.file} was refused, so the sweep has ended; logs in "
            f"{folder / 'logs'}; the same command runs it again)"
        )
    elif best_trial(trials, sweep.metric) is None:
        errors = [trial.user_attrs["error"] for trial in trials if "error" in trial.user_attrs]
        raise UserError(
            f"{options.file}: no trial of {len(trials)} was a success; the last one said: "
            f"{(errors or ['nothing'])[-1]} (all in {folder / 'logs'}; --retry-failed runs them again)"
        )
    return stopped_by


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


def _divided(args: list[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and those after ``--``, which every trial gets."""
    position = args.index("--") if "--" in args else len(args)
    return args[:position], args[position + 1 :]


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


_positive.__name__ = "number from 1"  # argparse says it


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments sweep",
        description="Run a W&B sweep file without an account: grid, random or TPE, early stopping, several workers.",
        epilog="What stands after -- is given to every trial before its values: "
        "-- --config experiments/overlays/two_cores.yaml",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="sweep file, such as experiments/sweeps/….yaml")
    parser.add_argument("--count", type=_positive, metavar="N", help="trials; by default run_cap:, or the whole grid")
    parser.add_argument("--workers", type=_positive, default=1, metavar="N", help="trials at once (default: 1)")
    parser.add_argument(
        "--gpus", nargs="+", default=[], metavar="GPU", help="one for each worker in turn (CUDA_VISIBLE_DEVICES)"
    )
    parser.add_argument("--seed", type=int, default=_DEFAULT_SEED, help=f"of what is drawn (default: {_DEFAULT_SEED})")
    parser.add_argument("--name", help="of the sweep; by default that of the file")
    parser.add_argument("--runs", default="runs", help="directory of all runs (default: runs)")
    parser.add_argument(
        "--storage", metavar="URL", help="database; one that several machines reach shares the sweep between them"
    )
    parser.add_argument("--retry-failed", action="store_true", help="run failed trials again")
    return parser
