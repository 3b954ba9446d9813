from __future__ import annotations

import numpy as np

from evaluation.dataset.features import CELLS, GRID, ORIENTATIONS, pixel_features

EDGES = CELLS * CELLS * ORIENTATIONS


def test_features_have_one_length_and_range_for_every_size() -> None:
    rng = np.random.default_rng(0)
    for shape in ((48, 48), (1, 1), (7, 200), (300, 90)):
        features = pixel_features(rng.integers(0, 256, (*shape, 3)).astype(np.uint8))
        assert features.dtype == np.float32
        assert features.shape == (GRID * GRID * 3 + 12 + 8 + 8 + EDGES,)
        assert (features >= 0).all()
        assert (features <= 1).all()


def test_thumbnail_comes_first() -> None:
    image = np.zeros((GRID, GRID, 3), np.uint8)
    image[0, 0] = (255, 0, 51)
    np.testing.assert_allclose(pixel_features(image)[:6], [1, 0, 0.2, 0, 0, 0], atol=1e-6)


def test_grey_has_no_hue_and_no_edges() -> None:
    features = pixel_features(np.full((30, 30, 3), 128, np.uint8))
    hues = features[GRID * GRID * 3 :][:12]
    assert hues.sum() == 0
    assert features[-EDGES:].sum() == 0


def test_stripes_are_told_by_their_direction() -> None:
    stripes = np.repeat((np.arange(48) // 6 % 2 * 255).astype(np.uint8)[None, :, None], 48, axis=0).repeat(3, axis=2)
    upright = pixel_features(stripes)[-EDGES:].reshape(-1, ORIENTATIONS).sum(axis=0)
    level = pixel_features(stripes.transpose(1, 0, 2).copy())[-EDGES:].reshape(-1, ORIENTATIONS).sum(axis=0)
    assert upright.argmax() == 0
    assert level.argmax() == ORIENTATIONS // 2
