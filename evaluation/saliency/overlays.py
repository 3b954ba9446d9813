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
from evaluation.saliency import Method, attention_rollout, class_scores, grad_cam, score_images, text_scores
from evaluation.tables.per_class import NO_PREDICTION
from vitrail.predictions import predicted_classes
from vitrail.types import UNKNOWN

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
        predicted: predicted class; empty for texts.
        confidence: its probability; NaN for texts.
        target: right class; empty where not known.
    """

    name: str
    image: NDArray[np.uint8]
    heats: list[Heat]
    predicted: str = ""
    confidence: float = float("nan")
    target: str = ""


def worst_mistakes(logits: NDArray[np.float32], targets: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the rows of wrong predictions, int64 ``(n,)``, the least probability of the right class first.

    Equal ones are in the order of the rows.
    """
    from scipy.special import log_softmax

    wrong = np.flatnonzero((targets != UNKNOWN) & (predicted_classes(logits) != targets))
    right = log_softmax(logits[wrong].astype(np.float64), axis=1)[np.arange(len(wrong)), targets[wrong]]
    return wrong[np.argsort(right, kind="stable")[:count]].astype(np.int64)


def explain_classes(
    model: nn.Module,
    task: str,
    images: torch.Tensor,
    names: Sequence[str],
    targets: Sequence[int],
    *,
    method: Method = "gradcam",
    shown: int | None = None,
) -> list[Explained]:
    """Explain the predicted class of each image, and the right one.

    Args:
        model: with a task of that name.
        task: whose classes.
        images: uint8 ``(B, 3, H, W)``.
        names: of the images.
        targets: index of each image's right class, ``UNKNOWN`` where not known.
        method: Grad-CAM has a map of the predicted class and, where it is another one, of the right class; rollout has
            one map, which is the same for all classes.
        shown: index of a class to explain instead of the predicted one.

    Raises:
        UserError: the method does not go with the network, or scores are not finite.
    """
    if not len(images):
        return []
    classes, scores = cast("Any", model).tasks[task], class_scores(model, task)
    logits = score_images(model, scores, images)
    probabilities, chosen = logits.softmax(dim=1), logits.argmax(dim=1)
    nothing = predicted_classes(logits.numpy()) == UNKNOWN
    first = chosen if shown is None else torch.full_like(chosen, shown)
    first_is = "predicted" if shown is None else "asked for"
    known = torch.as_tensor(list(targets), dtype=torch.int64)
    second = torch.where(known == UNKNOWN, first, known)
    if method == "gradcam":
        maps = grad_cam(model, scores, images, torch.stack([first, second], dim=1)).numpy()
    else:
        maps = attention_rollout(model, images).numpy()
    explained = []
    for row, name in enumerate(names):
        heats = [Heat("attention rollout", maps[row, 0])] if method == "rollout" else []
        roles = {first_is: int(first[row])} | ({} if first[row] == second[row] else {"right": int(second[row])})
        for heat, (role, index) in zip(maps[row] if method == "gradcam" else (), roles.items(), strict=False):
            heats.append(Heat(_caption(f"{role}\n{classes[index]}", float(probabilities[row, index]), heat), heat))
        explained.append(
            Explained(
                name=name,
                image=images[row].permute(1, 2, 0).cpu().numpy(),
                heats=heats,
                predicted=NO_PREDICTION if nothing[row] else classes[int(chosen[row])],
                confidence=float(probabilities[row, chosen[row]]),
                target="" if known[row] == UNKNOWN else classes[int(known[row])],
            )
        )
    return explained


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
