"""Detectors of unknown images (``vitrail.ood``): how they are fitted, and how well they separate images."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics.intervals import Estimate, Statistic, estimate, share_interval
from vitrail.errors import UserError
from vitrail.ood import METHODS, OF_LOGITS, unit
from vitrail.types import UNKNOWN, TaskKind

_WORK = 2e8
"""Weights that the resamples of one interval may look at: a second or two."""


@dataclass(frozen=True)
class OodOutputs:
    """What a model outputs for N images.

    Attributes:
        logits: float ``(N, C)``, of the task that detectors use.
        features: float ``(N, D)``, of the image backbone.
        groups: object ``(N,)``.
        targets: int64 ``(N,)``, ``UNKNOWN`` where not known; empty where they are not needed.
    """

    logits: NDArray[np.float32]
    features: NDArray[np.float32]
    groups: NDArray[np.object_]
    targets: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.features)


def methods_for(kind: TaskKind, *, has_prompts: bool) -> list[str]:
    """Return the methods that a model has the outputs for.

    Args:
        kind: of the task.
        has_prompts: whether its logits are scaled cosines.
    """
    left_out = {"multi_label": ("mcm", "vim"), "regression": (*OF_LOGITS, "vim")}.get(kind, ())
    return [one for one in METHODS if one not in left_out and (has_prompts or one != "mcm")]


def fit_detector(
    method: str,
    train: OodOutputs,
    *,
    head: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
    logit_scale: float = 1.0,
    neighbours: int = 0,
) -> dict[str, NDArray[np.float32]]:
    """Return what a method needs of the training images; see ``vitrail.ood`` for the methods.

    Args:
        method: one of ``METHODS``.
        train: of the training split.
        head: weights ``(C, D)`` and biases ``(C,)`` where one linear layer makes logits of features. ViM takes its
            origin from it, otherwise the mean of the features.
        logit_scale: what cosines were multiplied by.
        neighbours: k of ``knn``; 0 for a tenth of the images of an average class, 50 at most.

    Raises:
        UserError: there are too few training images.
    """
    features = train.features.astype(np.float64)
    if method not in OF_LOGITS and len(features) < 2:
        raise UserError(f"ood {method}: needs at least two training images; got {len(features)}")
    match method:
        case "mcm":
            found: dict[str, Any] = {"scale": logit_scale}
        case "mahalanobis":
            found = _mahalanobis(features, train.targets)
        case "knn":
            usual = max(1, min(50, len(features) // (10 * max(1, train.logits.shape[1]))))
            found = {"bank": unit(features), "neighbours": min(neighbours or usual, len(features))}
        case "vim":
            found = _vim(features, train.logits.astype(np.float64), head)
        case _:
            found = {}
    return {name: np.asarray(values, dtype=np.float32) for name, values in found.items()}


def _mahalanobis(features: NDArray[np.float64], targets: NDArray[np.int64]) -> dict[str, Any]:
    """Means of the classes and a map in which the covariance within them is the unit matrix.

    Images whose class is not known, and all where none is, are a class of their own.
    """
    from sklearn.covariance import LedoitWolf

    classes = targets if len(targets) == len(features) else np.full(len(features), UNKNOWN)
    names, index = np.unique(classes, return_inverse=True)
    means = np.stack([features[index == place].mean(axis=0) for place in range(len(names))])
    covariance = LedoitWolf(assume_centered=True).fit(features - means[index]).covariance_
    values, vectors = np.linalg.eigh(covariance)
    whitening = vectors / np.sqrt(np.maximum(values, values.max() * 1e-10))
    return {"whitening": whitening, "means": means @ whitening}


def _vim(
    features: NDArray[np.float64],
    logits: NDArray[np.float64],
    head: tuple[NDArray[np.float64], NDArray[np.float64]] | None,
) -> dict[str, Any]:
    count, size = features.shape
    origin = features.mean(axis=0) if head is None else -np.linalg.pinv(head[0]) @ head[1]
    # The paper's numbers of principal directions; few images leave the others to no one.
    wanted = 1000 if size >= 2048 else 512 if size >= 768 else size // 2
    kept = min(wanted, max(1, count // 2), size - 1)
    centred = features - origin
    _, vectors = np.linalg.eigh(centred.T @ centred / count)
    outside = vectors[:, : size - kept]  # eigenvalues ascend
    length = float(np.linalg.norm(centred @ outside, axis=1).mean())
    scale = float(logits.max(axis=1).mean()) / max(length, 1e-12)
    return {"origin": origin, "outside": outside, "scale": scale}


def threshold_for(scores: NDArray[np.float64], rate: float) -> float:
    """Return the highest threshold that at least a share of the scores, ``(N,)``, reaches."""
    ordered = np.sort(scores)
    # Not one image more than the rate allows, whatever rounding does to the product.
    return float(ordered[min(len(scores) - 1, math.floor((1 - rate) * len(scores) + 1e-9))])


@dataclass(frozen=True)
class Separation:
    """How well the scores of a method separate images of the test split from others.

    Attributes:
        auroc: chance that an image of the test split has the higher score, equal scores counting half; 0 to 1, higher
            is better.
        fpr: share of the others that reach the threshold that 95 % of the test images reach; lower is better.
        kept: share of the test images that reach the saved threshold.
        unknown: share of the others that do not.
    """

    auroc: Estimate
    fpr: Estimate
    kept: Estimate
    unknown: Estimate


def separation(
    inside: NDArray[np.float64],
    outside: NDArray[np.float64],
    groups: tuple[NDArray[np.object_], NDArray[np.object_]],
    threshold: float,
    n_resamples: int = 2_000,
) -> Separation:
    """Return how well scores separate two sets, with 95 % intervals over groups of both.

    Args:
        inside: ``(N,)``, of the test split.
        outside: ``(M,)``, of the other images.
        groups: of both.
        threshold: that was chosen on validation.
        n_resamples: at most.
    """
    scores = np.concatenate([inside, outside])
    is_inside = np.arange(len(scores)) < len(inside)
    names, own = np.unique(groups[0].astype(str), return_inverse=True)
    index = np.concatenate([own, len(names) + np.unique(groups[1].astype(str), return_inverse=True)[1]])
    count = int(np.clip(_WORK / max(len(scores), 1), 200, n_resamples))
    kept, found = inside >= threshold, outside < threshold
    return Separation(
        estimate(auroc_statistic(scores, is_inside), index, count),
        estimate(fpr_statistic(scores, is_inside), index, count, percentiles=True),
        Estimate(float(kept.mean()), share_interval(kept.astype(np.float64), groups[0])),
        Estimate(float(found.mean()), share_interval(found.astype(np.float64), groups[1])),
    )


def auroc_statistic(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> Statistic:
    """Return the area under the ROC curve as a function of sample weights; equal scores count half.

    Args:
        scores: ``(N,)``.
        positive: bool ``(N,)``, which should have the higher scores.
    """
    distinct, place = np.unique(scores, return_inverse=True)
    order = np.argsort(place, kind="stable")
    begins = np.searchsorted(place[order], np.arange(len(distinct)))

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        own = weights[:, order]
        inside, outside = (np.add.reduceat(own * mask[order], begins, axis=1) for mask in (positive, ~positive))
        below = outside.cumsum(axis=1) - outside / 2
        pairs = inside.sum(axis=1) * outside.sum(axis=1)
        return _ratio((inside * below).sum(axis=1), pairs)

    return statistic


def fpr_statistic(scores: NDArray[np.float64], positive: NDArray[np.bool_], rate: float = 0.95) -> Statistic:
    """Return the share of negatives at or above the threshold that a share of the positives reaches, by weights."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        own = weights[:, order]
        inside, outside = ((own * mask[order]).cumsum(axis=1)[:, ends] for mask in (positive, ~positive))
        reached = inside >= rate * inside[:, -1:] - 1e-9
        first = reached.argmax(axis=1)
        return _ratio(np.take_along_axis(outside, first[:, None], axis=1)[:, 0], outside[:, -1])

    return statistic


def _ratio(top: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.divide(top, below, out=np.full(len(top), math.nan), where=below > 0)
    return found
