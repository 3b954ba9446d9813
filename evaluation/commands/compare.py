"""The commands ``summary`` and ``compare``: the table of results, and which run is better, at what cost, how surely."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import normalize

from evaluation.robustness import compared_robustness
from evaluation.statistics.scores import TESTED, checked_names, heading, is_defined
from evaluation.tables.calibration import compared_calibration
from evaluation.tables.comparison import (
    ComparedRow,
    Cost,
    Side,
    caveats,
    common_tasks,
    compare_sides,
    comparison_frames,
    cost_of,
    evaluations_of,
    parts,
    sides_of,
    values_of,
)
from evaluation.tables.summary import (
    join_summaries,
    joined_table,
    read_retrieval,
    refuse_other_configurations,
    retrieval_table,
    show_summaries,
    summarise_run,
    wide_table,
)
from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.runs import Run, is_run, runs_among
from vitrail.types import TaskKind

if TYPE_CHECKING:
    import pandas as pd


def add_summary_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``summary``."""
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    command.add_argument("--split", default="test", help="split whose predictions are read (default: test)")
    command.add_argument(
        "--join",
        action="store_true",
        help="the runs are seeds or folds of one experiment: their mean, standard deviation and intervals",
    )
    command.add_argument("--wide", action="store_true", help="one row a run, one column a task, main scores only")
    command.add_argument(
        "--retrieval", action="store_true", help="how well images found their texts, and texts their images"
    )
    add_metrics(command)
    add_forms(command)


def add_metrics(command: argparse.ArgumentParser) -> None:
    """Add ``--metrics`` and ``--calibrated``."""
    command.add_argument(
        "--metrics",
        nargs="+",
        default=(),
        metavar="NAME",
        help="scores to show instead of the usual ones: auroc, average_precision, balanced_accuracy, mcc, kappa, "
        "brier, nll, aurc, accuracy@.8 (of the most confident 80 %%), coverage@.05 (at most 5 %% wrong), or all",
    )
    command.add_argument(
        "--calibrated", action="store_true", help="calibrate outputs before, by what `vitrail calibrate` fitted"
    )


def add_forms(command: argparse.ArgumentParser) -> None:
    """Add ``--markdown`` and ``--json``."""
    form = command.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--json", action="store_true", help="print JSON, with cross-checks and further statistics")


def run_summary(options: argparse.Namespace, rest: list[str]) -> None:
    """Print the table.

    Raises:
        UserError: a run or its predictions are missing or cannot be read, or runs cannot be joined.
    """
    metrics = checked_names(options.metrics)
    if options.wide and (options.join or options.json or metrics):
        raise UserError("--wide: is a form of its own, of main scores; leave --join, --json and --metrics out")
    needs = f"reports/{options.split}_retrieval.csv" if options.retrieval else f"predictions/{options.split}.parquet"
    options.runs = runs_among(options.runs, "summary", needs)
    if options.retrieval:
        if options.join or options.wide or metrics or options.calibrated:
            raise UserError("--retrieval: is a table of its own; leave --join, --wide, --metrics and --calibrated out")
        _show(retrieval_table([read_retrieval(path, options.split) for path in options.runs]), options)
    elif options.join:
        found = join_summaries(options.runs, options.split, metrics, calibrated=options.calibrated)
        _show(joined_table(found), options)
    else:
        rows = [
            row
            for path in options.runs
            for row in summarise_run(path, options.split, metrics, calibrated=options.calibrated)
        ]
        if options.wide:
            _show(wide_table(rows), options)
        else:
            show_summaries(rows, as_markdown=options.markdown, as_json=options.json)


def _show(table: Table, options: argparse.Namespace) -> None:
    table.show(as_markdown=options.markdown, as_json=options.json)


_EPILOG = """\
examples:
  python -m evaluation compare runs/small/TIME runs/large/TIME --html compared.html
  python -m evaluation compare runs/small/* runs/large/* --join     # seeds or folds of two experiments
  python -m evaluation compare runs/small/TIME runs/large/TIME --seeds 5   # trains the seeds that are missing

What `vitrail evaluate RUN --data …` found on other data sets follows the runs' own results.
"""


