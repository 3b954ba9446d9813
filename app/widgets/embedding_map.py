"""The embedding map: a gallery's vectors in the plane, as points that open their image by mouse, finger and keyboard.

What is drawn is the component's value, see ``map_points``. Texts are only ever set as text.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
import numpy as np
from numpy.typing import NDArray

from app.logic.explore import Explorer
from app.state.limits import shortened
from app.widgets.cards import ROUTE
from evaluation.dataset.projections import Projection, project
from vitrail.errors import UserError

if TYPE_CHECKING:
    from retrieval.gallery import Gallery


MOST_POINTS = 5_000
"""Images on a map, a sample where there are more, which could neither be distinguished nor laid out in a minute."""

METHODS: dict[str, Projection] = {"PCA": "pca", "t-SNE": "tsne", "UMAP": "umap"}
"""Projections as users know them."""

PALETTE = (
    "#3b6ea8", "#d98324", "#3f9463", "#c0453f", "#8064b0", "#8a6a55", "#c970ad", "#7d8590", "#a39a2a", "#2fa5b5",
    "#86b1dd", "#f0b872", "#8fcfa9", "#e79a96", "#b8a5da", "#bfa896", "#e3b3d3", "#b4bac2", "#d6cf72", "#8fd6df",
)  # fmt: skip
"""Colours of classes, visible on light and dark pages; with more classes they repeat."""


@dataclass(frozen=True)
class ImageMap:
    """Places of n images.

    Attributes:
        rows: int64 ``(n,)``, of the gallery, ascending.
        places: float64 ``(n, 2)``, 0 to 1, to the same scale in both directions.
        of: number of images in the gallery.
    """

    rows: NDArray[np.int64]
    places: NDArray[np.float64]
    of: int

    @property
    def text(self) -> str:
        """How many images are on the map."""
        if len(self.rows) == self.of:
            return f"{self.of:,} images"
        return f"{len(self.rows):,} of {self.of:,} images, a random sample"


def methods() -> list[str]:
    """Return names of the projections that are installed."""
    installed = importlib.util.find_spec("umap") is not None
    return [name for name, method in METHODS.items() if method != "umap" or installed]


def checked_method(method: object) -> str:
    """Return the name of a projection; raise ``UserError`` for an unknown one."""
    if isinstance(method, str) and method in methods():
        return method
    raise UserError(f"projection: must be one of {', '.join(methods())}; got {shortened(repr(method))}")


def lay_out(gallery: Gallery, ids: list[str], method: str, *, limit: int = MOST_POINTS, seed: int = 0) -> ImageMap:
    """Project the vectors of a gallery's images.

    Args:
        gallery: whose vectors are taken.
        ids: of all of its images, in the order of its rows.
        method: one of ``methods()``.
        limit: images at most.
        seed: of the sample, and of the projection.

    Raises:
        UserError: there is no such method, or vectors are not finite.
    """
    checked_method(method)
    rows = np.arange(len(ids), dtype=np.int64)
    if len(rows) > limit:
        rows = np.sort(np.random.default_rng(seed).choice(len(ids), limit, replace=False)).astype(np.int64)
    vectors = gallery.vectors([ids[row] for row in rows.tolist()])
    return ImageMap(rows, _fitted(project(vectors, METHODS[method], seed=seed)), len(ids))


def map_points(
    explorer: Explorer, placed: ImageMap, shown: NDArray[np.int64], task: str, selected: int | None = None
) -> dict[str, object]:
    """Return the map as the browser draws it: plain lists, a few dozen bytes an image.

    Args:
        explorer: of the gallery.
        placed: where its images are.
        shown: int64 ``(m,)``, rows that the filter leaves; others are faint.
        task: whose values give the colours; empty for one colour.
        selected: row of the image that is open.
    """
    facet = explorer.facets.get(task)
    codes = np.zeros(len(placed.rows), np.int64) if facet is None else facet.first[placed.rows]
    # Tenths of a thousandth: finer than any screen.
    places = (placed.places * 10_000).round().astype(int)
    return {
        "gallery": explorer.name,
        "ids": [explorer.ids[row] for row in placed.rows.tolist()],
        "x": places[:, 0].tolist(),
        "y": places[:, 1].tolist(),
        "codes": codes.tolist(),
        "names": list(facet.values) if facet is not None else ["image"],
        "colours": list(PALETTE),
        "shown": np.isin(placed.rows, shown).astype(int).tolist(),
        "selected": -1 if selected is None else int(np.append(np.flatnonzero(placed.rows == selected), -1)[0]),
    }


def _fitted(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Places in the middle of the unit square, without distortion."""
    if not len(places):
        return places
    low, high = places.min(axis=0), places.max(axis=0)
    extent = float((high - low).max()) or 1.0
    fitted: NDArray[np.float64] = (places - (low + high) / 2) / extent + 0.5
    return fitted


_FILES = Path(__file__)
"""Style and script have the same name."""

_TEMPLATE = """
<div class="map">
  <div class="map-frame">
    <canvas tabindex="0" role="application"
      aria-label="Map of images: arrow keys go from point to point, Enter opens the image"></canvas>
    <div class="map-tip" role="status" hidden><img alt=""><span></span></div>
  </div>
  <ul class="map-legend"></ul>
</div>
"""


def map_view() -> gr.HTML:
    """Make the component; the ``value`` of its event ``select`` is an untrusted ``sample_id``."""
    return gr.HTML(
        html_template=_TEMPLATE,
        css_template=_FILES.with_suffix(".css").read_text(encoding="utf-8"),
        js_on_load=f"const ROUTE = '{ROUTE}';\n" + _FILES.with_suffix(".js").read_text(encoding="utf-8"),
        elem_id="explore-map",
        apply_default_css=False,
    )
