"""Components of the tab Search, and where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.cards import card_grid
from app.context import AppContext
from app.picture_input import picture_input
from app.search_views import STYLE
from app.searching import RANKERS
from app.served_gallery import ServedGallery

ANY_RANKER = "automatic"
"""Choice of the ranker that suits gallery and query."""


@dataclass(frozen=True)
class Parts:
    """Components. What a search depends on besides the query stands in ``options``, filters last."""

    text: gr.Textbox
    ask: gr.Button
    pictures: gr.Gallery
    gallery: gr.Dropdown
    ranker: gr.Radio
    words: gr.Dropdown
    count: gr.Slider
    filters: dict[str, gr.Dropdown]
    said: gr.HTML
    grid: gr.HTML
    leafing: gr.Row
    back: gr.Button
    on: gr.Button
    details: gr.Column
    picture: gr.HTML
    more_like: gr.Button
    close: gr.Button
    last: gr.State
    opened: gr.State

    @property
    def options(self) -> list[Any]:
        """What every search gets."""
        return [self.gallery, self.ranker, self.words, self.count, *self.filters.values()]

    @property
    def shown(self) -> list[Any]:
        """What a search changes."""
        found = [self.said, self.grid, self.leafing, self.back, self.on, self.details, self.picture]
        return [*found, self.last, self.opened]


def lay_out(context: AppContext, words: list[tuple[str, str]]) -> Parts:
    """Makes the components where the caller stands.

    Args:
        context: what is served, with a gallery at least.
        words: what can be searched in by words in the first gallery: what people call it, and its name.
    """
    galleries, limits = context.galleries, context.limits
    first = next(iter(galleries.values()))
    names = list(dict.fromkeys(name for gallery in galleries.values() for name in gallery.choices))
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            text = gr.Textbox(
                label="Look for", placeholder=_example(first), max_length=limits.text, elem_id="search-text"
            )
            ask = gr.Button("Search", variant="primary", elem_id="search-ask")
            with gr.Accordion("By a picture", open=False, elem_id="search-by-picture"):
                pictures = picture_input(context, "search-picture")
            gallery = gr.Dropdown(
                list(galleries),
                value=first.name,
                label="Gallery (and the model that made it)",
                elem_id="search-gallery",
            )
            rankers = [(ANY_RANKER, ANY_RANKER), *((label, name) for name, label in RANKERS.items())]
            ranker = gr.Radio(rankers, value=ANY_RANKER, label="Ranked by", elem_id="search-ranker")
            chosen = words[0][1] if words else None
            said_in = gr.Dropdown(words, value=chosen, label="Words are", visible=len(words) > 1)
            count = gr.Slider(1, limits.results, value=limits.results, step=1, label="Results on a page")
            with gr.Accordion("Only pictures that are", open=False, elem_id="search-filters"):
                filters = {name: _filter(name, first.choices.get(name, [])) for name in names}
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML("", css_template=STYLE, js_on_load=None, elem_id="search-said", apply_default_css=False)
            with gr.Column(visible=False, elem_id="search-details") as details:
                picture = gr.HTML("", css_template=STYLE, js_on_load=None, apply_default_css=False)
                with gr.Row():
                    more_like = gr.Button("More like this", variant="primary", elem_id="search-more-like")
                    close = gr.Button("Close", elem_id="search-close")
            grid = card_grid(elem_id="search-grid", label="Results, best first")
            with gr.Row(visible=False) as leafing:
                back = gr.Button("Previous page", elem_id="search-back")
                on = gr.Button("Next page", elem_id="search-on")
    return Parts(
        text, ask, pictures, gallery, ranker, said_in, count, filters, said, grid, leafing, back, on, details,
        picture, more_like, close, gr.State(None), gr.State(""),
    )  # fmt: skip


def _filter(name: str, choices: list[str]) -> gr.Dropdown:
    return gr.Dropdown(
        choices, value=[], multiselect=True, label=name, visible=bool(choices), elem_id=f"search-only-{name}"
    )


def _example(gallery: ServedGallery) -> str:
    """A query that finds something, made of what is said of the gallery's first picture."""
    for column in ("caption", "text"):
        for said in gallery.metadata.column(column).slice(0, 1).to_pylist():
            if said:
                return f"for example: {said.replace('_', ' ')}"
    return "what to look for, in words"