def add_compare_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``compare``."""
    command.epilog = _EPILOG
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, at least two")
    command.add_argument("--split", default="test", help="split whose predictions are read (default: test)")
    command.add_argument(
        "--task",
        type=partial(normalize, "NFC"),
        help="compare on this task only (default: on all that the runs have in common)",
    )
    command.add_argument(
        "--join", action="store_true", help="runs of the same name are seeds or folds of one experiment: a row each"
    )
    command.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help="compare N runs of each experiment that differ in their seed (with --join): those next to the named ones, "
        "and what is missing is trained first",
    )
    command.add_argument(
        "--reference",
        choices=("first", "best"),
        default="first",
        help="what the others are compared with: the first, or the most accurate here (default: first)",
    )
    add_metrics(command)
    add_forms(command)
    command.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write a page: differences, the images on which the runs differ, costs",
    )
    command.add_argument("--data-root", metavar="FOLDER", help="where the images are now: data.init_args.root")
    command.add_argument("--no-data", action="store_true", help="leave the images out of the page")


def run_compare(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Compare, print, and write the page where asked.

    Raises:
        UserError: a run without usable predictions, or runs that cannot be compared.
    """
    from vitrail.runs import runs_among

    options.runs = runs_among(options.runs, "compare", f"predictions/{options.split}.parquet")
    if options.seeds is not None:
        options.runs, options.join = with_seeds(options.runs, options.seeds, options.split), True
    metrics = checked_names(options.metrics)
    sides = sides_of(options.runs, options.split, options.join, calibrated=options.calibrated)
    tasks = common_tasks(sides, options.task)
    is_test = options.split == "test"
    evaluations, left_out = evaluations_of(sides, calibrated=options.calibrated) if is_test else ([], [])
    rows = compare_sides(sides, tasks, options.reference, split=options.split, evaluations=evaluations, metrics=metrics)
    costs = {side.name: cost_of(side) for side in sides}
    frames = comparison_frames(rows, costs, metrics)
    reference = next((row.side for row in rows if row.reference), sides[0].name)
    corrupted, of_faults = compared_robustness({side.name: side.runs for side in sides}, tasks, reference)
    extra, of_calibration = compared_calibration(sides, tasks, options.split)
    notes = [*sentences(rows, options.reference), *_of_metrics(rows, metrics), *of_calibration, *of_faults]
    notes += [*caveats(sides, options.split), *left_out]
    extra |= {} if corrupted is None else {"corrupted": corrupted}
    if options.html is not None:
        _write_page(options, rest, sides, rows, costs, notes, extra)
    if options.json:
        Table((), (), values={"rows": [values_of(row) for row in rows], "notes": notes}).show(as_json=True)
    elif options.markdown:
        sys.stdout.write("".join(f"{_table(frame).markdown()}\n\n" for frame in [*frames.values(), *extra.values()]))
        sys.stdout.write("".join(f"* {sentence}\n" for sentence in notes))
    else:
        for part in (_parts(frames) | extra).values():
            _table(part).show()
        sys.stdout.write("".join(f"{sentence}\n" for sentence in notes))
    if options.html is not None and not options.json:
        sys.stdout.write(f"{options.html} has the page\n")


def with_seeds(paths: Sequence[Path], count: int, split: str = "test") -> list[Path]:
    """Return ``count`` runs of each experiment that differ in their seed alone, and train those that are missing.

    They are next to the given run, on the same division into splits.

    Args:
        paths: run directories; several of one experiment are allowed.
        count: runs of each experiment, at least 2.
        split: that must have been predicted.

    Raises:
        UserError: a run without configuration or seed, or a training fails.
    """
    if count < 2:
        raise UserError(f"--seeds: must be at least 2; got {count}")
    found: list[Path] = []
    for path in paths:
        if path.resolve() in {one.resolve() for one in found}:
            continue
        members = _other_seeds(Run(path), split)
        found += [run.path for run in members]
        seeds = [int(run.config["seed_everything"]) for run in members]
        for seed in range(seeds[0] + 1, seeds[0] + 1 + 2 * count):
            if len(seeds) >= count:
                break
            if seed not in seeds:
                found.append(_trained(members[0], seed, split))
                seeds.append(seed)
    return found


