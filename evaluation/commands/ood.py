"""``vitrail ood RUN``: recognise images that are unlike the training images.

Detectors are fitted on the training split and their threshold is chosen on validation. Images of other sets (``--ood``)
only show how well that works: nothing is chosen on them. One detector is kept in ``checkpoints/ood.safetensors``; from
then on ``predict``, ``Run.predict`` and the application mark unknown images.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.ood import OodOutputs, Separation, fit_detector, methods_for, separation, threshold_for
from evaluation.tables.summary import with_interval
from vitrail.console import Table, tracked, without_nan
from vitrail.errors import UserError
from vitrail.files import write_text_atomically
from vitrail.ood import METHODS, Detector, outputs_with_features, write_detector
from vitrail.runs import Run, checkpoint_digest
from vitrail.runtime import check_device
from vitrail.trust import plain_name
from vitrail.types import UNKNOWN, InputOptions, TaskKind, kind_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.base import ImageDataModule


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ood``."""
    command.description = (
        "Fits scores of familiarity on the training split, chooses on validation the threshold that --rate of the "
        f"images reach, and keeps one in {Run.OOD}; predict and the application then mark images below it as unknown."
    )
    command.add_argument("run", type=Path, metavar="RUN", help="run directory")
    command.add_argument(
        "--ood",
        nargs="+",
        default=[],
        metavar="DATA",
        help="other images to be recognised, for the table: folder, table, experiment file, or a class such as Wares",
    )
    command.add_argument(
        "--ood-rows", nargs="+", default=[], metavar="COLUMN=VALUE", help="only these rows of a table in --ood"
    )
    command.add_argument(
        "--method", nargs="+", default=["all"], choices=("all", *METHODS), metavar="NAME", help=", ".join(METHODS)
    )
    command.add_argument(
        "--save",
        choices=METHODS,
        help="the method to keep (default: the only one of --method, otherwise mcm of dual encoders and knn of others)",
    )
    command.add_argument("--task", help="whose logits are used (default: the main task)")
    command.add_argument(
        "--rate", type=float, default=0.95, metavar="SHARE", help="of validation images that are kept (default: 0.95)"
    )
    command.add_argument(
        "--neighbours",
        type=int,
        default=0,
        metavar="K",
        help="of knn (default: a tenth of the images of a class, at most 50)",
    )
    command.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N images of each --ood")
    command.add_argument("--device", default="auto", help="such as cpu, cuda, cuda:1 or mps (default: auto)")
    command.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Fit, keep a detector, and print how well all of them recognise the other images.

    Raises:
        UserError: the model has no outputs for a method, or data cannot be read.
    """
    if not 0 < options.rate < 1:
        raise UserError(f"--rate: must be between 0 and 1; got {options.rate}")
    opened = Run(options.run)
    model = opened.load_model(device=check_device(options.device))
    tasks = getattr(model, "tasks", {})
    task = options.task or next(iter(tasks), "")
    if task not in tasks:
        raise UserError(f"--task {task}: {opened.path} predicts {', '.join(tasks) or 'no task'}; name one of these")
    kind = kind_of(getattr(model, "task_kinds", {}), task)
    methods, saved = _methods(options, kind, has_prompts=hasattr(model, "class_embeddings"))
    data: ImageDataModule = opened.load_datamodule(rest)
    inputs: InputOptions = model.input_options
    data.image_options = {**inputs}
    data.prepare_data()
    data.setup("test")
    outputs = {split: _outputs(model, data, task, split) for split in ("train", "val", "test")}
    detectors = {
        method: _detector(method, model, task, kind, outputs, options, checkpoint_digest(opened.path))
        for method in methods
    }
    write_detector(opened.path / Run.OOD, detectors[saved])
    rows = []
    for given in options.ood:
        others = _outputs(model, _other(given, options, inputs), task, "test", options.limit)
        for method, detector in detectors.items():
            known, unknown = (detector.scores(one.logits, one.features) for one in (outputs["test"], others))
            found = separation(known, unknown, (outputs["test"].groups, others.groups), detector.threshold)
            rows.append((_name(given, options), method, detector, found, len(others)))
    _write_results(opened, rows, outputs)
    _show(options, opened, rows, outputs, detectors[saved])


def _methods(options: argparse.Namespace, kind: TaskKind, *, has_prompts: bool) -> tuple[list[str], str]:
    """The methods to fit, and which of them is kept."""
    possible = methods_for(kind, has_prompts=has_prompts)
    asked = possible if "all" in options.method else list(dict.fromkeys(options.method))
    saved = options.save or (asked[0] if len(asked) == 1 else "mcm" if "mcm" in asked else "knn")
    asked = asked if saved in asked else [*asked, saved]
    if lacking := [one for one in asked if one not in possible]:
        raise UserError(
            f"--method {lacking[0]}: is not for this model; it has the outputs for {', '.join(possible) or 'none'}"
        )
    return asked, saved


def _outputs(model: Any, data: ImageDataModule, task: str, split: str, limit: int = 0) -> OodOutputs:
    """Logits and features of a split with the evaluation transform."""
    import torch

    rows = data.split_indices(split)
    if not len(rows):
        raise UserError(
            f"{data.table.origin}: the {split} split is empty; vitrail ood needs train, val and test images"
        )
    loader = data.rows_dataloader(rows[:limit] if limit else rows)
    parts: list[tuple[Any, Any]] = []
    places: list[NDArray[np.int64]] = []
    for batch in tracked(loader, f"{split} images", len(loader)):
        moved = {name: batch[name].to(model.device) for name in ("image", "sample_id")}
        with torch.inference_mode():
            found, features = outputs_with_features(model, moved, features=True)
        parts.append((found["logits"][task].float().cpu().numpy(), features))
        places.append(batch["sample_id"].numpy())
    ids = np.concatenate(places)
    names = np.array(data.group_names(), dtype=object)
    targets = data.table.targets.get(task)
    return OodOutputs(
        np.concatenate([logits for logits, _ in parts]),
        np.concatenate([features for _, features in parts]),
        names[ids],
        targets[ids] if targets is not None and targets.dtype == np.int64 else np.full(len(ids), UNKNOWN),
    )


def _detector(
    method: str,
    model: Any,
    task: str,
    kind: TaskKind,
    outputs: Mapping[str, OodOutputs],
    options: argparse.Namespace,
    digest: str | None,
) -> Detector:
    scale = float(model.objective.logit_scale()[0].detach()) if method == "mcm" else 1.0
    arrays = fit_detector(
        method, outputs["train"], head=_head(model, kind), logit_scale=scale, neighbours=options.neighbours
    )
    facts = {
        "checkpoint_sha256": digest,
        "train": len(outputs["train"]),
        "val": len(outputs["val"]),
        "groups": len(set(outputs["val"].groups.tolist())),
    }
    fitted = Detector(method, task, kind, 0.0, options.rate, arrays, facts)
    threshold = threshold_for(fitted.scores(outputs["val"].logits, outputs["val"].features), options.rate)
    return Detector(method, task, kind, threshold, options.rate, arrays, facts)


def _head(model: Any, kind: TaskKind) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Weights and biases, where one linear layer makes the logits of features."""
    import torch

    layer = getattr(model, "head", None)
    if kind != "single_label" or not isinstance(layer, torch.nn.Linear) or layer.bias is None:
        return None
    return layer.weight.detach().cpu().double().numpy(), layer.bias.detach().cpu().double().numpy()


