"""``python -m experiments ablate FILE``: what each variant of an experiment has, costs and reaches, as one table.

Counts come from shapes alone. Costs are measured side by side with random weights. Accuracies are those of a run each,
a ``fit`` with a test of its best checkpoint in a process of its own, where weights and data are at hand. What is done
is kept by variant; the same command goes on where it was stopped, and does again only what a changed file asks for.

An ablation as one YAML file: an experiment, and variants that each change a little of it.

What an ablation leaves: the table as CSV and Markdown, and a plot of accuracy over cost.

What is known of one variant of an ablation, kept in a file of its own so that nothing is done twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from evaluation.commands.efficiency import add_measuring, measured
from evaluation.cost.efficiency import ModelSource, cells, columns, ratios_to
from evaluation.report.figures import plain
from evaluation.tables.summary import markdown_rows, with_interval
from evaluation.tables.summary_wide import task_heading
from experiments.launch.study import Outcome
from experiments.launch.sweep_file import Metric
from experiments.launch.workers import Job, Runner, run_trial
from vitrail.config import dump_yaml, load_yaml, merged, read_experiment, read_experiments
from vitrail.errors import UserError, run_reporting_user_errors, same_command
from vitrail.files import write_csv, write_text_atomically
from vitrail.runs import Run
from vitrail.runtime import check_device
from vitrail.trust import plain_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from evaluation.cost.efficiency import Costs, Counts
    from evaluation.tables.summary import TaskSummary
    from experiments.launch.workers import Runner


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


_KEYS = {"experiment", "variants"}
_VARIANT_KEYS = {"name", "changes"}
_PLACE = "{file}: variants[{number}]"


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: as the file has it.
        experiment: the whole experiment file, the variant's changes and everything asked for merged in.
    """

    name: str
    experiment: Mapping[str, Any]

    @property
    def slug(self) -> str:
        """Its name as a folder's."""
        return re.sub(r"[^\w.@-]+", "_", self.name).strip("_.")

    @property
    def fingerprint(self) -> str:
        """Changes with anything that its numbers depend on."""
        return hashlib.sha256(json.dumps(self.experiment, sort_keys=True).encode()).hexdigest()[:16]


def read_ablation(file: Path, overlays: Sequence[Path] = (), settings: Sequence[str] = ()) -> list[Variant]:
    """The variants of a file.

    Args:
        file: of the ablation; ``experiment:`` in it is relative to it.
        overlays: experiment files that are laid over every variant.
        settings: ``KEY=VALUE`` for all variants or ``NAME:KEY=VALUE`` for one, the last word on both.

    Raises:
        UserError: for a file or a setting that is not as it should be.
    """
    content = read_experiment(file)
    if strange := sorted(set(content) - _KEYS):
        raise UserError(f"{file}: unknown key {strange[0]!r}; an ablation has experiment: and variants:")
    if not isinstance(content.get("experiment"), str) or not isinstance(content.get("variants"), list):
        raise UserError(f"{file}: needs experiment: with the path of an experiment, and a list variants:")
    base = read_experiment(file.parent / content["experiment"])
    variants = []
    for number, one in enumerate(content["variants"]):
        place = _PLACE.format(file=file, number=number)
        if not isinstance(one, dict) or set(one) != _VARIANT_KEYS or not isinstance(one["changes"], dict):
            raise UserError(f"{place}: needs name: and changes:, which holds keys as an experiment file has them")
        experiment = merged(merged(base, one["changes"]), read_experiments(overlays))
        variants.append(Variant(str(one["name"]), experiment))
    _check_names(file, variants)
    return _with_settings(variants, settings)


def _check_names(file: Path, variants: Sequence[Variant]) -> None:
    if not variants:
        raise UserError(f"{file}: variants: is empty; name at least one")
    seen: set[str] = set()
    for variant in variants:
        if not variant.slug or variant.slug in seen:
            raise UserError(f"{file}: variants: {variant.name!r} is not a name of its own as a folder; rename it")
        seen.add(variant.slug)


