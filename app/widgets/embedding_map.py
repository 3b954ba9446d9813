"""The embedding map: a gallery's vectors in the plane, as points that open their image by mouse, finger and keyboard.

What is drawn is the component's value, see ``map_points``. Texts are only ever set as text.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gradio as gr
import numpy as np
from numpy.typing import NDArray

from app.logic.explore import Explorer
from app.state.context import shortened
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
    """Return the name of a projection; raise ``UserError`` where there is none of this name."""
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
    codes = np.zeros(len(placed.rows), np.int64) if facet is None else facet.codes[placed.rows]
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

_STYLE = """
.map { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.map-frame { position: relative; flex: 1 1 20rem; max-width: 44rem; }
canvas { display: block; width: 100%; aspect-ratio: 1; border: 1px solid var(--border-color-primary);
  border-radius: 8px; cursor: crosshair; touch-action: manipulation; }
canvas:focus-visible { outline: 2px solid var(--color-accent); }
.map-tip { position: absolute; pointer-events: none; display: flex; flex-direction: column; gap: .2rem; width: 8.5rem;
  padding: .35rem; border: 1px solid var(--border-color-primary); border-radius: 8px; font-size: .8rem;
  background: var(--background-fill-primary); color: var(--body-text-color); overflow-wrap: anywhere; z-index: 5; }
.map-tip[hidden] { display: none; }
.map-tip img { width: 100%; height: 7rem; object-fit: contain; }
.map-legend { flex: 1 1 9rem; list-style: none; margin: 0; padding: 0; font-size: .85rem; columns: 13rem;
  max-height: 44rem; overflow-y: auto; }
.map-legend span { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 50%; }
.map-legend li { margin: 0; overflow-wrap: anywhere; break-inside: avoid; }
"""

# `at` is the point under the pointer or the keyboard's place; only points that the filters leave can be chosen.
_ON_LOAD = """
const canvas = element.querySelector('canvas'), tip = element.querySelector('.map-tip');
const legend = element.querySelector('.map-legend'), ROUTE = '$ROUTE', EDGE = 14, REACH = 16, NAMED = 60;
let at = -1;
const data = () => (props.value && props.value.ids ? props.value : null);
const side = () => canvas.clientWidth;
const along = (share) => EDGE + share / 10000 * (side() - 2 * EDGE);
const spot = (map, i) => [along(map.x[i]), along(10000 - map.y[i])];
const colour = (map, i) => map.colours[map.codes[i] % map.colours.length];

function dot(pen, map, i, radius) {
  const [x, y] = spot(map, i);
  pen.beginPath();
  pen.arc(x, y, radius, 0, 2 * Math.PI);
}

function draw() {
  const map = data(), size = side();
  if (!size) return;
  const scale = window.devicePixelRatio || 1, pen = canvas.getContext('2d');
  canvas.width = canvas.height = Math.round(size * scale);
  pen.scale(scale, scale);
  if (!map) return;
  const radius = map.ids.length > 1500 ? 2.5 : 4;
  pen.fillStyle = 'rgba(128, 128, 128, .28)';
  map.ids.forEach((_, i) => { if (!map.shown[i]) { dot(pen, map, i, radius - 1); pen.fill(); } });
  pen.globalAlpha = .85;
  map.ids.forEach((_, i) => {
    if (!map.shown[i]) return;
    pen.fillStyle = colour(map, i);
    dot(pen, map, i, radius);
    pen.fill();
  });
  pen.globalAlpha = 1;
  pen.strokeStyle = getComputedStyle(canvas).color;
  pen.lineWidth = 2;
  for (const i of [map.selected, at]) if (i >= 0 && i < map.ids.length) { dot(pen, map, i, radius + 3); pen.stroke(); }
}

function list() {
  const map = data();
  legend.replaceChildren();
  if (!map) return;
  const counts = new Map();
  map.codes.forEach((code, i) => { if (map.shown[i]) counts.set(code, (counts.get(code) || 0) + 1); });
  const codes = [...counts.keys()].sort((one, other) => one - other);
  for (const code of codes.slice(0, NAMED)) {
    const item = document.createElement('li'), mark = document.createElement('span');
    mark.style.background = map.colours[code % map.colours.length];
    item.append(mark, `${map.names[code]} (${counts.get(code)})`);
    legend.append(item);
  }
  if (codes.length > NAMED) {
    const item = document.createElement('li');
    item.textContent = `and ${codes.length - NAMED} more`;
    legend.append(item);
  }
}

function point(i) {
  if (i === at) return;
  at = i;
  const map = data();
  tip.hidden = i < 0;
  if (i >= 0) {
    const [x, y] = spot(map, i), name = map.names[map.codes[i]];
    const query = new URLSearchParams({gallery: map.gallery, id: map.ids[i], side: '128'});
    tip.querySelector('img').src = `${ROUTE}?${query}`;
    tip.querySelector('span').textContent = `${name} · ${map.ids[i]}`;
    tip.style.left = `${Math.max(0, Math.min(x + 12, side() - 140))}px`;
    tip.style.top = y > side() / 2 ? 'auto' : `${y + 12}px`;
    tip.style.bottom = y > side() / 2 ? `${side() - y + 12}px` : 'auto';
  }
  draw();
}

function nearest(x, y, reach, allowed = () => true) {
  const map = data();
  let best = -1, least = reach * reach;
  if (map) map.ids.forEach((_, i) => {
    if (!map.shown[i] || !allowed(i)) return;
    const [left, top] = spot(map, i), distance = (left - x) ** 2 + (top - y) ** 2;
    if (distance <= least) { best = i; least = distance; }
  });
  return best;
}

const under = (event) => {
  const box = canvas.getBoundingClientRect();
  return nearest(event.clientX - box.left, event.clientY - box.top, REACH);
};
const open = (i) => { const map = data(); if (map && i >= 0) trigger('select', {index: i, value: map.ids[i]}); };
canvas.addEventListener('pointermove', (event) => point(under(event)));
canvas.addEventListener('pointerleave', () => point(-1));
canvas.addEventListener('click', (event) => open(under(event)));
canvas.addEventListener('keydown', (event) => {
  const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
  const map = data();
  if (!map || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); open(at); return; }
  if (event.key === 'Escape') { point(-1); return; }
  if (!way) return;
  event.preventDefault();
  event.stopPropagation();
  if (at < 0) { point(nearest(side() / 2, side() / 2, 2 * side())); return; }
  const [x, y] = spot(map, at);
  // In the direction of the key, up to 45 degrees to either side.
  const next = nearest(x, y, 2 * side(), (i) => {
    const [left, top] = spot(map, i), ahead = (left - x) * way[0] + (top - y) * way[1];
    return i !== at && ahead > .5 && ahead >= Math.abs((left - x) * way[1]) + Math.abs((top - y) * way[0]);
  });
  if (next >= 0) point(next);
});
canvas.addEventListener('blur', () => point(-1));
watch('value', () => { at = -1; tip.hidden = true; list(); draw(); });
new ResizeObserver(draw).observe(canvas);
list();
draw();
"""


def map_view() -> gr.HTML:
    """Make the component; the ``value`` of its event ``select`` is an untrusted ``sample_id``."""
    return gr.HTML(
        html_template=_TEMPLATE,
        css_template=_STYLE,
        js_on_load=_ON_LOAD.replace("$ROUTE", ROUTE),
        elem_id="explore-map",
        apply_default_css=False,
    )
