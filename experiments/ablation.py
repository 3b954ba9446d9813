"""``python -m experiments ablate FILE``: what each variant of an experiment has, costs and reaches, as one table.

Counts come from shapes alone. Costs are measured side by side with random weights. Accuracies are those of a run each,
a ``fit`` with a test of its best checkpoint in a process of its own, where weights and data are at hand. What is done
is kept by variant; the same command goes on where it was stopped, and does again only what a changed file asks for.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.efficiency_command import add_measuring, check_device, measured
from vitrail.errors import UserError, run_reporting_user_errors, same_command
from vitrail.trust import plain_name

if TYPE_CHECKING:
    from experiments.ablation_file import Variant
    from experiments.ablation_results import Results
    from experiments.sweep_trial import Runner

_PARTS = ("costs", "accuracy")


def main(args: Sequence[str], runner: Runner | None = None) -> int:
    """Run an ablation, or go on with one.

    Args:
        args: arguments after ``ablate``.
        runner: runs a fit; by default as a process of its own.

    Returns:
        Exit code: 0, 2 after a mistake of the user, 130 after Ctrl-C, 143 after SIGTERM.
    """
    options = _parser().parse_args(list(args))
    stopped_by: list[int] = []
    code = run_reporting_user_errors(lambda: stopped_by.append(_run(options, runner)))
    return 128 + stopped_by[0] if any(stopped_by) else code


def _run(options: argparse.Namespace, runner: Runner | None) -> int:
    from rich.console import Console

    from experiments.ablation_file import read_ablation
    from experiments.ablation_report import markdown_table, rich_table, write_reports
    from experiments.ablation_results import Results
    from vitrail.console import print_table

    check_device(options.device)
    variants = _chosen(read_ablation(options.file, options.config, options.set), options)
    name = plain_name(options.file.stem if options.name is None else options.name, "--name")
    folder = Path(options.runs) / "ablations" / name
    console = Console(stderr=True)
    results = [Results(folder, variant) for variant in variants]
    none_worked = not any(result.run for result in results)
    for result in results:
        result.count()
        if options.retry_failed or (none_worked and result.was_refused):
            result.forget_failure()
    if "costs" not in options.without:
        _measure(results, options, console)
    stopped_by, refusal = 0, ""
    if "accuracy" not in options.without:
        stopped_by, refusal = _train(results, runner, console)
    written = write_reports(folder, options.file.stem, results)
    if options.markdown:
        sys.stdout.write(f"{markdown_table(results)}\n")
        console.print(written, highlight=False, soft_wrap=True)
    else:
        print_table(rich_table(results, options.file.stem))
        sys.stdout.write(f"{written}\n")
    if stopped_by:
        sys.stdout.write(f"Stopped. The same command goes on. ({same_command()})\n")
    elif refusal:
        raise UserError(
            f"{refusal} (the first run of {options.file} was refused, so the others were not begun; --only NAME trains "
            "others, the same command this one again)"
        )
    return stopped_by


def _chosen(variants: list[Variant], options: argparse.Namespace) -> list[Variant]:
    if strange := sorted(set(options.only) - {variant.name for variant in variants}):
        known = ", ".join(variant.name for variant in variants)
        raise UserError(f"--only {strange[0]}: {options.file} has {known}; name one of them")
    return [variant for variant in variants if not options.only or variant.name in options.only]


def _measure(results: Sequence[Results], options: argparse.Namespace, console: object) -> None:
    """Measure those that have no costs by these settings yet, beside the first, which all ratios are to."""
    from rich.console import Console

    settings = {
        "batch_sizes": sorted(set(options.batch_sizes)),
        "repeats": options.repeats,
        "device": options.device,
        "threads": options.threads,
        "first": results[0].variant.fingerprint,
    }
    buildable = [result for result in results if result.counts is not None]
    missing = [result for result in buildable if not result.has_costs(settings)]
    if not missing:
        return
    together = [buildable[0], *(result for result in missing if result is not buildable[0])]
    assert isinstance(console, Console)
    console.print(f"measuring {len(together)} models in turn, {options.repeats} rounds", highlight=False)
    counts = {result.variant.name: result.counts for result in together if result.counts is not None}
    costs = measured({result.variant.name: result.source for result in together}, counts, options)
    for result in missing:
        result.keep_costs(costs[result.variant.name], settings)


def _train(results: Sequence[Results], runner: Runner | None, console: object) -> tuple[int, str]:
    """Train and test those that have no result yet, unless the first one is refused and nothing else has worked.

    Returns:
        The signal that stopped it, or 0; and why the first run was refused, or nothing.
    """
    from rich.console import Console

    assert isinstance(console, Console)
    stop, told, refusal = threading.Event(), [0], ""

    def stopped(number: int, frame: object) -> None:
        told[0] = number
        stop.set()

    before = {number: signal.signal(number, stopped) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for result in results:
            if stop.is_set():
                break
            if result.has_outcome:
                continue
            console.print(f"training {result.variant.name}", highlight=False, markup=False)
            refusal = result.train(runner, stop)
            console.print(f"  {result.note or 'done'}", highlight=False, soft_wrap=True, markup=False)
            if refusal and not any(other.run for other in results):
                break
            refusal = ""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return told[0], refusal


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments ablate",
        description="Counts, costs and accuracies of an experiment's variants, one row each.",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="such as experiments/ablations/….yaml")
    parser.add_argument("--without", nargs="+", choices=_PARTS, default=[], help="leave these out")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these variants only")
    parser.add_argument(
        "--config", action="append", default=[], type=Path, metavar="OVERLAY", help="laid over every variant"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="[NAME:]KEY=VALUE", help="a value of all variants, or of one"
    )
    parser.add_argument("--name", help="of the ablation; by default that of the file")
    parser.add_argument("--runs", default="runs", help="directory of all runs (default: runs)")
    parser.add_argument("--retry-failed", action="store_true", help="train those again whose run failed")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    add_measuring(parser)
    return parser
