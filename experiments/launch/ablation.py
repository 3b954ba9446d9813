"""``python -m experiments ablate FILE``: what each overlay of an experiment has, costs and reaches, as one table.

An ablation is a sweep file whose grid is over ``overlay`` alone. Its trials are run by the sweep's engine, each a
``fit`` with a test of its best checkpoint where weights and data are at hand, and compared by ``evaluation compare``.
Counts come from shapes alone; costs are measured side by side with random weights. The same command goes on where it
was stopped, and does again only what a changed file asks for.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from evaluation.commands.efficiency import add_measuring, build_experiment, measured
from evaluation.efficiency import cells, columns, costs_from_values, count, ratios_to
from evaluation.tables.summary import score_text, summarise_run, task_heading
from experiments.launch.study import ERROR, RUN, Outcome
from experiments.launch.sweep import add_search_options, search
from experiments.launch.sweep_file import OVERLAY, SweepFile, fingerprint, read_sweep
from vitrail.config import load_yaml, merged, read_experiments
from vitrail.console import Table
from vitrail.errors import UserError, same_command
from vitrail.files import write_csv, write_text_atomically
from vitrail.runs import Run
from vitrail.runtime import check_device
from vitrail.trust import plain_name

if TYPE_CHECKING:
    from rich.console import Console

    from evaluation.efficiency import Costs, Counts
    from evaluation.tables.summary import TaskSummary
    from experiments.launch.workers import Job, Watch


class Variant:
    """One row of the table.

    Args:
        name: of the overlay.
        experiment: the whole experiment, the overlay and everything asked for merged in.

    Attributes:
        counts: None where the model cannot be built.
        costs: None where they were not measured.
        run: whose test split has been predicted; None for none.
        error: why it has no run.
    """

    def __init__(self, name: str, experiment: Mapping[str, Any]) -> None:
        self.name, self.experiment = name, experiment
        self.costs: Costs | None = None
        self.run: Path | None = None
        self.error = ""
        self._cannot_be_built = ""
        self.counts: Counts | None = None
        try:
            self.counts = count(*build_experiment(experiment, "meta"))
        except UserError as error:
            self._cannot_be_built = str(error)

    @property
    def note(self) -> str:
        """Why numbers are missing; empty where none are."""
        notes = [self._cannot_be_built]
        notes.append(f"not measured: {self.costs.error}" if self.costs and self.costs.error else "")
        # The fix that an error names is in the run's log; a table has room for what is wrong.
        notes.append(f"no accuracy: {self.error.split(';')[0]}" if self.error else "")
        return "; ".join(one for one in notes if one)

    @cached_property
    def accuracies(self) -> dict[str, TaskSummary]:
        """Of each task on the test split; empty where there is no run."""
        return {one.task: one for one in summarise_run(self.run)} if self.run else {}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ablate``."""
    command.description = "Counts, costs and accuracies of an experiment's overlays, one row each, and a comparison."
    command.add_argument("file", type=Path, metavar="FILE", help="such as experiments/ablations/….yaml")
    command.add_argument("--without", nargs="+", choices=("costs", "accuracy"), default=[], help="leave these out")
    command.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these variants only")
    command.add_argument(
        "--config", action="append", default=[], type=Path, metavar="OVERLAY", help="laid over every variant"
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="[NAME:]KEY=VALUE", help="a value of all variants, or of one"
    )
    command.add_argument("--markdown", action="store_true", help="print Markdown tables")
    add_search_options(command)
    add_measuring(command)


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run an ablation, or go on with one.

    Returns:
        Exit code: 0, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        UserError: the file or an option is wrong, or the first run was refused.
    """
    from rich.console import Console

    check_device(options.device)
    sweep = read_ablation(options.file, options.config, options.set)
    if strange := sorted(set(options.only) - sweep.overlays.keys()):
        raise UserError(f"--only: must be among {', '.join(sweep.overlays)}; got {strange[0]!r}")
    chosen = {name: one for name, one in sweep.overlays.items() if not options.only or name in options.only}
    sweep = _with_overlays(sweep, chosen)
    name = plain_name(options.file.stem if options.name is None else options.name, "--name")
    folder = Path(options.runs) / "ablations" / name
    console = Console(stderr=True)
    variants = [Variant(*one) for one in chosen.items()]
    if "costs" not in options.without:
        _measure(variants, folder / "costs.json", options, console)
    stopped_by, refusal = 0, ""
    if "accuracy" not in options.without:
        stopped_by, refusal = _train(variants, sweep, name, folder, options)
    table = variants_table(variants)
    written = write_reports(folder, options.file.stem, variants, table)
    if options.markdown:
        sys.stdout.write(f"{table.markdown()}\n")
        console.print(written, highlight=False, soft_wrap=True)
    else:
        # One column per variant: there are more numbers than variants.
        names, *columns = zip(table.columns, *table.rows, strict=True)
        Table(names, columns, None, options.file.stem).show()
        sys.stdout.write(f"{written}\n")
    _compare([str(variant.run) for variant in variants if variant.run], folder, options)
    if stopped_by:
        sys.stdout.write(f"Stopped. The same command goes on. ({same_command()})\n")
    elif refusal:
        raise UserError(
            f"{refusal} (the first run of {options.file} was refused, so the others were not begun; --only NAME trains "
            "others, the same command this one again)"
        )
    return stopped_by and 128 + stopped_by


def read_ablation(file: Path, overlays: Sequence[Path] = (), settings: Sequence[str] = ()) -> SweepFile:
    """Read an ablation as a sweep over whole experiments.

    Args:
        file: a sweep file with a grid over ``overlay`` alone.
        overlays: experiment files that are laid over every variant.
        settings: ``KEY=VALUE`` for all variants or ``NAME:KEY=VALUE`` for one, which override both.

    Raises:
        UserError: for a file or a setting that is not as it should be.
    """
    sweep = read_sweep(file)
    if sweep.method != "grid" or [parameter.name for parameter in sweep.parameters] != [OVERLAY]:
        raise UserError(f"{file}: an ablation is a grid over parameters.{OVERLAY} alone; run others with `sweep`")
    base, common = read_experiments(sweep.configs), read_experiments(overlays) if overlays else {}
    changes = _settings(list(sweep.overlays), settings)
    whole = {
        name: merged(merged(merged(base, overlay), common), changes[name]) for name, overlay in sweep.overlays.items()
    }
    fit = list(sweep.fit)
    while "--config" in fit:
        del fit[fit.index("--config") : fit.index("--config") + 2]
    return _with_overlays(replace(sweep, fit=(*fit, "--test_best=true")), whole)


def _with_overlays(sweep: SweepFile, overlays: Mapping[str, Any]) -> SweepFile:
    (parameter,) = sweep.parameters
    return replace(sweep, parameters=(replace(parameter, options={"values": overlays}),))


def _settings(names: Sequence[str], settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    changes: dict[str, dict[str, Any]] = {name: {} for name in names}
    for setting in settings:
        left, equals, text = setting.partition("=")
        # A name may contain a colon, a key never does.
        name, colon, key = left.rpartition(":")
        if not equals or not key or (colon and name not in changes):
            raise UserError(
                f"--set {setting}: is neither KEY=VALUE nor NAME:KEY=VALUE with NAME one of {', '.join(names)}"
            )
        try:
            nested: dict[str, Any] = load_yaml(text or '""', below=key.split("."))
        except yaml.YAMLError as error:
            raise UserError(f"--set {setting}: the value is no YAML") from error
        for one in [name] if colon else names:
            changes[one] = merged(changes[one], nested)
    return changes


def _measure(variants: Sequence[Variant], path: Path, options: argparse.Namespace, console: Console) -> None:
    """Read costs that were measured by these settings, and measure the others in turn with the first."""
    settings = [sorted(set(options.batch_sizes)), options.repeats, options.device, options.threads]
    settings.append(fingerprint(variants[0].experiment))
    buildable = [variant for variant in variants if variant.counts is not None]
    keys = {variant.name: fingerprint([variant.experiment, *settings]) for variant in buildable}
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it to measure again") from error
    missing = [variant for variant in buildable if keys[variant.name] not in kept]
    if missing:
        together = [buildable[0], *(variant for variant in missing if variant is not buildable[0])]
        console.print(f"measuring {len(together)} models in turn, {options.repeats} rounds", highlight=False)
        counts = {variant.name: variant.counts for variant in together if variant.counts is not None}
        builders = {variant.name: partial(build_experiment, variant.experiment) for variant in together}
        costs = measured(builders, counts, options)
        kept |= {keys[variant.name]: asdict(costs[variant.name]) for variant in missing}
        write_text_atomically(path, json.dumps(kept, indent=2) + "\n")
        kept = json.loads(path.read_text(encoding="utf-8"))  # its keys are texts
    for variant in buildable:
        variant.costs = costs_from_values(kept[keys[variant.name]])


def _train(
    variants: Sequence[Variant], sweep: SweepFile, name: str, folder: Path, options: argparse.Namespace
) -> tuple[int, str]:
    """Fit and test what has no run yet; return the signal that stopped it, or 0, and why the first was refused."""
    from experiments.launch import workers

    def unless_done(job: Job, watch: Watch, stop: threading.Event) -> Outcome:
        # Of this very overlay, by another version of the file.
        if (done := _tested(job.place)) is not None:
            known = workers.ended(job, "complete", before=set())
            return replace(known, value=known.value or 0.0, run=done)
        outcome = workers.run_trial(job, watch, stop)
        if outcome.state == "complete" and _tested(job.place) is None:
            return replace(
                outcome, state="failed", error=f"the run has no predictions of the test split; see {job.log}"
            )
        return outcome

    study_name = f"{name}-{fingerprint(dict(sweep.overlays))}"
    study, ended, stopped_by = search(sweep, study_name, folder, options, len(variants), runner=unless_done)
    for variant, trial in zip(variants, study.trials(), strict=False):
        variant.run = _tested(Path(trial.user_attrs[RUN]).parent) if trial.user_attrs.get(RUN) else None
        variant.error = trial.user_attrs.get(ERROR) or ""
    return stopped_by, ended.refusal


def _tested(place: Path) -> Path | None:
    """The run of a variant whose test split has been predicted."""
    return max((path.parents[1] for path in place.glob(f"*/{Run.PREDICTIONS}/test.parquet")), default=None)


def _compare(runs: list[str], folder: Path, options: argparse.Namespace) -> None:
    """Compare the runs on the samples of the test split, where there are two or more."""
    from evaluation.__main__ import main as evaluate

    if len(runs) > 1:
        sys.stdout.write("\n")
        arguments = ["compare", *runs, "--html", str(folder / "compared.html")]
        sys.stdout.flush()
        evaluate([*arguments, *(["--markdown"] if options.markdown else [])])


def write_reports(folder: Path, title: str, variants: Sequence[Variant], table: Table) -> str:
    """Write ``ablation.csv`` and ``ablation.md``, each atomically.

    Returns:
        A line with their folder; one before it where ratios are not to the first variant.
    """
    import pandas as pd

    write_csv(folder / "ablation.csv", pd.DataFrame([_values(variant) for variant in variants]))
    note = ratios_to({variant.name: (variant.counts, variant.costs) for variant in variants})
    parts = "\n".join([f"# {title}", "", table.markdown(), *(["", note] if note else [])])
    write_text_atomically(folder / "ablation.md", f"{parts}\n")
    written = f"{folder} has ablation.csv and ablation.md"
    return f"{note}\n{written}" if note else written


def variants_table(variants: Sequence[Variant]) -> Table:
    """One row per variant. A column that no variant has is left out."""
    sizes = sorted({size for variant in variants if variant.costs for size in variant.costs.batches})
    tasks = list(dict.fromkeys(task for variant in variants for task in variant.accuracies))
    headings = [task_heading([one.accuracies[task] for one in variants if task in one.accuracies]) for task in tasks]
    names = ["variant", "px", *columns(sizes), *(f"{heading} [95 %]" for heading in headings), "note"]
    rows = []
    for variant in variants:
        found = [variant.accuracies.get(task) for task in tasks]
        rows.append(
            [
                variant.name,
                str(variant.counts.image_size) if variant.counts else "–",
                *cells(variant.counts, variant.costs, sizes),
                *(score_text(one.main, one.main_score) if one else "–" for one in found),
                variant.note,
            ]
        )
    kept = [place for place in range(len(names)) if not rows or any(row[place] not in ("", "–") for row in rows)]
    return Table([names[place] for place in kept], [[row[place] for place in kept] for row in rows])


def _values(variant: Variant) -> dict[str, Any]:
    """The numbers themselves, for the CSV; empty where there are none."""
    row: dict[str, Any] = {"variant": variant.name}
    if variant.counts is not None:
        row |= vars(variant.counts)
    if (costs := variant.costs) is not None and not costs.error:
        row |= {"device": costs.device, "threads": costs.threads, "ratio_to": costs.first}
        for size, one in costs.batches.items():
            row |= {
                f"p50_seconds_{size}": one.p50,
                f"p95_seconds_{size}": one.p95,
                f"ratio_{size}": one.ratio,
                f"ratio_low_{size}": min(one.ratios),
                f"ratio_high_{size}": max(one.ratios),
                f"peak_bytes_{size}": one.peak_bytes,
            }
    for task in variant.accuracies.values():
        row |= {
            f"{task.task}_n": task.n,
            f"{task.task}_groups": task.groups,
            f"{task.task}_majority": task.majority,
            f"{task.task}_{task.main}": task.main_score.value,
            f"{task.task}_{task.main}_low": task.main_score.interval.low,
            f"{task.task}_{task.main}_high": task.main_score.interval.high,
            **({} if task.kind == "regression" else {f"{task.task}_f1_macro": task.f1_macro}),
        }
    return {**row, "run": variant.run, "note": variant.note}
