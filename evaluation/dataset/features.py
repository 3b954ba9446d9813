"""Features of images without a network, and linear models on features that train in seconds.

Features are a thumbnail, a colour histogram and edges (histograms of oriented gradients, Dalal & Triggs, CVPR 2005,
without their overlapping blocks): enough to find outliers; a trained network's vectors (``--gallery``) show far more.
Classes are predicted by multinomial logistic regression on standardised principal components, with scikit-learn's
default penalty C = 1, labels by one logistic regression each, numbers by Bayesian ridge regression, which chooses its
penalty itself and predicts standard deviations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrail.types import UNKNOWN

GRID = 10
"""Side of the thumbnail whose colours are features."""

CELLS, ORIENTATIONS = 6, 8
"""Of the edges: cells along a side, directions in each."""

_SIDE = 48
_HUES, _LEVELS = 12, 8


def pixel_features(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return thumbnail, colour histogram and edges of an RGB image of any size, float32 ``(D,)``, 0 to 1."""
    image = Image.fromarray(pixels)
    thumbnail = np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX), np.float64) / 255
    small = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    hsv = np.asarray(small.convert("HSV"), np.float64) / 255
    grey = np.asarray(small.convert("L"), np.float64) / 255
    return np.concatenate([thumbnail.ravel(), _colours(hsv), _edges(grey)]).astype(np.float32)


CENTRE = 0.5
"""Side of the centre crop as a share of the image's sides."""


def centre_colour(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return mean hue, saturation and value of the centre crop, float64 ``(3,)``, 0 to 1.

    Hue is averaged as a number; red is at both of its ends.
    """
    height, width = image.shape[:2]
    rows, columns = max(1, round(height * CENTRE)), max(1, round(width * CENTRE))
    top, left = (height - rows) // 2, (width - columns) // 2
    crop = np.ascontiguousarray(image[top : top + rows, left : left + columns])
    hsv = np.asarray(Image.fromarray(crop).convert("HSV"), np.float64) / 255
    mean: NDArray[np.float64] = hsv.reshape(-1, 3).mean(axis=0)
    return mean


def thumbnail(pixels: NDArray[np.uint8], side: int = 64) -> NDArray[np.uint8]:
    """Scale an image down to fit into a square, uint8 ``(h, w, 3)``."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return np.asarray(image)


def _colours(hsv: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shares of hues, weighted by saturation so that grey counts for none, and of levels of saturation and value."""
    hue, saturation, value = hsv.reshape(-1, 3).T
    parts = [
        np.histogram(hue, _HUES, (0, 1), weights=saturation)[0],
        np.histogram(saturation, _LEVELS, (0, 1))[0],
        np.histogram(value, _LEVELS, (0, 1))[0],
    ]
    shares: NDArray[np.float64] = np.concatenate(parts) / len(hue)
    return shares


def _edges(grey: NDArray[np.float64]) -> NDArray[np.float64]:
    """Strength of edges by cell and direction, relative to the strongest cell's length."""
    down, across = np.gradient(grey)
    strength = np.hypot(down, across)
    # A light edge on dark and a dark one on light are the same edge.
    direction = (np.arctan2(down, across) / np.pi % 1 * ORIENTATIONS).astype(np.int64) % ORIENTATIONS
    place = np.arange(_SIDE) * CELLS // _SIDE
    cell = place[:, None] * CELLS + place[None, :]
    bins = np.zeros(CELLS * CELLS * ORIENTATIONS)
    np.add.at(bins, (cell * ORIENTATIONS + direction).ravel(), strength.ravel())
    lengths = np.linalg.norm(bins.reshape(-1, ORIENTATIONS), axis=1).max()
    edges: NDArray[np.float64] = bins / lengths if lengths > 0 else bins
    return edges


MAX_COMPONENTS = 128
"""Principal components that are kept at most: a logistic regression of more takes minutes and gains little."""

_MAX_ITERATIONS = 2_000


class Reduction:
    """Standardises features, ``(N, D)`` and finite, and keeps their first principal components.

    Labels are not needed, so unlabelled images may be among them.
    """

    def __init__(self, features: NDArray[Any], components: int = MAX_COMPONENTS) -> None:
        from sklearn.decomposition import PCA
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        kept = min(components, *features.shape)
        # Scaled as a whole afterwards, so that the penalty means the same for features of any size.
        self._pipeline = make_pipeline(StandardScaler(), PCA(kept, svd_solver="full"))
        # Of equal features the share of the variance is 0 / 0; it is not asked for.
        with np.errstate(invalid="ignore"):
            reduced = self._pipeline.fit_transform(np.asarray(features, np.float64))
        self._scale = float(reduced.std(axis=0).max(initial=0.0)) or 1.0

    def __call__(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Return components of some features, float64 ``(n, components)``."""
        reduced: NDArray[np.float64] = self._pipeline.transform(np.asarray(features, np.float64)) / self._scale
        return reduced


def fitted(features: NDArray[np.float64], labels: NDArray[np.int64]) -> Any:
    """Fit a logistic regression of at least two classes."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=_MAX_ITERATIONS).fit(features, labels)


def fitted_labels(
    features: NDArray[np.float64], labels: NDArray[np.int8]
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Fit a logistic regression for each label on the samples where it is known.

    Args:
        features: ``(N, D)``.
        labels: ``(N, C)``, 1, 0 or ``UNKNOWN``.

    Returns:
        From features ``(n, D)`` to probabilities float64 ``(n, C)``. Of a label that always applied, never did, or was
        never known, (applied + 1) / (known + 2) for every sample.
    """
    known = labels != UNKNOWN
    models: list[Any] = []
    for own, column in zip(known.T, labels.T, strict=True):
        both = len(np.unique(column[own])) > 1
        models.append(fitted(features[own], column[own]) if both else ((column == 1).sum() + 1) / (own.sum() + 2))

    def predict(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        chances = [np.full(len(rows), one) if np.isscalar(one) else one.predict_proba(rows)[:, 1] for one in models]
        return np.stack(chances, axis=1)

    return predict


def fitted_numbers(features: NDArray[np.float64], numbers: NDArray[np.floating[Any]]) -> Any:
    """Fit a Bayesian ridge regression."""
    from sklearn.linear_model import BayesianRidge

    return BayesianRidge().fit(features, np.asarray(numbers, np.float64))


def probabilities(classifier: Any, features: NDArray[np.float64], num_classes: int) -> NDArray[np.float64]:
    """Return probabilities of all classes, float64 ``(N, num_classes)``, 0 for those that the classifier never saw."""
    all_classes = np.zeros((len(features), num_classes))
    all_classes[:, classifier.classes_] = classifier.predict_proba(features)
    return all_classes
