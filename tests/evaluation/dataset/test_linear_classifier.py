from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from evaluation.dataset.features import Reduction, fitted, probabilities


def test_reduction_is_pca_of_standardised_features_with_the_first_component_of_unit_spread() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 6)) * [1, 10, 100, 1, 1, 1] + 5
    reduced = Reduction(features, components=4)(features)
    expected = PCA(4).fit_transform(StandardScaler().fit_transform(features))
    np.testing.assert_allclose(reduced, expected / expected.std(axis=0).max())
    assert Reduction(features[:3])(features).shape == (50, 3)


def test_constant_features_are_no_error() -> None:
    assert np.isfinite(Reduction(np.ones((5, 3)))(np.ones((2, 3)))).all()


def test_classes_that_were_never_seen_have_probability_zero() -> None:
    features = np.array([[-1.0], [-2.0], [1.0], [2.0]])
    said = probabilities(fitted(features, np.array([1, 1, 3, 3])), features, 5)
    assert said.shape == (4, 5)
    np.testing.assert_allclose(said.sum(axis=1), 1)
    assert (said[:, [0, 2, 4]] == 0).all()
    assert said.argmax(axis=1).tolist() == [1, 1, 3, 3]
