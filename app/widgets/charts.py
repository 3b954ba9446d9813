"""Charts of the dataset browser: bars of classes, their colors, and the map of embeddings.

The map's points open their image by mouse, finger and keyboard. Texts are only ever set as text.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import gradio as gr
import numpy as np
from numpy.typing import NDArray

from app.logic.explore import Explorer, Filter
from app.state.context import SingleFlightCache, shortened
from app.state.galleries import NOT_KNOWN
from app.widgets.page import ROUTE
from datamodules.loading.decode import read_image
from evaluation.dataset.figures import SPLIT_COLOURS
from evaluation.dataset.projections import Projection, project
from evaluation.dataset.sections import COLOURLESS, IMAGES_OF_CLASS, SHOWN_CLASSES, class_densities
from vitrail.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from app.state.galleries import ServedGallery
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
        css_template=Path(__file__).with_name("embedding_map.css").read_text(encoding="utf-8"),
        js_on_load=f"const ROUTE = '{ROUTE}';\n"
        + Path(__file__).with_name("embedding_map.js").read_text(encoding="utf-8"),
        elem_id="explore-map",
        apply_default_css=False,
    )


_OTHER = "#7d8590"

_ON_LOAD = """
element.addEventListener('click', (event) => {
  const bar = event.target.closest('button.bar');
  if (bar) trigger('select', {index: Number(bar.dataset.place), value: bar.dataset.value});
});
"""

_STYLE = """
.bars { list-style: none; margin: 0; padding: 0; max-height: 70vh; overflow-y: auto; }
.bars li { margin: 0; }
.bar { display: grid; grid-template-columns: minmax(6rem, 32%) 1fr 3.6rem; gap: .6rem; align-items: center;
  width: 100%; padding: .25rem .35rem; border: 0; border-radius: 6px; background: none; color: inherit; font: inherit;
  text-align: left; cursor: pointer; }
