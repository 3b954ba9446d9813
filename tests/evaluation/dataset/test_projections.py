from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from evaluation.dataset.projections import Projection, project
from vitrail.errors import UserError

INSTALLED: list[Projection] = ["pca", "tsne", "isomap"]


def clusters(n: int = 60, dim: int = 10) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Three clusters far from each other."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 3
    return rng.normal(size=(n, dim)) * 0.3 + 6 * np.eye(dim)[labels], labels


@pytest.mark.parametrize("method", INSTALLED)
def test_clusters_stay_together_and_the_same_seed_gives_the_same_map(method: Projection) -> None:
    vectors, labels = clusters()
    places = project(vectors, method, seed=3)
    assert places.shape == (60, 2)
    distance = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (labels[distance.argmin(axis=1)] == labels).all()
    np.testing.assert_array_equal(places, project(vectors, method, seed=3))


def test_isomap_unrolls_a_spiral() -> None:
    # Along the arc images are in order; in the plane neighbours of different turns are near each other.
    arc = np.linspace(3, 12, 150)
    spiral = np.stack([arc * np.cos(arc), arc * np.sin(arc), np.zeros_like(arc)], axis=1)
    unrolled = project(spiral, "isomap", neighbours=4)[:, 0]
    assert abs(spearmanr(unrolled, arc).statistic) > 0.999
    assert abs(spearmanr(project(spiral, "pca")[:, 0], arc).statistic) < 0.9


@pytest.mark.parametrize("method", INSTALLED)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("dim", [1, 4])
def test_few_vectors_have_a_map_too(method: Projection, n: int, dim: int) -> None:
    places = project(np.random.default_rng(0).normal(size=(n, dim)), method)
    assert places.shape == (n, 2)
    assert np.isfinite(places).all()


@pytest.mark.parametrize("method", INSTALLED)
def test_equal_vectors_lie_on_one_spot(method: Projection) -> None:
    places = project(np.ones((12, 3)), method)
    assert np.isfinite(places).all()
    assert np.ptp(places) < 1e-6


def test_islands_are_joined_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    vectors, labels = clusters()
    places = project(vectors, "isomap", neighbours=3)
    assert np.isfinite(places).all()
    assert not recwarn.list
    assert len({tuple(np.round(places[labels == code].mean(axis=0), 1)) for code in range(3)}) == 3


def test_what_cannot_be_mapped_is_reported() -> None:
    with pytest.raises(UserError, match="1 of 3 vectors are not finite"):
        project(np.array([[0.0, 1.0], [np.nan, 0.0], [1.0, 1.0]]), "pca")
    with pytest.raises(UserError, match="'lle' is unknown; choose one of pca, tsne, umap, isomap"):
        project(np.zeros((3, 2)), "lle")  # type: ignore[arg-type]


def test_umap_separates_clusters_and_is_the_same_again() -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed (pip install 'vitrail[umap]')")
    vectors, labels = clusters()
    places = project(vectors, "umap", seed=1)
    np.testing.assert_array_equal(places, project(vectors, "umap", seed=1))
    centres = np.stack([places[labels == code].mean(axis=0) for code in range(3)])
    assert (np.linalg.norm(places[:, None] - centres[None], axis=2).argmin(axis=1) == labels).all()


def test_umap_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'vitrail\[umap\]'"):
        project(clusters()[0], "umap")


@pytest.mark.parametrize(("given", "expected"), [(None, 15), (5, 5), (1, 2), (10_000, None)])
def test_umap_is_asked_with_seed_and_neighbours(
    monkeypatch: pytest.MonkeyPatch, given: int | None, expected: int | None
) -> None:
    """The package is an extra: a stand-in returns what it was asked."""
    vectors, _ = clusters()
    asked: list[dict[str, int]] = []

    class Reducer:
        def __init__(self, **named: int) -> None:
            asked.append(named)

        def fit_transform(self, points: NDArray[np.float64]) -> NDArray[np.float32]:
            np.testing.assert_array_equal(points, vectors)
            return points[:, :2].astype(np.float32)

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Reducer))
    places = project(vectors, "umap", seed=7, neighbours=given)
    assert asked == [{"n_neighbors": expected or len(vectors) - 1, "random_state": 7}]
    assert places.dtype == np.float64
    np.testing.assert_allclose(places, vectors[:, :2], rtol=1e-6)