def _other_seeds(run: Run, split: str) -> list[Run]:
    """The run, and those next to it that differ in their seed alone."""
    if not isinstance(run.config.get("seed_everything"), int):
        raise UserError(f"{run.path}: has no configuration with a seed_everything; train it again with one")
    members = [run]
    for other in (Run(path) for path in sorted(run.path.resolve().parent.iterdir()) if is_run(path)):
        usable = other.predictions(split) is not None and not other.interrupted
        if usable and isinstance(other.config.get("seed_everything"), int):
            with suppress(UserError):  # of another experiment, or the same seed once more
                refuse_other_configurations([*members, other])
                members.append(other)
    return members


def _trained(run: Run, seed: int, split: str) -> Path:
    """Train what a run trained with another seed, on the same division into splits."""
    arguments = ["--config", str(run.path / Run.CONFIG), "--seed_everything", str(seed), "--test_best", "true"]
    data = run.config.get("data") or {}
    options = data.get("init_args") or {}
    if isinstance(options.get("split"), dict):
        own = options["split"].get("seed")
        before = run.config["seed_everything"] if own is None else own
        arguments += ["--data.init_args.split.seed", str(before)]
    sys.stdout.write(f"{run.name}: training with seed {seed}\n")
    sys.stdout.flush()
    before_it = set(run.path.resolve().parent.iterdir())
    done = subprocess.run([sys.executable, "-m", "experiments", "fit", *arguments], check=False)
    made = sorted(path for path in set(run.path.resolve().parent.iterdir()) - before_it if is_run(path))
    if done.returncode or not made or Run(made[-1]).predictions(split) is None:
        raise UserError(
            f"{run.name}: training with seed {seed} did not end (exit code {done.returncode}); mend it, and give the "
            "same command again: seeds that are there are kept"
        )
    return made[-1]


def sentences(rows: Sequence[ComparedRow], reference: str) -> list[str]:
    """Return the comparisons in full, and how p-values are to be read."""
    made = [row for row in rows if row.comparison is not None]
    bases = list(dict.fromkeys(f"{row.side} on {row.data}" if row.data else row.side for row in rows if row.reference))
    found = [f"Differences are to {', '.join(bases)}, on the same samples; p is of the exact test by group."]
    if any(row.comparison is not None and not math.isnan(row.comparison.over_seeds.low) for row in rows):
        found.append(
            "Over seeds: what training again would change (Welch's interval); where it holds 0, the seeds may have "
            "made the difference."
        )
    if any(row.joined.kind in ("one run", "folds") for row in rows):
        found.append("A run without other seeds shows that very training; another seed may end elsewhere.")
    found += [row.comparison.verdict(row.p_value) for row in made if row.comparison is not None]
    if untested := dict.fromkeys(
        row.joined.task for row in made if row.comparison is not None and row.comparison.n and math.isnan(row.p_value)
    ):
        found.append(
            f"{', '.join(untested)}: mAP is no mean over samples, so there is no test; the interval alone decides, "
            "without a correction for several comparisons."
        )
    if (corrected := sum(not math.isnan(row.p_value) for row in made)) > 1:
        found.append(f"p-values are corrected for {corrected} comparisons (Holm).")
    if any(row.joined.n and not math.isnan(row.calibration.value) for row in rows):
        found.append(
            "ECE is how far accuracy is from confidence on average (15 bins); where its interval begins at 0, chance "
            "alone may have made it."
        )
    if reference == "best" and any(row.joined.n for row in rows):
        found.append("The reference was chosen by its accuracy on these very samples, which flatters it.")
    return found