def _with_settings(variants: Sequence[Variant], settings: Sequence[str]) -> list[Variant]:
    names = [variant.name for variant in variants]
    changes: dict[str, dict[str, Any]] = {name: {} for name in names}
    for setting in settings:
        left, equals, text = setting.partition("=")
        # A name may hold a colon of its own, a key never does.
        name, colon, key = left.rpartition(":")
        if not equals or not key or (colon and name not in changes):
            raise UserError(
                f"--set {setting}: is neither KEY=VALUE nor NAME:KEY=VALUE with NAME one of {', '.join(names)}"
            )
        for one in [name] if colon else names:
            changes[one] = merged(changes[one], _nested(key, text, setting))
    return [Variant(variant.name, merged(dict(variant.experiment), changes[variant.name])) for variant in variants]


def _nested(key: str, text: str, setting: str) -> dict[str, Any]:
    try:
        nested: dict[str, Any] = load_yaml(text or '""', below=key.split("."))
    except yaml.YAMLError as error:
        raise UserError(f"--set {setting}: the value is no YAML") from error
    return nested


def write_reports(folder: Path, title: str, results: Sequence[Results]) -> str:
    """Write ``ablation.csv``, ``ablation.md`` and ``ablation.png``, each whole.

    Returns:
        A line that says where they lie; one before it where ratios are not to the first variant.
    """
    import pandas as pd

    from evaluation.report.figures import save_figure

    write_csv(folder / "ablation.csv", pd.DataFrame([_values(result) for result in results]))
    note = ratios_to({result.variant.name: (result.counts, result.costs) for result in results})
    told = "\n".join([f"# {title}", "", markdown_table(results), *(["", note] if note else [])])
    write_text_atomically(folder / "ablation.md", f"{told}\n")
    figure = _figure(results, title)
    if figure is not None:
        save_figure(figure, folder / "ablation.png")
    written = f"{folder} has ablation.csv, ablation.md{' and ablation.png' if figure else ''}"
    return f"{note}\n{written}" if note else written


def markdown_table(results: Sequence[Results]) -> str:
    """One row a variant."""
    return markdown_rows(*_text(results))


def rich_table(results: Sequence[Results], title: str) -> Table:
    """One column a variant: there are more numbers than variants."""
    from rich.markup import escape
    from rich.table import Table

    names, rows = _text(results)
    table = Table(*(escape(one) for one in ["", *(row[0] for row in rows)]), title=escape(title))
    for place, name in enumerate(names[1:], 1):
        table.add_row(escape(name), *(escape(row[place]) for row in rows))
    return table


