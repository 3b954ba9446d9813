"""What the tab Classify does, without its page: images are classified by one run or two, and explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from app.logic.uploads import Upload, read_uploads
from app.state.context import AppContext
from app.state.galleries import ServedGallery
from app.state.runs import ServedRun
from vitrail.errors import UserError
from vitrail.predictions import ImagePrediction

if TYPE_CHECKING:
    from evaluation.saliency import Method

METHODS: dict[str, Method] = {"Grad-CAM": "gradcam", "Attention rollout": "rollout"}
"""Saliency methods as users know them, and as ``evaluation.saliency`` calls them."""


@dataclass(frozen=True)
class Classified:
    """An upload, and its predictions by name of the run; none where it cannot be read."""

    upload: Upload
    predictions: dict[str, ImagePrediction]


@dataclass(frozen=True)
class Saliency:
    """Where in an image a model attends to.

    Attributes:
        caption: what is shown, in one line.
        image: uint8 ``(H, W, 3)``, the model's input.
        overlay: uint8 ``(H, W, 3)``, the same with the map over it.
    """

    caption: str
    image: NDArray[np.uint8]
    overlay: NDArray[np.uint8]


def classify(context: AppContext, paths: Sequence[str | Path], names: Sequence[object]) -> list[Classified]:
    """Return what one run, or several side by side, predict for each uploaded file.

    Raises:
        UserError: there is no file or there are too many, or no run of that name.
    """
    runs = {run.name: run for run in map(context.run, names)}
    uploads = read_uploads(paths, context.limits, list(runs.values()))
    readable = [upload for upload in uploads if upload.image is not None]
    predicted = {name: iter(run.predict([one.inputs[name] for one in readable])) for name, run in runs.items()}
    return [
        Classified(upload, {} if upload.image is None else {name: next(found) for name, found in predicted.items()})
        for upload in uploads
    ]


@dataclass(frozen=True)
class Similar:
    """Images of a gallery that are the most similar to an upload, by the vectors of the model that classified it.

    Attributes:
        gallery: their gallery.
        of_training: whether the model was trained on them.
        hits: id and cosine, best first.
    """

    gallery: ServedGallery
    of_training: bool
    hits: list[tuple[str, float]]


def similar_images(context: AppContext, path: str | Path, name: object, count: int = 6) -> Similar | None:
    """Return the most similar training images of a run's gallery; None where no gallery of it is served.

    Raises:
        UserError: the image cannot be read, or there is no run of that name.
    """
    run = context.run(name)
    own = (gallery for gallery in context.galleries.values() if len(gallery))
    gallery = next((gallery for gallery in own if gallery.identity.weights == run.weights), None)
    [upload] = read_uploads([path], context.limits, [run])
    if gallery is None or upload.image is None:
        return None
    of_training = "train" in gallery.choices.get("split", ())
    rows = gallery.fitting({"split": ["train"]} if of_training else {})
    hits = gallery.gallery.nearest(run.encode_images([upload.inputs[run.name]]), count, rows)[0]
    return Similar(gallery, of_training, [(hit.id, float(hit.score)) for hit in hits])


def saliency_of(run: ServedRun, upload: Upload, task: str, label: str, method: str) -> Saliency:
    """Return where in an image a run attends to for a class.

    Args:
        run: of which.
        upload: the image.
        task: whose class; empty for a text, of a dual encoder.
        label: the class, label or text; of a regression task ``higher`` or ``lower``.
        method: one of ``METHODS``.

    Raises:
        UserError: the image cannot be read, or the run has no such map.
    """
    from evaluation.saliency.overlays import overlay

    if method not in list(METHODS):  # may be of any type
        raise UserError(f"method: must be one of {', '.join(METHODS)}")
    if upload.image is None:
        raise UserError(upload.problem)
    explained = run.saliency(upload.inputs[run.name], task, label, METHODS[method])
    heat = explained.heats[0].values
    what = f"a {label} {task}" if run.kinds.get(task) == "regression" else f"“{label}”"
    if METHODS[method] == "rollout":
        caption = f"{run.name}: where attention flows from. It is the same for every class."
    elif heat.any():
        caption = f"{run.name}: bright is what speaks for {what}. Coarse, and no proof of a cause."
    else:
        caption = f"{run.name}: nothing in the image speaks for {what}."
    return Saliency(caption, explained.image, overlay(explained.image, heat))