def _of_metrics(rows: Sequence[ComparedRow], metrics: Sequence[str]) -> list[str]:
    """What to know of the scores that were asked for."""
    there = {name for row in rows for name in row.joined.scores}
    shown = [name for name in metrics if name in there]
    found = []
    if tested := [heading(name) for name in shown if name in TESTED]:
        found.append(
            f"{', '.join(tested)}: p is corrected for the comparisons of each score (Holm), not for the number of "
            "scores."
        )
    if untested := [heading(name) for name in shown if name not in TESTED]:
        found.append(f"{', '.join(untested)}: no means over samples, so without a test; the interval alone decides.")
    kinds = {row.joined.task: row.joined.task_kind for row in rows}
    for task, kind in kinds.items():
        if without := [heading(name) for name in metrics if not is_defined(name, kind)]:
            found.append(f"{task} ({kind}) has no {', '.join(without)}.")
    return found


def _parts(frames: dict[TaskKind, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Tables that a window has room for; cost, which is the same for all tasks, once."""
    found: dict[str, pd.DataFrame] = {}
    for number, (kind, frame) in enumerate(frames.items()):
        for name, part in parts(frame).items():
            if not number or name != "cost":
                found[name if len(frames) == 1 or name == "cost" else f"{kind}_{name}"] = part
    return dict(sorted(found.items(), key=lambda item: item[0] == "cost"))


def _table(frame: pd.DataFrame) -> Table:
    return Table(
        list(frame.columns), frame.to_numpy().tolist(), ("run", "data", "task", "label", "intervals", "verdict", "note")
    )


def _write_page(
    options: argparse.Namespace,
    rest: Sequence[str],
    sides: Sequence[Side],
    rows: Sequence[ComparedRow],
    costs: dict[str, Cost],
    notes: list[str],
    extra: dict[str, pd.DataFrame],
) -> None:
    """Write the page; its charts, images and tables as files go to a folder of its name next to it."""
    from evaluation.commands.report import data_of_run, reader
    from evaluation.report import compared
    from evaluation.report.page import Page, Section

    frames = comparison_frames(rows, costs, checked_names(options.metrics))
    charts = compared.cost_charts(rows, costs)
    missing = [] if charts else ["No cost is known of two runs, so there is no chart of score against cost."]
    if any(math.isnan(cost.latency) for cost in costs.values()):
        every = " ".join(str(run.path) for side in sides for run in side.runs[:1])
        missing.append(
            f"Latencies have not been measured for every run: run `python -m evaluation efficiency {every}`."
        )
    datamodule, why_not = data_of_run(sides[0].runs[0], options, rest)
    read = None if datamodule is None else reader(datamodule)
    tasks = list(dict.fromkeys(row.joined.task for row in rows))
    files = {"compared" if len(frames) == 1 else f"compared_{kind}": frame for kind, frame in frames.items()}
    sections = [
        compared.forest_section(rows),
        compared.disagreements_section(sides, tasks, options.split, read, why_not),
        Section("Score against cost", charts=charts, missing=missing),
        Section("Table", tables=_parts(frames) | extra, files=files),
        Section("In words", paragraphs=notes),
        compared.runs_section(sides),
    ]
    named = " ".join(str(run) for run in options.runs)
    lead = [f"`python -m evaluation compare {named}{' --join' if options.join else ''}`, evaluated on {options.split}."]
    known, steps = caveats(sides, options.split), missing[-1:]
    if any(row.comparison is not None and row.comparison.single for row in rows):
        known.insert(0, "Each is a single training: which method is better, other seeds would show.")
        steps.insert(0, f"Train other seeds: `python -m evaluation compare {named} --seeds 5`.")
    summary = compared.comparison_summary(rows, options.split, options.reference, known, steps)
    path: Path = options.html
    stem = path.name.removesuffix(".html")
    Page(" and ".join(costs) if len(costs) == 2 else f"{len(costs)} compared", lead, sections, summary).write(
        path.parent, stem, files=path.parent / stem
    )
