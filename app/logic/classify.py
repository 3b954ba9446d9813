"""What the tab Classify does, without its page: images are read, judged by one run or two, and explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.logic.uploads import one_at_a_time, read_pixels
from app.state.context import AppContext, Limits
from app.state.runs import ServedRun
from vitrail.errors import UserError
from vitrail.predictions import ImagePrediction

if TYPE_CHECKING:
    import torch

_SHOWN = 512

METHODS = {"Grad-CAM": "gradcam", "Attention rollout": "rollout"}
"""Saliency methods as users see them, and as ``evaluation.saliency`` calls them."""


@dataclass(frozen=True)
class Upload:
    """One of the files that were given.

    Attributes:
        name: of the file.
        image: RGB and upright, scaled down to what a page shows; None where it cannot be read.
        problem: why not, in one line; empty where it can.
        inputs: by name of a run uint8 ``(3, size, size)``, the image as that run's model takes it. The whole image is
            not kept: sixteen of them would fill the memory.
    """

    name: str
    image: Image.Image | None
    problem: str = ""
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Classified:
    """What the runs say of one file.

    Attributes:
        upload: the file.
        answers: by name of the run, in the order asked for; empty where the file cannot be read.
    """

    upload: Upload
    answers: dict[str, ImagePrediction]


@dataclass(frozen=True)
class Seen:
    """Where a model sees something in an image.

    Attributes:
        says: what is shown, in one line.
        image: uint8 ``(H, W, 3)``, the image as the model sees it.
        overlay: uint8 ``(H, W, 3)``, the same with the map over it.
    """

    says: str
    image: NDArray[np.uint8]
    overlay: NDArray[np.uint8]


def read_uploads(paths: Sequence[str | Path], limits: Limits, runs: Sequence[ServedRun]) -> list[Upload]:
    """Read the files that were given; one that cannot be read does not keep the others from being judged.

    Args:
        paths: of the files.
        limits: of number and size.
        runs: whose models are going to see them.

    Raises:
        UserError: if there are none, or more than are allowed at once.
    """
    if not paths:
        raise UserError("there is no image yet; upload, paste or take one")
    if len(paths) > limits.images:
        raise UserError(f"{len(paths)} images are too many at once; leave {limits.images} or fewer")
    return [_read(path, limits, runs) for path in paths]


def sorting_runs(context: AppContext) -> list[str]:
    """Names of the runs that know classes."""
    return [name for name, run in context.runs.items() if run.tasks]


def classify(context: AppContext, paths: Sequence[str | Path], runs: Sequence[object]) -> list[Classified]:
    """What one run, or several side by side, say of each file.

    Args:
        context: what is served.
        paths: of uploaded files.
        runs: names of the runs; one that is named twice answers once.

    Raises:
        UserError: if there is no file or too many, or no run of that name.
    """
    chosen = {run.name: run for run in (context.run(name) for name in runs)}
    uploads = read_uploads(paths, context.limits, list(chosen.values()))
    readable = [upload for upload in uploads if upload.image is not None]
    said = {name: iter(run.predict([one.inputs[name] for one in readable])) for name, run in chosen.items()}
    return [
        Classified(upload, {} if upload.image is None else {name: next(answers) for name, answers in said.items()})
        for upload in uploads
    ]


def where(run: ServedRun, upload: Upload, task: str, label: str, method: str) -> Seen:
    """Where in an image a run sees a class.

    Args:
        run: of which.
        upload: the image.
        task: whose class; empty for a text, of a dual encoder.
        label: the class or text.
        method: one of ``METHODS``.

    Raises:
        UserError: if the image cannot be read, or the run cannot say.
    """
    from evaluation.saliency import Method
    from evaluation.saliency.overlays import overlay

    known: tuple[Method, ...] = get_args(Method)
    chosen = next((name for name in known if name == METHODS.get(method)), None)
    if chosen is None:
        raise UserError(f"method: is unknown; choose one of {', '.join(METHODS)}")
    if upload.image is None:
        raise UserError(upload.problem)
    explained = run.saliency(upload.inputs[run.name], task, label, chosen)
    heat = explained.heats[0].values
    if chosen == "rollout":
        says = f"{run.name}: where attention flows from. It is the same for every class."
    elif heat.any():
        says = f"{run.name}: bright is what speaks for “{label}”. Coarse, and no proof of a cause."
    else:
        says = f"{run.name}: nothing in the image speaks for “{label}”."
    return Seen(says, explained.image, overlay(explained.image, heat))


def _read(path: str | Path, limits: Limits, runs: Sequence[ServedRun]) -> Upload:
    name = Path(path).name
    inputs: dict[str, torch.Tensor] = {}
    image: Image.Image | None = None
    try:
        for run in runs:
            if run.name in inputs:
                continue
            with one_at_a_time:
                pixels = read_pixels(path, limits, run.value_range)
                same = [run, *(other for other in runs if other.value_range == run.value_range)]
                inputs |= {one.name: one.prepared(pixels) for one in same if one.name not in inputs}
                image = image or _small(pixels)
                del pixels
    except UserError as error:
        return Upload(name, None, str(error))
    return Upload(name, image, inputs=inputs)


def _small(pixels: torch.Tensor) -> Image.Image:
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)
    return image
