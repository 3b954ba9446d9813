"""Where a model puts the pictures of a gallery: its vectors laid out in the plane."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from app.exploring import Explorer
from evaluation.dataset.projections import Projection, project
from vitrail.errors import UserError

if TYPE_CHECKING:
    from retrieval.gallery import Gallery

MOST_POINTS = 5_000
"""Pictures on a map; of more so many are drawn evenly. More could neither be told apart nor laid out in a minute."""

METHODS: dict[str, Projection] = {"PCA": "pca", "t-SNE": "tsne", "UMAP": "umap"}
"""By the names that people know them by."""

PALETTE = (
    "#3b6ea8", "#d98324", "#3f9463", "#c0453f", "#8064b0", "#8a6a55", "#c970ad", "#7d8590", "#a39a2a", "#2fa5b5",
    "#86b1dd", "#f0b872", "#8fcfa9", "#e79a96", "#b8a5da", "#bfa896", "#e3b3d3", "#b4bac2", "#d6cf72", "#8fd6df",
)  # fmt: skip
"""Colours of classes, seen on light and on dark ground; with more classes they come again."""


@dataclass(frozen=True)
class PictureMap:
    """Places of n pictures.

    Attributes:
        rows: int64 ``(n,)``, of the gallery, ascending.
        places: float64 ``(n, 2)``, 0 to 1, to the same scale in both directions.
        of: number of pictures that these were drawn from.
    """

    rows: NDArray[np.int64]
    places: NDArray[np.float64]
    of: int

    @property
    def told(self) -> str:
        """How many pictures are on the map, in words."""
        if len(self.rows) == self.of:
            return f"{self.of:,} pictures"
        return f"{len(self.rows):,} of {self.of:,} pictures, drawn evenly"


def methods() -> list[str]:
    """Names of the projections that are installed."""
    installed = importlib.util.find_spec("umap") is not None
    return [name for name, method in METHODS.items() if method != "umap" or installed]


def checked_method(method: object) -> str:
    """The name of a projection.

    Raises:
        UserError: if there is none of this name.
    """
    if isinstance(method, str) and method in methods():
        return method
    raise UserError(f"map: there is no projection {str(method)[:80]!r}; choose one of: {', '.join(methods())}")


def lay_out(gallery: Gallery, ids: list[str], method: str, *, limit: int = MOST_POINTS, seed: int = 0) -> PictureMap:
    """Lays the pictures of a gallery out by their vectors.

    Args:
        gallery: whose vectors are taken.
        ids: of all of its pictures, in the order of its rows.
        method: one of ``methods()``.
        limit: pictures at most.
        seed: of the draw, and of the projection.

    Raises:
        UserError: for a method that there is none of, or vectors that are not finite.
    """
    checked_method(method)
    rows = np.arange(len(ids), dtype=np.int64)
    if len(rows) > limit:
        rows = np.sort(np.random.default_rng(seed).choice(len(ids), limit, replace=False)).astype(np.int64)
    vectors = gallery.vectors([ids[row] for row in rows.tolist()])
    return PictureMap(rows, _fitted(project(vectors, METHODS[method], seed=seed)), len(ids))


def map_points(
    explorer: Explorer, placed: PictureMap, shown: NDArray[np.int64], task: str, selected: int | None = None
) -> dict[str, object]:
    """The map as the browser draws it: plain lists, a few dozen bytes a picture.

    Args:
        explorer: of the gallery.
        placed: where its pictures are.
        shown: int64 ``(m,)``, rows that the filter leaves; others are faint.
        task: whose values give the colours; empty for one colour.
        selected: row of the picture that is shown elsewhere.
    """
    facet = explorer.facets.get(task)
    codes = np.zeros(len(placed.rows), np.int64) if facet is None else facet.codes[placed.rows]
    # Tenths of a thousandth: finer than any screen.
    places = (placed.places * 10_000).round().astype(int)
    return {
        "gallery": explorer.name,
        "ids": [explorer.id_of(row) for row in placed.rows.tolist()],
        "x": places[:, 0].tolist(),
        "y": places[:, 1].tolist(),
        "codes": codes.tolist(),
        "names": list(facet.values) if facet is not None else ["picture"],
        "colours": list(PALETTE),
        "shown": np.isin(placed.rows, shown).astype(int).tolist(),
        "selected": -1 if selected is None else int(np.append(np.flatnonzero(placed.rows == selected), -1)[0]),
    }


def _fitted(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Places moved and scaled into the unit square, in its middle, without distortion."""
    if not len(places):
        return places
    low, high = places.min(axis=0), places.max(axis=0)
    extent = float((high - low).max()) or 1.0
    fitted: NDArray[np.float64] = (places - (low + high) / 2) / extent + 0.5
    return fitted
