"""A small classifier on given features, for questions that need an answer in seconds, not a network.

Multinomial logistic regression on standardised principal components, with scikit-learn's default penalty C = 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_COMPONENTS = 128
"""Principal components that are kept at most: a logistic regression of more takes minutes and knows little more."""

_MAX_ITERATIONS = 2_000


class Reduction:
    """Standardises features and keeps their first principal components.

    Args:
        features: ``(N, D)``, finite; labels are not needed, so unlabelled pictures may be among them.
        components: at most so many are kept.
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
        """Components of some features, float64 ``(n, components)``."""
        reduced: NDArray[np.float64] = self._pipeline.transform(np.asarray(features, np.float64)) / self._scale
        return reduced


def fitted(features: NDArray[np.float64], labels: NDArray[np.int64]) -> Any:
    """A logistic regression.

    Args:
        features: float64 ``(N, D)``.
        labels: int64 ``(N,)``, of at least two classes.
    """
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=_MAX_ITERATIONS).fit(features, labels)


def probabilities(classifier: Any, features: NDArray[np.float64], num_classes: int) -> NDArray[np.float64]:
    """Probabilities of all classes, 0 for those that the classifier never saw.

    Returns:
        float64 ``(N, num_classes)``; each row sums to 1.
    """
    all_classes = np.zeros((len(features), num_classes))
    all_classes[:, classifier.classes_] = classifier.predict_proba(features)
    return all_classes
