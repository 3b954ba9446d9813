"""``python -m evaluation efficiency RUN EXPERIMENT.yaml …``: what models cost, compared with each other."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitrail.console import Table
from vitrail.errors import UserError
from vitrail.files import write_text_atomically
from vitrail.runs import Run
from vitrail.runtime import check_device

if TYPE_CHECKING:
    from evaluation.efficiency import Build, Costs, Counts
    from lightning_modules.base import VisionTask

BATCH_SIZES = [1, 8]
REPEATS = 10

_LINKED = ("class_names", "class_prompts", "tasks", "task_facts", "class_counts", "chunk_size")
"""Arguments of a task that the data give it."""

_OF_HEADS = "task_facts"
"""One that has a default and shapes the heads all the same."""

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
    command.add_argument("--json", type=Path, metavar="FILE", help="(default for runs: RUN/efficiency.json)")


def add_measuring(command: argparse.ArgumentParser) -> None:
    """Add how time is measured; also for the ablation's command line."""
    command.add_argument(
        "--batch-sizes", nargs="+", type=_positive, default=BATCH_SIZES, metavar="N", help="(default: 1 8)"
    )
    command.add_argument(
        "--repeats", type=_positive, default=REPEATS, metavar="N", help=f"rounds that count (default: {REPEATS})"
    )
    command.add_argument(
        "--device", choices=("cpu", "cuda", "mps"), default="cpu", help="that is measured (default: cpu)"
    )
    command.add_argument("--threads", type=_positive, default=0, metavar="N", help="of the CPU (default: PyTorch's)")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Count, measure, write and print.

    Raises:
        UserError: if a model cannot be built or measured.
    """
    from evaluation.efficiency import FILE, by_model, count, ratios_to
    from vitrail.runs import runs_among

    check_device(options.device)
    runs = [path for path in options.models if path.suffix not in (".yaml", ".yml")]
    kept = runs_among(runs, "efficiency", Run.BEST, unfinished_only=True) if len(runs) > 1 else runs
    models = [path for path in options.models if path not in runs or path in kept]
    builders = {path.resolve(): builder_of(path, options.config) for path in models}
    names = _names(list(builders))
    counts = {names[path]: count(*build("meta")) for path, build in builders.items()}
    costs: Mapping[str, Costs] = {}
    sizes: list[int] = []
    if not options.counts_only:
        sizes = sorted(set(options.batch_sizes))
        costs = measured({names[path]: build for path, build in builders.items()}, counts, options)
    rows = {name: (counts[name], costs.get(name)) for name in counts}
    for path, name in names.items():
        if path.is_dir():
            write_costs(path / FILE, {name: rows[name]})
    if options.json is not None:
        write_costs(options.json, rows)
    if options.markdown:
        sys.stdout.write(f"{by_model(rows, sizes).markdown()}\n")
    else:
        _by_cost(by_model(rows, sizes)).show()
    if note := ratios_to(rows):
        sys.stdout.write(f"{note}\n")
    if failed := [f"{name}: {one.error}" for name, one in costs.items() if one.error]:
        raise UserError(failed[0])


def measured(
    builders: Mapping[str, Build], counts: Mapping[str, Counts], options: argparse.Namespace
) -> dict[str, Costs]:
    """Measure the models by the options of ``add_measuring``."""
    from evaluation.efficiency import measure

    return measure(
        builders,
        {name: counts[name].weight_bytes for name in builders},
        sorted(set(options.batch_sizes)),
        options.repeats,
        device=options.device,
        threads=options.threads,
    )


def builder_of(path: Path, overlays: list[Path]) -> Build:
    """Return what builds the model of a run directory or an experiment file.

    A run that was evaluated as it came, without training, is built by its own configuration.

    Args:
        path: either of them.
        overlays: laid over experiment files; runs are what they are.

    Raises:
        UserError: it is neither.
    """
    from vitrail.config import read_experiments
    from vitrail.trust import refuse_foreign_code

    if not path.is_dir():
        return partial(build_experiment, read_experiments([path, *overlays]))
    run = Run(path)
    if "best" in run.checkpoints:
        return partial(_build_run, run)
    if run.config and not run.checkpoints and not any(stage.get("stage") == "fit" for stage in run.stages):
        refuse_foreign_code({key: run.config.get(key) for key in ("data", "model")}, run.path / Run.CONFIG)
        return partial(build_experiment, run.config)
    raise UserError(f"{path}: has no checkpoints/best.ckpt; give a run that was trained, or its experiment file")


def _build_run(run: Run, device: str) -> tuple[VisionTask, int]:
    task = run.load_model(device="cpu")
    return task.to(device).eval(), int(task.input_options["size"])


def build_experiment(experiment: Mapping[str, Any], device: str) -> tuple[VisionTask, int]:
    """Build the model of an experiment with random weights, in evaluation mode.

    The data are asked only for what the model cannot be built without, so that most are not needed on disk.

    Args:
        experiment: content of an experiment file, overlays merged in.
        device: ``meta``, ``cpu`` or ``cuda``; on ``meta`` nothing is sampled and nothing allocated.

    Returns:
        The task, and the side of its images in pixels.

    Raises:
        UserError: it cannot be built; model and data must fit.
    """
    import torch

    import lightning_modules
    from datamodules.cli import load_datamodule

    model = experiment.get("model")
    if not isinstance(model, dict) or "class_path" not in model or not isinstance(experiment.get("data"), dict):
        raise UserError("experiment: needs data: and model: with class_path:, as the files in experiments/ have them")
    task_class = getattr(lightning_modules, str(model["class_path"]).removeprefix("lightning_modules."), None)
    if task_class is None:
        raise UserError(f"model.class_path: {model['class_path']} is no task of lightning_modules")
    datamodule = load_datamodule(experiment, program="python -m evaluation efficiency")
    parameters = inspect.signature(task_class).parameters
    taken = [name for name in _LINKED if name in parameters]
    needed = {name for name in taken if name == _OF_HEADS or parameters[name].default is inspect.Parameter.empty}
    arguments = {**model.get("init_args", {}), "image_size": datamodule.image_size}
    arguments |= {name: getattr(datamodule, name) for name in needed}
    if "pretrained" in parameters:
        arguments["pretrained"] = False
    with torch.device(device):
        task = _task({"class_path": model["class_path"], "init_args": arguments})
    return task.eval(), datamodule.image_size


def _task(arguments: dict[str, Any]) -> VisionTask:
    """The task, its arguments checked by their types as the command line does."""
    from jsonargparse import ArgumentError, ArgumentParser

    from lightning_modules.base import VisionTask

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(VisionTask, "model", required=True)
    try:
        task = parser.instantiate(parser.parse_args(["--model", json.dumps(arguments, default=asdict)])).model
    except ArgumentError as error:
        raise UserError(f"model: {' '.join(str(error).split())}") from error
    except ValueError as error:
        # The parser wraps a constructor's error into a report about types.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    assert isinstance(task, VisionTask)
    return task


def write_costs(path: Path, rows: Mapping[str, tuple[Counts, Costs | None]]) -> None:
    """Write counts and costs as JSON."""
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