def _other(given: str, options: argparse.Namespace, inputs: InputOptions) -> ImageDataModule:
    """Other images, all of them in the test split, with the model's preprocessing."""
    from datamodules.cli import load_datamodule
    from datamodules.table_file import SUFFIXES

    path = Path(given).expanduser()
    source: Any = given
    if path.suffix.lower() in SUFFIXES:
        if wrong := [one for one in options.ood_rows if "=" not in one]:
            raise UserError(f"--ood-rows {wrong[0]}: must be COLUMN=VALUE, such as label=mug")
        wanted: dict[str, list[str]] = {}
        for name, value in (one.split("=", 1) for one in options.ood_rows):
            wanted.setdefault(name, []).append(value)
        columns = {"label": "", "split": "", "caption": ""}
        arguments = {"path": str(path), "columns": columns, "rows": wanted or None}
        source = {"data": {"class_path": "datamodules.Table", "init_args": arguments}}
    elif path.name != given and not path.exists():
        raise UserError(f"--ood {given}: no such folder or file")
    data = load_datamodule(source, (), "vitrail ood")
    data.image_options = {**inputs}
    data.as_test_set({})
    data.setup("test")
    return data


def _name(given: str, options: argparse.Namespace) -> str:
    path = Path(given).expanduser()
    name = (path.resolve().name if path.is_dir() else path.stem) or given
    values = [one.partition("=")[2] for one in options.ood_rows] if path.is_file() else []
    return plain_name(f"{name} ({', '.join(values)})" if values and len(values) < 4 else name, "--ood")


Row = tuple[str, str, Detector, Separation, int]


def _write_results(opened: Run, rows: Sequence[Row], outputs: Mapping[str, OodOutputs]) -> None:
    if not rows:
        return
    values = [
        {
            "ood": name,
            "method": method,
            "threshold": detector.threshold,
            "rate": detector.rate,
            "test_images": len(outputs["test"]),
            "ood_images": count,
            **{
                score: {"value": one.value, "low": one.interval.low, "high": one.interval.high}
                for score, one in vars(found).items()
            },
        }
        for name, method, detector, found, count in rows
    ]
    text = json.dumps(without_nan(values), indent=2)
    write_text_atomically(opened.path / Run.REPORTS / "ood.json", text + "\n")


def _show(
    options: argparse.Namespace,
    opened: Run,
    rows: Sequence[Row],
    outputs: Mapping[str, OodOutputs],
    saved: Detector,
) -> None:
    columns = ["other images", "n", "method", "AUROC [95 %]", "FPR@95 [95 %]", "test kept [95 %]", "unknown [95 %]"]
    cells = [
        [name, str(count), method, *(with_interval(*one) for one in vars(found).values())]
        for name, method, _, found, count in rows
    ]
    if rows:
        Table(columns, cells, left=("other images", "method")).show(as_markdown=options.markdown)
    test, facts = outputs["test"], saved.facts
    lines = [
        f"Fitted on {facts['train']} training images; thresholds keep {saved.rate:.0%} of {facts['val']} validation "
        f"images of {facts['groups']} groups. Test: {len(test)} images of {len(set(test.groups.tolist()))} groups.",
        f"Kept for predict: {saved.method} from {saved.threshold:.6g} on ({Run.OOD}), not chosen on other images.",
    ]
    if rows:
        lines.append(
            "FPR@95: share of the other images that a threshold lets pass which keeps 95 % of the test images; test "
            "kept and unknown are by the threshold from validation."
        )
    sys.stdout.write("\n" if options.markdown and rows else "")
    sys.stdout.writelines(f"{'* ' if options.markdown else ''}{line}\n" for line in lines)
