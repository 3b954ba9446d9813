"""Explained images: predictions with saliency maps, as figures for ``explain`` and ``callbacks.SaliencyOfMistakes``."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from evaluation.report.figures import blank_figure, plain
from evaluation.saliency import (
    Method,
    attention_rollout,
    class_scores,
    grad_cam,
    score_images,
    text_scores,
)
from evaluation.tables.per_class import NO_PREDICTION
from vitrail.predictions import (
    DEFAULT_THRESHOLD,
    Predictions,
    TaskPrediction,
    predicted_classes,
    target_texts,
    task_predictions,
)
from vitrail.types import UNKNOWN, TaskKind, kind_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = "inferno"
_STRONGEST = 0.72
"""Opacity of the map where it is 1; where it is 0 the image is seen as it is."""

_LINE = 30
"""Letters of a caption in one line."""


class Heat(NamedTuple):
    """A map over an image, float32 ``(H, W)`` in [0, 1], and its caption."""

    caption: str
    values: NDArray[np.float32]


@dataclass(frozen=True)
class Explained:
    """An image with maps.

    Attributes:
        name: stable name, or path.
        image: uint8 ``(H, W, 3)``, the model's input.
        heats: its maps.
        predicted: predicted class, labels with ``;`` between or number; empty for texts.
        confidence: its probability (``TaskPrediction.confidence``); NaN for texts and numbers.
        target: what is right, likewise; empty where not known.
    """

    name: str
    image: NDArray[np.uint8]
    heats: list[Heat]
    predicted: str = ""
    confidence: float = float("nan")
    target: str = ""


def worst_mistakes(
    logits: NDArray[np.float32],
    targets: NDArray[Any],
    count: int,
    kind: TaskKind = "single_label",
    thresholds: Sequence[float] | NDArray[np.float64] = (),
) -> NDArray[np.int64]:
    """Return the rows of wrong predictions, int64 ``(n,)``, the highest loss first, equal ones in order.

    The loss is the negative logarithm of the right class's probability, the mean cross-entropy of the known labels, or
    the absolute error, where every number but the right one is a mistake.

    Args:
        logits: as ``Predictions`` has them.
        targets: likewise.
        count: rows at most.
        kind: of the task.
        thresholds: of a multi-label task; 0.5 without any.
    """
    from scipy.special import expit, log_softmax

    values = logits.astype(np.float64)
    if kind == "regression":
        losses = np.abs(values[:, 0] - targets)
        wrong = np.flatnonzero(losses > 0)  # not where the target is unknown, NaN
    elif kind == "multi_label":
        known = targets != UNKNOWN
        entries = np.where(known, np.logaddexp(0.0, np.where(targets == 1, -values, values)), 0.0)
        losses = entries.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
        limits = np.asarray(thresholds, np.float64) if len(thresholds) else DEFAULT_THRESHOLD
        wrong = np.flatnonzero((known & ((expit(values) >= limits) != (targets == 1))).any(axis=1))
    else:
        wrong = np.flatnonzero((targets != UNKNOWN) & (predicted_classes(logits) != targets))
        losses = np.zeros(len(targets))
        losses[wrong] = -log_softmax(values[wrong], axis=1)[np.arange(len(wrong)), targets[wrong]]
    return wrong[np.argsort(-losses[wrong], kind="stable")[:count]].astype(np.int64)


def explain_task(
    model: nn.Module,
    task: str,
    images: torch.Tensor,
    names: Sequence[str],
    targets: Sequence[Any] | NDArray[Any] | None = None,
    *,
    method: Method = "gradcam",
    shown: int | None = None,
) -> list[Explained]:
    """Explain what a task predicts for each image.

    Grad-CAM has one map or two: the predicted class and, where it is another one, the right class; of labels the most
    probable one and, among those that are missed or wrongly predicted, the one of the highest loss; of a number what
    raises and what lowers it. Rollout has one map, which is the same for everything.

    Args:
        model: with a task of that name.
        task: what is explained.
        images: uint8 ``(B, 3, H, W)``.
        names: of the images.
        targets: as ``vitrail.predictions.Predictions`` has them; None where none is known.
        method: Grad-CAM or rollout.
        shown: index in ``explainable`` of what to explain instead of what is predicted.

    Raises:
        UserError: the method does not go with the network, or scores are not finite.
    """
    if not len(images):
        return []
    scores, found = class_scores(model, task), _outcome(model, task, images, names, targets)
    roles = [_roles(found, task, row, shown) for row in range(len(images))]
    if method == "gradcam":
        indices = [[*one.values()] for one in roles]
        wanted = torch.tensor([[row[0], row[-1]] for row in indices])
        maps = grad_cam(model, scores, images, wanted).numpy()
    else:
        maps = attention_rollout(model, images).numpy()
    predicted, rights = task_predictions(found, task), target_texts(found.targets[task], found.tasks[task])
    explained = []
    for row, name in enumerate(names):
        heats = [Heat("attention rollout", maps[row, 0])] if method == "rollout" else []
        for heat, (role, index) in zip(maps[row] if method == "gradcam" else (), roles[row].items(), strict=False):
            heats.append(Heat(_role_caption(predicted[row], task, role, index, heat), heat))
        explained.append(
            Explained(
                name=name,
                image=images[row].permute(1, 2, 0).cpu().numpy(),
                heats=heats,
                predicted=predicted[row].label or NO_PREDICTION,
                confidence=predicted[row].confidence,
                target="" if rights[row] is None else rights[row] or NO_PREDICTION,
            )
        )
    return explained


def _outcome(model: nn.Module, task: str, images: torch.Tensor, names: Sequence[str], targets: Any) -> Predictions:
    """Predictions of a task for images; without a known target unless they are given."""
    kind = kind_of(getattr(model, "task_kinds", {}), task)
    logits = score_images(model, class_scores(model, task), images).numpy()
    classes = cast("Any", model).tasks[task] or []
    unknown = np.full(logits.shape if kind == "multi_label" else len(logits), UNKNOWN)
    if kind == "regression":
        logits, unknown = logits[:, :1], np.full(len(logits), np.nan)
    texts = np.array(list(names), dtype=object)
    thresholds = getattr(model, "thresholds", {})
    return Predictions(
        np.arange(len(logits)),
        texts,
        texts,
        {task: classes},
        {task: unknown if targets is None else np.asarray(targets)},
        {task: logits},
        {} if kind == "single_label" else {task: kind},
        {task: thresholds[task]} if kind == "multi_label" and task in thresholds else {},
    )


def _roles(found: Predictions, task: str, row: int, shown: int | None) -> dict[str, int]:
    """What the maps of an image are of, one or two: indices in ``explainable``."""
    logits, target, kind = found.logits[task][row], found.targets[task][row], found.kind(task)
    if kind == "regression":
        return {"raises": 0, "lowers": 1} if shown is None else {("raises", "lowers")[shown]: shown}
    first = int(logits.argmax()) if shown is None else shown
    usual = "most probable" if kind == "multi_label" else "predicted"
    roles = {usual if shown is None else "asked for": first}
    if kind != "multi_label":
        return roles if target in (UNKNOWN, first) else {**roles, "right": int(target)}
    wrong = (target != UNKNOWN) & (found.predicted_labels(task)[row] != (target == 1))
    if not wrong.any():
        return roles
    losses = np.where(wrong, np.logaddexp(0.0, np.where(target == 1, -logits, logits)), -1.0)
    worst = int(losses.argmax())
    role = "missed" if target[worst] == 1 else "wrongly predicted"
    return {role: worst} if worst == first and shown is None else {**roles, role: worst}


def _role_caption(predicted: TaskPrediction, task: str, role: str, index: int, heat: NDArray[np.float32]) -> str:
    if predicted.kind == "regression":
        nothing = "" if heat.any() else " (nothing does)"
        return f"what {role} the predicted\n{task} {predicted.label}{nothing}"
    return _caption(f"{role}\n{predicted.classes[index]}", float(predicted.probabilities[index]), heat)


def explain_texts(
    model: nn.Module, texts: list[str], images: torch.Tensor, names: Sequence[str], *, method: Method = "gradcam"
) -> list[Explained]:
    """Explain the likeness of images, uint8 ``(B, 3, H, W)``, to texts.

    Grad-CAM has a map a text; rollout has one map, which is the same for all texts.

    Raises:
        UserError: the model has no text encoder, the method does not go with the network, or scores are not finite.
    """
    if not len(images):
        return []
    scores = text_scores(model, texts)
    found = score_images(model, scores, images)
    if method == "gradcam":
        wanted = torch.arange(len(texts)).expand(len(images), -1)
        maps = grad_cam(model, scores, images, wanted).numpy()
    else:
        maps = attention_rollout(model, images).expand(-1, len(texts), -1, -1).numpy()
    return [
        Explained(
            name=name,
            image=images[row].permute(1, 2, 0).cpu().numpy(),
            heats=[
                Heat(_caption(f"“{text}”", float(found[row, place]), maps[row, place]), maps[row, place])
                for place, text in enumerate(texts)
            ],
        )
        for row, name in enumerate(names)
    ]


def explained_figure(explained: Sequence[Explained], columns: int = 1) -> Figure:
    """Draw images next to the same with their maps over them."""
    columns = min(columns, len(explained))
    panels = 1 + max(len(one.heats) for one in explained)
    rows = -(-len(explained) // columns)
    figure = blank_figure(2.3 * panels * columns, 2.75 * rows, dpi=120)
    grid = figure.subplots(rows, panels * columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for place, one in enumerate(explained):
        row, column = divmod(place, columns)
        line = grid[row, column * panels : (column + 1) * panels]
        _draw(line[0], one.image, None, _name_and_target(one))
        for axes, heat in zip(line[1:], one.heats, strict=False):
            _draw(axes, one.image, heat.values, heat.caption)
    return figure


def overlay(image: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return an image with a map over it, uint8 ``(H, W, 3)``; where the map is 0 it is unchanged."""
    from matplotlib import colormaps

    colours = colormaps[COLOURS](heat)[..., :3] * 255
    opacity = _STRONGEST * heat[..., None] ** 0.5
    mixed: NDArray[np.uint8] = np.rint(image * (1 - opacity) + colours * opacity).astype(np.uint8)
    return mixed


def _draw(axes: Any, image: NDArray[np.uint8], heat: NDArray[np.float32] | None, caption: str) -> None:
    axes.imshow(image if heat is None else overlay(image, heat), interpolation="nearest")
    axes.set_title(plain(_wrapped(caption)), fontsize=8)


def _name_and_target(one: Explained) -> str:
    name = one.name if len(one.name) <= _LINE else f"…{one.name[1 - _LINE :]}"
    return f"{name}\nis {one.target}" if one.target else name


def _caption(what: str, score: float, heat: NDArray[np.float32]) -> str:
    nothing = "" if heat.any() else " (nothing contributes to it)"
    return f"{what} {score:.2f}{nothing}"


def _wrapped(text: str) -> str:
    return "\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, _LINE)[:3])
