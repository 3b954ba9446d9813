"""The components of the tab Explore, without what they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from app.cards import card_grid
from app.class_bars import class_bars
from app.embedding_map import methods
from app.explore_views import GRID, VIEWS, Asked
from app.exploring import Explorer
from app.map_view import picture_map

_STYLE = """
.focus { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; margin: 0; align-items: flex-start; }
.focus img { flex: 1 1 18rem; width: 100%; max-width: 34rem; max-height: 70vh; min-height: 12rem; margin: 0;
  object-fit: contain; border-radius: 10px; background: var(--background-fill-secondary); }
.focus figcaption { flex: 1 1 16rem; }
.focus dl { display: grid; grid-template-columns: auto 1fr; gap: .35rem 1rem; margin: 0; }
.focus dt { color: var(--body-text-color-subdued); }
p { margin: .2rem 0; }
a { text-decoration: underline; margin-left: .6rem; white-space: nowrap; }
.focus dd { margin: 0; overflow-wrap: anywhere; }
.explore-panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem; }
.explore-panels figure { margin: 0; }
.explore-panels svg { display: block; width: 100%; height: 170px; }
.explore-panels figcaption { text-align: center; font-size: .9rem; }
.explore-strip { border-radius: 3px; }
.explore-legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; list-style: none; margin: .8rem 0 0; padding: 0; }
.explore-legend li { margin: 0; overflow-wrap: anywhere; }
.explore-dot { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 50%; }
.explore-note { color: var(--body-text-color-subdued); }
"""

_NARROW: dict[str, Any] = {"scale": 0, "min_width": 120}

ALL = ""
"""Value of a choice that leaves everything."""


@dataclass(frozen=True)
class Parts:
    """Components of the tab.

    Attributes:
        asked: those in which something is chosen, by field of ``Asked``.
        totals: how many pictures the filters leave.
        leafing: the row of the two buttons that follow, and of the choice of an order.
        back: previous.
        on: next.
        place: which page or picture this is.
        said: sentences above what is shown.
        grid: pictures, also mistakes.
        focus: a single picture.
        bars: classes.
        colours: densities.
        points: the map.
        page: number of the page, from 1.
        current: name of the picture that is open.
        wanted: changes when a figure that takes long is asked for.
    """

    asked: dict[str, Any]
    totals: gr.HTML
    leafing: gr.Row
    back: gr.Button
    on: gr.Button
    place: gr.HTML
    said: gr.HTML
    grid: gr.HTML
    focus: gr.HTML
    bars: gr.HTML
    colours: gr.HTML
    points: gr.HTML
    page: gr.State
    current: gr.State
    wanted: gr.State

    @property
    def inputs(self) -> list[Any]:
        """What handlers get: page, picture, and the fields of ``Asked`` in their order."""
        return [self.page, self.current, *self.asked.values()]

    @property
    def outputs(self) -> list[Any]:
        """What handlers may change."""
        own = [getattr(self, field.name) for field in fields(self) if field.name != "asked"]
        return [*own, *self.asked.values()]


def lay_out_tab(galleries: Sequence[str], explorer: Explorer) -> Parts:
    """Makes the components where the caller stands.

    Args:
        galleries: names of all.
        explorer: of the first.
    """
    asked = _filters(galleries, explorer)
    totals = _html("explore-totals")
    asked["view"] = gr.Radio(list(VIEWS), value=GRID, label="Show", elem_id="explore-view")
    task = explorer.main or None
    asked["task"] = gr.Radio(list(explorer.facets), value=task, label="By", visible=False, elem_id="explore-task")
    asked["method"] = gr.Radio(methods(), value=methods()[0], label="Projection", visible=False)
    asked["compared"] = gr.Dropdown(
        list(explorer.classes), value=[], multiselect=True, visible=False, elem_id="explore-compared",
        label="Values to compare (none: the most frequent ones)",
    )  # fmt: skip
    with gr.Row(visible=False, elem_id="explore-leafing") as leafing:
        back = gr.Button("← Previous", elem_id="explore-previous", elem_classes=["key-previous"], size="sm", **_NARROW)
        on = gr.Button("Next →", elem_id="explore-next", elem_classes=["key-next"], size="sm", **_NARROW)
        asked["shuffle"] = gr.Checkbox(False, label="Shuffle", elem_id="explore-shuffle", **_NARROW)
        asked["seed"] = gr.Number(
            0, label="Seed", precision=0, minimum=0, visible=False, elem_id="explore-seed", **_NARROW
        )
    place, said = _html("explore-place"), _html("explore-said")
    grid = card_grid(elem_id="explore-grid")
    focus, colours = _html("explore-focus", visible=False), _html("explore-colours", visible=False)
    order = {name: asked[name] for name in (field.name for field in fields(Asked))}
    return Parts(
        order, totals, leafing, back, on, place, said, grid, focus, class_bars(), colours, picture_map(),
        gr.State(1), gr.State(None), gr.State(None),
    )  # fmt: skip


def with_all(values: Sequence[str], what: str) -> list[tuple[str, str]]:
    """Choices of a list whose first leaves everything."""
    return [(f"all {what}", ALL), *((value, value) for value in values)]


def _filters(galleries: Sequence[str], explorer: Explorer) -> dict[str, Any]:
    with gr.Row():
        return {
            "gallery": gr.Dropdown(
                list(galleries), value=galleries[0], label="Gallery", min_width=150, elem_id="explore-gallery"
            ),
            "class_name": gr.Dropdown(
                with_all(explorer.classes, "classes"), value=ALL, label="Class", min_width=150, elem_id="explore-class"
            ),
            "split": gr.Dropdown(
                with_all(explorer.splits, "splits"), value=ALL, label="Split", min_width=150, elem_id="explore-split"
            ),
            "attributes": gr.Dropdown(
                explorer.attribute_options, value=[], multiselect=True, label="Attributes", min_width=200,
                visible=bool(explorer.attribute_options), elem_id="explore-attributes",
            ),
        }  # fmt: skip


def _html(name: str, **options: Any) -> gr.HTML:
    return gr.HTML("", css_template=_STYLE, js_on_load=None, elem_id=name, apply_default_css=False, **options)
