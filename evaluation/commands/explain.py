"""``python -m evaluation explain RUN``: saliency maps of a run's predictions, as overlays and a page."""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datamodules.table import composed
from vitrail.errors import UserError
from vitrail.runs import Run
from vitrail.runtime import check_device
from vitrail.trust import file_name
from vitrail.types import kind_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from evaluation.report.page import Section
    from evaluation.saliency.overlays import Explained
    from lightning_modules.base import VisionTask

_METHODS = ("gradcam", "rollout")
_WORST = 16
_LEAST_SIDE = 224  # pixels of an image on the page

_EPILOG = """\
examples:
  python -m evaluation explain runs/NAME/TIME                      # the 16 worst mistakes on test
  python -m evaluation explain runs/NAME/TIME --image photo.jpg --method rollout
  python -m evaluation explain runs/NAME/TIME --task tags --label striped   # of a multi-label task
  python -m evaluation explain runs/NAME/TIME --image beach.jpg --text "a dog" --text "the sea"
"""

_METHOD_NOTES = {
    "gradcam": "Grad-CAM: bright is where the last feature map contributes to the class, label, number or text, each "
    "map scaled to its own largest value. It is coarse, and shows what the score depends on at that layer, no cause.",
    "rollout": "Attention rollout: bright is where attention flows from. It is the same for every class, label, "
    "number and text, and shows nothing about what contributed to one.",
}


class _Images(NamedTuple):
    """N images to be explained: names, pixels uint8 ``(3, H, W)`` and targets; None where none is known."""

    names: list[str]
    images: list[torch.Tensor]
    targets: NDArray[Any] | None


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of ``explain``."""
    command.epilog = _EPILOG
    command.add_argument("run", type=Path, metavar="RUN", help="run directory")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--worst", type=int, metavar="N", help=f"the worst mistakes (default: {_WORST} of them)")
    which.add_argument("--ids", nargs="+", type=composed, metavar="NAME", help="images of the run's data by name")
    which.add_argument("--image", nargs="+", type=Path, metavar="FILE", help="any image files")
    command.add_argument("--method", choices=_METHODS, default="gradcam", help="(default: gradcam)")
    command.add_argument("--task", type=composed, help="that is explained (default: the main task)")
    command.add_argument(
        "--label",
        "--shown-class",
        dest="label",
        type=composed,
        metavar="NAME",
        help="explain this class or label instead of the predicted one or the most probable one; of regression tasks "
        "what makes the number higher or lower",
    )
    command.add_argument(
        "--text", action="append", default=[], help="explain the likeness to this text; of dual encoders; repeatable"
    )
    command.add_argument("--split", default="test", help="split that the worst mistakes are of (default: test)")
    command.add_argument("--checkpoint", default="best", help="its name in checkpoints/ (default: best)")
    command.add_argument("--to", type=Path, metavar="FOLDER", help="(default: RUN/figures/explain)")


def run(options: argparse.Namespace, rest: Sequence[str] = ()) -> None:
    """Write the overlays and the page, and print where they are.

    Raises:
        UserError: for every mistake in what was asked, and for a run that lacks what is needed.
    """
    import torch

    from evaluation.report.page import Page
    from evaluation.saliency import check_method, explainable
    from evaluation.saliency.overlays import explain_task, explain_texts

    files = Run(options.run)
    model: VisionTask = files.load_model(options.checkpoint, check_device("auto"))
    task = _task(model, options)
    check_method(model, options.method)
    names, images, targets = _images(files, model, task, options)
    if not names:
        sys.stdout.write(f"{options.run}: made no mistakes of {task!r} on {options.split}; nothing to explain\n")
        return
    pixels = torch.stack(images)
    if options.text:
        of_what = "likeness to texts"
        explained = explain_texts(model, options.text, pixels, names, method=options.method)
    else:
        kind = kind_of(getattr(model, "task_kinds", {}), task)
        what = {"multi_label": "labels of the task", "regression": "the number"}.get(kind, "classes of the task")
        of_what = f"{what} {task}"
        shown = None if options.label is None else explainable(model, task).index(options.label)
        explained = explain_task(model, task, pixels, names, targets, method=options.method, shown=shown)
    folder = options.to or options.run / Run.FIGURES / "explain"
    lead = [f"{files.name}, checkpoint {options.checkpoint}: {of_what}.", _METHOD_NOTES[options.method]]
    page = Page(f"Explained: {files.name}", lead, _sections(explained)).write(folder, "explain")
    sys.stdout.write(f"{page} has the page, and the folder an overlay of each image ({len(explained)})\n")


def _task(model: VisionTask, options: argparse.Namespace) -> str:
    """Name of the task that is explained; empty for texts."""
    from evaluation.saliency import explainable

    if options.text and (options.task or options.label):
        raise UserError("--text: does not go with --task and --label; explain either texts or classes")
    tasks: dict[str, list[str]] = getattr(model, "tasks", {})
    if options.text and options.worst is None and not (options.ids or options.image):
        raise UserError("--text: name the images with --ids, --image or --worst")
    if not tasks:
        if not options.text:
            raise UserError(f"{options.run}: its model has no classes; explain the likeness to a text with --text")
        if options.worst is not None:
            raise UserError("--worst: the model has no classes, so it makes no mistakes; use --ids or --image")
        return ""
    name = options.task or next(iter(tasks))
    if name not in tasks:
        raise UserError(f"--task {name}: the model has {', '.join(tasks)}; name one of them")
    if options.label is not None and options.label not in (names := explainable(model, name)):
        raise UserError(f"--label {options.label}: {name} has {', '.join(names)}; name one of them")
    return name


def _images(files: Run, model: VisionTask, task: str, options: argparse.Namespace) -> _Images:
    """Image files, or images of the run's own data: by name, or the worst mistakes."""
    from datamodules.loading.decode import MAX_PIXELS, read_image
    from datamodules.loading.transforms import eval_transform

    # The model defines how images are made; files are treated as the data are.
    transform = eval_transform(model.input_options)
    if options.image:
        value_range = model.input_options.get("value_range", "auto")
        limit = files.max_pixels or MAX_PIXELS
        images = [transform(read_image(path, "", value_range, limit)) for path in options.image]
        return _Images([str(path) for path in options.image], images, None)
    wanted = options.ids or _worst_names(files, task, options)
    if not wanted:
        return _Images([], [], None)
    if not (files.path / Run.CONFIG).is_file():
        raise UserError(f"{files.path}: has no {Run.CONFIG}, so its data are not known; name images with --image")
    datamodule = files.datamodule
    datamodule.image_options = {**model.input_options}
    table = datamodule.table
    rows = {name: row for row, name in enumerate(datamodule.sample_names())}
    if strange := [name for name in wanted if name not in rows]:
        raise UserError(
            f"--ids {strange[0]}: {table.origin} has no image of that name; they are such as {next(iter(rows), '')!r}"
            if options.ids
            else f"{table.origin}: has no image {strange[0]!r} any more; test again with "
            f"`python -m experiments test --ckpt_path {files.path / Run.BEST}`"
        )
    targets = table.targets.get(task)
    return _Images(
        list(wanted),
        [transform(datamodule.read_image(rows[name])) for name in wanted],
        None if targets is None else targets[[rows[name] for name in wanted]],
    )


