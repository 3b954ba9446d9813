from __future__ import annotations

import numpy as np
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from evaluation.dataset.features import CELLS, GRID, ORIENTATIONS, Reduction, fitted, pixel_features, probabilities

EDGES = CELLS * CELLS * ORIENTATIONS


def test_features_have_one_length_and_range_for_every_size() -> None:
    rng = np.random.default_rng(0)
    for shape in ((48, 48), (1, 1), (7, 200), (300, 90)):
        features = pixel_features(rng.integers(0, 256, (*shape, 3)).astype(np.uint8))
        assert features.dtype == np.float32
        assert features.shape == (GRID * GRID * 3 + 12 + 8 + 8 + EDGES,)
        assert (features >= 0).all()
        assert (features <= 1).all()


def test_grey_has_no_hue_and_no_edges() -> None:
    features = pixel_features(np.full((30, 30, 3), 128, np.uint8))
    hues = features[GRID * GRID * 3 :][:12]
    assert hues.sum() == 0
    assert features[-EDGES:].sum() == 0


def test_stripes_are_recognised_by_their_direction() -> None:
    stripes = np.repeat((np.arange(48) // 6 % 2 * 255).astype(np.uint8)[None, :, None], 48, axis=0).repeat(3, axis=2)
    upright = pixel_features(stripes)[-EDGES:].reshape(-1, ORIENTATIONS).sum(axis=0)
    level = pixel_features(stripes.transpose(1, 0, 2).copy())[-EDGES:].reshape(-1, ORIENTATIONS).sum(axis=0)
    assert upright.argmax() == 0
    assert level.argmax() == ORIENTATIONS // 2


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
