"""Maps of vectors in the plane: PCA, t-SNE, UMAP and Isomap, each the same again with the same seed.

* t-SNE: van der Maaten & Hinton, JMLR 9 (2008). Distances between far clusters and their sizes mean nothing.
* UMAP: McInnes, Healy & Melville, 2018; needs the extra ``vitrail[umap]``.
* Isomap: Tenenbaum, de Silva & Langford, Science 290 (2000): distances along a graph of neighbours.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from vitrail.errors import UserError

Projection = Literal["pca", "tsne", "umap", "isomap"]

PROJECTIONS: tuple[Projection, ...] = get_args(Projection)

PERPLEXITY = 30.0
"""Of t-SNE; a third of the samples at most."""

NEIGHBOURS: dict[Projection, int] = {"umap": 15, "isomap": 8}
"""How many neighbours each point is joined with, by default."""

_FLAT = 3  # points that are in a plane without any loss; the methods need more


def project(
    vectors: NDArray[Any], method: Projection, *, seed: int = 0, neighbours: int | None = None
) -> NDArray[np.float64]:
    """Project vectors to the plane.

    Up to three vectors are in a plane already, so every method then returns what PCA returns; one vector is at 0.

    Args:
        vectors: ``(N, D)``, finite.
        method: one of ``PROJECTIONS``.
        seed: of t-SNE and UMAP.
        neighbours: of UMAP and Isomap; ``NEIGHBOURS`` by default, and never more than there are other points.

    Returns:
        float64 ``(N, 2)``.

    Raises:
        UserError: a vector is not finite, the method is unknown, or its package is not installed.
    """
    if method not in PROJECTIONS:
        raise UserError(f"projection: {method!r} is unknown; choose one of {', '.join(PROJECTIONS)}")
    points = np.asarray(vectors, np.float64)
    if points.ndim != 2:
        raise ValueError(f"vectors have the shape {points.shape}, must have (N, D)")
    if bad := int((~np.isfinite(points).all(axis=1)).sum()):
        raise UserError(f"projection: {bad} of {len(points)} vectors are not finite; has the model diverged?")
    # A plane needs two directions.
    points = np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1]))))
    if len(points) < 2:
        return np.zeros((len(points), 2))
    if method == "pca" or len(points) <= _FLAT:
        return _pca(points)
    if method == "tsne":
        return _tsne(points, seed)
    count = min(neighbours or NEIGHBOURS[method], len(points) - 1)
    return _umap(points, seed, count) if method == "umap" else _isomap(points, count)


def _pca(points: NDArray[np.float64]) -> NDArray[np.float64]:
    from sklearn.decomposition import PCA

    # Of equal points the share of the variance is 0 / 0; it is not asked for.
    with np.errstate(invalid="ignore"):
        placed: NDArray[np.float64] = PCA(2, svd_solver="full").fit_transform(points)
    return placed


def _tsne(points: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    from sklearn.manifold import TSNE

    # Where all points are equal the start would be divided by a spread of 0.
    if not np.ptp(points, axis=0).any():
        return np.zeros((len(points), 2))
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    return np.asarray(TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points), np.float64)


def _umap(points: NDArray[np.float64], seed: int, neighbours: int) -> NDArray[np.float64]:
    try:
        from umap import UMAP
    except ImportError as error:
        raise UserError("projection: umap is not installed; `pip install 'vitrail[umap]'`, or take tsne") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="n_jobs value")  # a seed means one thread, which is wanted
        reducer = UMAP(n_neighbors=max(2, neighbours), random_state=seed)
        return np.asarray(reducer.fit_transform(points), np.float64)


def _isomap(points: NDArray[np.float64], neighbours: int) -> NDArray[np.float64]:
    from sklearn.manifold import Isomap

    with warnings.catch_warnings():
        # Islands are joined by their shortest bridges, which is what a map needs.
        warnings.filterwarnings("ignore", message="The number of connected components")
        warnings.filterwarnings("ignore", category=_efficiency_warning())
        # Dense: ARPACK starts from a random vector.
        placed = Isomap(n_neighbors=neighbours, n_components=2, eigen_solver="dense").fit_transform(points)
    return np.asarray(placed, np.float64)


def _efficiency_warning() -> type[Warning]:
    from scipy.sparse import SparseEfficiencyWarning

    warning: type[Warning] = SparseEfficiencyWarning
    return warning