def _text(results: Sequence[Results]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; one row a variant. What nobody has is no column."""
    sizes = _batch_sizes(results)
    accuracies = {id(result): {one.task: one for one in result.accuracies()} for result in results}
    tasks = list(dict.fromkeys(task for known in accuracies.values() for task in known))
    headings = [task_heading([known[task] for known in accuracies.values() if task in known]) for task in tasks]
    names = ["variant", "px", *columns(sizes), *(f"{heading} [95 %]" for heading in headings), "note"]
    rows = []
    for result in results:
        known = accuracies[id(result)]
        rows.append(
            [
                result.variant.name,
                str(result.counts.image_size) if result.counts else "–",
                *cells(result.counts, result.costs, sizes),
                *(
                    with_interval(known[task].accuracy, known[task].accuracy_interval) if task in known else "–"
                    for task in tasks
                ),
                result.note,
            ]
        )
    # What no variant has takes no room.
    kept = [place for place in range(len(names)) if not rows or any(row[place] not in ("", "–") for row in rows)]
    return [names[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _values(result: Results) -> dict[str, Any]:
    """The numbers themselves, for the CSV; empty where there are none."""
    row: dict[str, Any] = {"variant": result.variant.name}
    if result.counts is not None:
        row |= vars(result.counts)
    if (costs := result.costs) is not None and not costs.error:
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
    for task in result.accuracies():
        row |= {
            f"{task.task}_n": task.n,
            f"{task.task}_groups": task.groups,
            f"{task.task}_majority": task.majority,
            f"{task.task}_accuracy": task.accuracy,
            f"{task.task}_accuracy_low": task.accuracy_interval.low,
            f"{task.task}_accuracy_high": task.accuracy_interval.high,
            f"{task.task}_f1_macro": task.f1_macro,
        }
    return {**row, "run": result.run, "note": result.note}


def _batch_sizes(results: Sequence[Results]) -> list[int]:
    return sorted({size for result in results if (costs := result.costs) is not None for size in costs.batches})


def _figure(results: Sequence[Results], title: str) -> Figure | None:
    """Accuracy of the main task over operations; without accuracies, the time's ratio; without either, nothing."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(7.5, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    drawn = [(result, point) for result in results if result.counts and (point := _accuracy_of(result))]
    label = f"accuracy, {drawn[0][1][3]}, test; 95 % by object" if drawn else ""
    if not drawn:
        sizes = _batch_sizes(results)
        drawn = [
            (result, point) for result in results if result.counts and sizes and (point := _time_of(result, sizes))
        ]
        if not drawn:
            return None
        first = next(costs.first for result in results if (costs := result.costs) and costs.first)
        label = f"time, ratio to {first}, batch of {sizes[0]}; lowest and highest round"
        axes.set_yscale("log")
    seen: set[float] = set()
    for result, (value, low, high, _) in drawn:
        assert result.counts is not None
        flops = result.counts.image_flops / 1e9
        errors = [[value - low], [high - value]]
        axes.errorbar([flops], [value], yerr=errors, fmt="o", color="#2b6cb0", ecolor="#9db8d6", capsize=3)
        # Variants of one architecture lie at one place; so that their names do not, the later one's hangs below.
        below = any(0.75 < flops / other < 1.33 for other in seen)
        seen.add(flops)
        offset = (6, -11 if below else 5)
        axes.annotate(plain(result.variant.name), (flops, value), xytext=offset, textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        # Plain numbers, not powers of ten; on a linear axis nothing changes.
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter() if len(drawn) > 4 else FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("GFLOP of an image")
    axes.set_ylabel(plain(label))
    axes.set_title(plain(title))
    axes.margins(x=0.25, y=0.12)
    axes.grid(alpha=0.3)
    return figure


def _accuracy_of(result: Results) -> tuple[float, float, float, str] | None:
    main = next(iter(result.accuracies()), None)
    if main is None or not main.n:
        return None
    return main.accuracy, main.accuracy_interval.low, main.accuracy_interval.high, main.task


def _time_of(result: Results, sizes: Sequence[int]) -> tuple[float, float, float, str] | None:
    one = costs.batches.get(sizes[0]) if (costs := result.costs) else None
    return (one.ratio, min(one.ratios), max(one.ratios), "") if one else None


@dataclass(frozen=True)
class _VariantJob(Job):
    """A fit that is named after its variant.

    Attributes:
        run_name: of the run.
    """

    run_name: str = ""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run_name


class _Unwatched:
    """Nobody stops a variant early: each is to be compared with the others at its end."""

    def started(self, process: int) -> None:
        """Nothing to do."""

    def epoch(self, number: int, value: float) -> bool:
        """Never to be stopped."""
        return False

    def beat(self) -> None:
        """Nothing to do."""


class Results:
    """Counts, costs and the run of a variant.

    Args:
        folder: of the ablation.
        variant: which one; what is on disk of another version of it is left aside.

    Attributes:
        counts: None until counted, and where the model cannot be built.
    """

    def __init__(self, folder: Path, variant: Variant) -> None:
        self.folder, self.variant = folder, variant
        self.source = ModelSource(variant.experiment)
        self.counts: Counts | None = None
        self._cannot_be_built = ""
        self._path = folder / "variants" / f"{variant.slug}.json"
        self._kept = self._read()

    def count(self) -> None:
        """Count, without weights; a model that cannot be built says why in ``note``."""
        from evaluation.cost.efficiency import build, count

        try:
            self.counts = count(*build(self.source, "meta"))
        except UserError as error:
            self._cannot_be_built = str(error)
        self._keep("counts", self.counts and asdict(self.counts))

    @property
    def costs(self) -> Costs | None:
        """As they were measured; None where they were not, or could not be."""
        from evaluation.cost.efficiency import costs_from_values

        kept = self._kept.get("costs")
        return costs_from_values(kept["measured"]) if kept else None

    def has_costs(self, settings: Mapping[str, Any]) -> bool:
        """Whether costs were measured this way."""
        kept = self._kept.get("costs")
        return kept is not None and kept["settings"] == settings

    def keep_costs(self, costs: Costs, settings: Mapping[str, Any]) -> None:
        """Keep what was measured, and how."""
        # By way of JSON once, because its keys are texts.
        self._keep("costs", json.loads(json.dumps({"measured": asdict(costs), "settings": dict(settings)})))

    @property
    def has_outcome(self) -> bool:
        """Whether its run has ended, well or not."""
        return "outcome" in self._kept

    @property
    def run(self) -> Path | None:
        """The run whose test split has been predicted."""
        outcome = self._kept.get("outcome") or {}
        return Path(outcome["run"]) if outcome.get("run") and not outcome.get("error") else None

    @property
    def was_refused(self) -> bool:
        """Whether the user's input stopped its run."""
        return bool(Outcome("failed", error=(self._kept.get("outcome") or {}).get("error")).refusal)

    def forget_failure(self) -> None:
        """Let a run that failed be tried again."""
        if (self._kept.get("outcome") or {}).get("error"):
            self._keep("outcome", None)

    @property
    def note(self) -> str:
        """Why numbers are missing; empty where none are."""
        costs, outcome = self.costs, self._kept.get("outcome") or {}
        told = [self._cannot_be_built]
        told.append(f"not measured: {costs.error}" if costs and costs.error else "")
        # The fix that an error names is in the run's log; a table has room for what is wrong.
        told.append(f"no accuracy: {outcome['error'].split(';')[0]}" if outcome.get("error") else "")
        return "; ".join(one for one in told if one)

    def accuracies(self) -> list[TaskSummary]:
        """Of each task on the test split; empty where there is no run."""
        from evaluation.tables.summary import summarise_run

        return summarise_run(self.run) if self.run else []

    def train(self, runner: Runner | None, stop: threading.Event) -> str:
        """Fit the variant and test its best checkpoint, or go on with its interrupted run.

        Args:
            runner: by default a process of its own.
            stop: set from outside to end early; the run then goes on the next time.

        Returns:
            What the user has to mend where the run was refused; else empty.
        """
        config = self.folder / "variants" / f"{self.variant.slug}.yaml"
        write_text_atomically(config, dump_yaml(self.variant.experiment))
        name = f"{self.variant.slug}-{self.variant.fingerprint[:8]}"
        arguments = ["fit", "--config", str(config), "--test_best=true"]
        job = _VariantJob(0, arguments, self._metric(), self.folder, resumes=self._last_checkpoint(name), run_name=name)
        outcome = (runner or run_trial)(job, _Unwatched(), stop)
        if outcome.state == "stopped":
            return ""
        error = outcome.error or ""
        if not error and (outcome.run is None or not (outcome.run / Run.PREDICTIONS / "test.parquet").is_file()):
            error = f"the run left no predictions of the test split; see {job.log}"
        self._keep("outcome", {"run": outcome.run and str(outcome.run), "error": error})
        return outcome.refusal

    def _metric(self) -> Metric:
        """What the best checkpoint is chosen by."""
        checkpoint = self.variant.experiment.get("checkpoint") or {}
        mode = checkpoint.get("mode", "min")
        return Metric(checkpoint.get("monitor", "val/loss"), "maximize" if mode == "max" else "minimize")

    def _last_checkpoint(self, name: str) -> Path | None:
        """Of the run that was interrupted. One that never came to a checkpoint has nothing to go on with: it goes."""
        folder = self.folder / "trials" / name
        found = next((path for path in folder.glob(f"*/{Run.LAST}") if _is_run(path)), None)
        if found is None and folder.exists():
            shutil.rmtree(folder)
        return found

    def _read(self) -> dict[str, Any]:
        fresh = {"name": self.variant.name, "fingerprint": self.variant.fingerprint}
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return fresh
        except (OSError, ValueError) as error:
            raise UserError(f"{self._path}: cannot be read ({error}); remove it to begin anew") from error
        return kept if isinstance(kept, dict) and kept.get("fingerprint") == fresh["fingerprint"] else fresh

    def _keep(self, key: str, value: Any) -> None:
        self._kept = {**self._kept, key: value}
        if value is None:
            del self._kept[key]
        write_text_atomically(self._path, json.dumps(self._kept, indent=2) + "\n")


def _is_run(checkpoint: Path) -> bool:
    return (checkpoint.parent.parent / Run.CONFIG).is_file()