.bar:hover, .bar:focus-visible { background: var(--background-fill-secondary); }
.bar:focus-visible { outline: 2px solid var(--color-accent); outline-offset: -2px; }
.bar-name { overflow-wrap: anywhere; }
.bar-track { display: flex; height: .9rem; }
.bar-track span { display: block; height: 100%; }
.bar-count { text-align: right; font-variant-numeric: tabular-nums; }
.bars-key { display: flex; flex-wrap: wrap; gap: .3rem 1rem; list-style: none; margin: 0 0 .6rem; padding: 0; }
.bars-key span { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
.bars-note { color: var(--body-text-color-subdued); margin: .5rem 0 0; }
"""


def class_bars() -> gr.HTML:
    """Make the component; the ``value`` of its event ``select`` is an untrusted class."""
    return gr.HTML(
        js_on_load=_ON_LOAD,
        css_template=_STYLE,
        elem_id="explore-classes",
        elem_classes=["class-bars"],
        apply_default_css=False,
    )


def bars_html(counts: pd.DataFrame, task: str) -> str:
    """Show the values of a task as bars, longest first.

    Args:
        counts: int64, a row for each value and a column for each split.
        task: the name of the task.
    """
    totals = counts.sum(axis=1).sort_values(ascending=False, kind="stable")
    seen, absent = totals[totals > 0], int((totals == 0).sum())
    if seen.empty:
        return '<p class="bars-note" role="status">No image is left by the filters.</p>'
    key = "".join(
        f'<li><span style="background: {_split_colour(split)}"></span>{escape(str(split))}</li>'
        for split in counts.columns
    )
    bars = "".join(
        f"<li>{_bar(place, str(name), counts.loc[name], int(seen.iloc[0]))}</li>"
        for place, name in enumerate(seen.index)
    )
    known = seen.drop(NOT_KNOWN, errors="ignore")
    if known.empty:
        note = f"No value of {task} is known of these images."
    else:
        # Not "all": a class that no image of the gallery has is not among the values.
        of = f" of {len(counts.drop(NOT_KNOWN, errors='ignore')):,}" if absent else ""
        share = known.iloc[0] / seen.sum()
        note = (
            f"{len(known):,}{of} values of {task} occur; the most frequent, {known.index[0]}, is {share:.1%} of these "
            "images. Choose one to see its images."
        )
    return f'<ul class="bars-key">{key}</ul><ul class="bars">{bars}</ul><p class="bars-note">{escape(note)}</p>'


def _bar(place: int, name: str, counts: pd.Series[int], longest: int) -> str:
    parts = "".join(
        f'<span style="width: {100 * count / longest:.2f}%; background: {_split_colour(split)}"></span>'
        for split, count in counts.items()
        if count
    )
    by_split = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    return (
        f'<button type="button" class="bar" data-place="{place}" data-value="{escape(name)}" '
        f'title="{escape(f"{name}: {by_split}")}"><span class="bar-name">{escape(name)}</span>'
        f'<span class="bar-track">{parts}</span><span class="bar-count">{counts.sum():,}</span></button>'
    )


def _split_colour(split: object) -> str:
    return SPLIT_COLOURS.get(str(split), _OTHER)


MOST_CLASSES = 12
"""Classes in one figure; more curves cannot be distinguished."""

PANELS = ("hue", "saturation", "value")

_WIDTH, _HEIGHT, _STRIP = 320, 170, 10
_GRADIENTS = {
    "hue": "linear-gradient(90deg, red, yellow, lime, cyan, blue, magenta, red)",
    "saturation": "linear-gradient(90deg, #999, #f33)",
    "value": "linear-gradient(90deg, #000, #fff)",
}

Progress = Callable[[Iterable[str]], Iterable[str]]
"""Passes classes on and shows progress."""


class _Densities(NamedTuple):
    """float64 ``(3, LEVELS)`` of the images that can be read, None where there are none; and how many cannot."""

    values: NDArray[np.float64] | None
    unreadable: int


class ClassColours:
    """Colour densities of the classes of a gallery, kept once they are computed."""

    def __init__(self, gallery: ServedGallery, explorer: Explorer) -> None:
        self._gallery = gallery
        self._explorer = explorer
        self._kept: SingleFlightCache[_Densities] = SingleFlightCache(512)

    def default_classes(self, chosen: Filter, task: str) -> list[str]:
        """Return the most frequent values among the images that the filter leaves, in their order."""
        counts = self._explorer.counts(self._explorer.find(chosen), task).sum(axis=1)
        frequent = counts.sort_values(ascending=False, kind="stable").head(SHOWN_CLASSES)
        return [str(name) for name in frequent.index[frequent > 0]]

    def densities(
        self, chosen: Filter, task: str, names: Sequence[str], progress: Progress = iter, *, seed: int = 0
    ) -> tuple[dict[str, NDArray[np.float64]], list[str]]:
        """Return densities of some classes' images among those that the filter leaves.

        Args:
            chosen: the filter.
            task: whose values are meant.
            names: of the values.
            progress: shows progress.
            seed: of the sample of images and pixels.

        Returns:
            By name float64 ``(3, LEVELS)``, see ``evaluation.dataset.sections.density``; and sentences about
            classes and images that are missing.

        Raises:
            UserError: the task has no such value, or there are too many.
        """
        facet = self._explorer.facets[task]
        if strange := [name for name in names if name not in facet.values]:
            raise UserError(f"{task}: has no value {shortened(repr(strange[0]))}; choose one of the list")
        if len(names) > MOST_CLASSES:
            raise UserError(f"{len(names)} classes: at most {MOST_CLASSES} can be distinguished; choose fewer")
        rows = self._explorer.find(chosen)
        curves: dict[str, NDArray[np.float64]] = {}
        missing: list[str] = []
        for name in progress(names):
            own = rows[facet.having([name])[rows]]
            if not len(own):
                missing.append(f"{name}: no image is left by the filters.")
                continue
            found = self._kept.get((chosen, task, name, seed), functools.partial(self._of, own, seed))
            if found.unreadable:
                missing.append(f"{name}: {found.unreadable} of its images cannot be read.")
            if found.values is not None:
                curves[name] = found.values
        return curves, missing

    def _of(self, rows: NDArray[np.int64], seed: int) -> _Densities:
        rng = np.random.default_rng(seed)
        sample = rows if len(rows) <= IMAGES_OF_CLASS else np.sort(rng.choice(rows, IMAGES_OF_CLASS, replace=False))
        unreadable: list[str] = []
        images = self._read([self._explorer.ids[row] for row in sample.tolist()], unreadable)
        # One after the other: sixty photos of a camera would fill the memory.
        first = next(images, None)
        values = None if first is None else class_densities(itertools.chain([first], images), rng)
        return _Densities(values, len(unreadable))

    def _read(self, sample_ids: Sequence[str], unreadable: list[str]) -> Iterator[NDArray[np.uint8]]:
        """Those images that can be read, uint8 ``(H, W, 3)`` each; names of the others are added to a list."""
        unread = set(sample_ids)
        for sample_id, source in self._sources(sample_ids):
            try:
                pixels = read_image(source, sample_id, self._gallery.value_range)
            except UserError:
                continue
            unread.discard(sample_id)
            yield np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
        unreadable += sorted(unread)

    def _sources(self, sample_ids: Sequence[str]) -> Iterator[tuple[str, Path | bytes]]:
        """Files, and thumbnails of images without one; those at once, since each look-up takes long."""
        without = []
        for sample_id in sample_ids:
            try:
                yield sample_id, self._gallery.image_path(sample_id)
            except UserError:
                without.append(sample_id)
        kept = self._gallery.gallery.rows(without, ["thumbnail"]).column("thumbnail").to_pylist() if without else []
        yield from ((name, content) for name, content in zip(without, kept, strict=True) if content is not None)


def colour_figure(curves: Mapping[str, NDArray[np.float64]], task: str) -> str:
    """Show the three panels, side by side on a wide page and below one another on a narrow one.

    Args:
        curves: by name of the class float64 ``(3, LEVELS)``.
        task: the name of the task.
    """
    legend = "".join(
        f'<li><span class="explore-dot" style="background: {_colour(number)}"></span>{escape(name)}</li>'
        for number, name in enumerate(curves)
    )
    panels = "".join(_panel(place, name, curves, task) for place, name in enumerate(PANELS))
    note = (
        f"Up to {IMAGES_OF_CLASS} images of each class; pixels with a saturation up to {COLOURLESS:g} have no hue. "
        "Where curves differ, colour alone distinguishes classes."
    )
    return (
        f'<div class="explore-panels">{panels}</div><ul class="explore-legend">{legend}</ul>'
        f'<p class="explore-note">{escape(note)}</p>'
    )


def _panel(place: int, name: str, curves: Mapping[str, NDArray[np.float64]], task: str) -> str:
    highest = max((float(values[place].max()) for values in curves.values()), default=1.0) or 1.0
    lines = "".join(
        f'<polyline points="{_points(values[place], highest)}" fill="none" stroke="{_colour(number)}" '
        f'stroke-width="2" vector-effect="non-scaling-stroke"><title>{escape(label)}</title></polyline>'
        for number, (label, values) in enumerate(curves.items())
    )
    described = escape(f"Density of {name} by {task}: {', '.join(curves)}")
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{described}" '
        f'preserveAspectRatio="none">{lines}</svg>'
        f'<div class="explore-strip" style="height: {_STRIP}px; background: {_GRADIENTS[name]}"></div>'
        f"<figcaption>{name}</figcaption></figure>"
    )


def _points(values: NDArray[np.float64], highest: float) -> str:
    """Corners of a curve; every second level is finer than the panel's pixels."""
    levels = (np.arange(len(values)) + 0.5) / len(values) * _WIDTH
    heights = _HEIGHT - 2 - values / highest * (_HEIGHT - 8)
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(levels[::2], heights[::2], strict=True))


def _colour(number: int) -> str:
    return PALETTE[number % len(PALETTE)]