def _worst_names(files: Run, task: str, options: argparse.Namespace) -> list[str]:
    from evaluation.saliency.overlays import worst_mistakes

    count = _WORST if options.worst is None else options.worst
    if count < 1:
        raise UserError(f"--worst: is {count}, must be at least 1")
    predictions = files.predictions(options.split)
    if predictions is None:
        raise UserError(f"{files.path}: {'; '.join(files.missing)}")
    if task not in predictions.tasks:
        raise UserError(f"--task {task}: predictions/{options.split}.parquet has {', '.join(predictions.tasks)} only")
    if not len(predictions.known(task)):
        raise UserError(
            f"{files.path}: no sample of {options.split} has a known target of {task!r}, so mistakes are not known; "
            "name images with --ids or --image"
        )
    predicted_by = files.predicted_by(options.split)
    if predicted_by and predicted_by != options.checkpoint:
        raise UserError(
            f"{files.path}: predictions/{options.split}.parquet are of checkpoint {predicted_by}, so they do not show "
            f"the mistakes of {options.checkpoint}; give --checkpoint {predicted_by}, or predict with that one"
        )
    kind = predictions.kind(task)
    thresholds = predictions.thresholds_of(task) if kind == "multi_label" else ()
    rows = worst_mistakes(predictions.logits[task], predictions.targets[task], count, kind, thresholds)
    return [str(name) for name in predictions.names[rows]]


def _sections(explained: list[Explained]) -> list[Section]:
    """Each image next to the same with its maps over it, and a table of all."""
    import pandas as pd

    from evaluation.report.page import Card, Section
    from evaluation.saliency.overlays import overlay

    columns: dict[str, list[Any]] = {"name": [one.name for one in explained]}
    if any(one.predicted for one in explained):
        columns["predicted"] = [one.predicted for one in explained]
        if not all(math.isnan(one.confidence) for one in explained):
            columns["confidence"] = [one.confidence for one in explained]
        columns["right"] = [one.target for one in explained]
    else:
        columns["likeness"] = ["; ".join(heat.caption for heat in one.heats) for one in explained]
    cards: dict[str, list[Card]] = {}
    for place, one in enumerate(explained, start=1):
        stem = f"{place:03}_{file_name(Path(one.name).stem)}"
        confidence = "" if math.isnan(one.confidence) else f", confidence {one.confidence:.3f}"
        lines = [f"predicted: {one.predicted}{confidence}"] if one.predicted else []
        lines += [f"right: {one.target}"] if one.target else []
        cards[f"{place}. {Path(one.name).name}"] = [
            Card(stem, _jpeg(one.image), [*lines, one.name]),
            *(
                Card(f"{stem}_{number}", _jpeg(overlay(one.image, heat.values)), heat.caption.splitlines())
                for number, heat in enumerate(one.heats, start=1)
            ),
        ]
    return [Section("Images", cards=cards), Section("All of them", tables={"explained": pd.DataFrame(columns)})]


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """An image, uint8 ``(H, W, 3)``, as JPEG in its own size, small ones enlarged so that maps are seen."""
    from PIL import Image

    image, content = Image.fromarray(pixels), io.BytesIO()
    factor = max(1, _LEAST_SIDE // max(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.save(content, format="JPEG", quality=92)
    return content.getvalue()
