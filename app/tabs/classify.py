"""The tab Classify: images, one model or two side by side, and saliency maps."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import gradio as gr

from app.logic.classify import classify, similar_images
from app.logic.explore import Explorer
from app.state.context import AppContext
from app.widgets.cards import Card, card_grid, cards_html
from app.widgets.examples import images_with_examples, linked_upload
from app.widgets.page import (
    Uploads,
    address_html,
    errors_in_place,
    on_page_load,
    paths_of,
    report_errors,
)
from app.widgets.predictions import classified_html, connect_bars, predictions_view, saliency_view

_NONE = "none"
"""Choice of no second model."""

_EMPTY = '<p class="cards-empty">Add an image of your own, or press an example: the predictions appear here.</p>'


def build(context: AppContext) -> None:
    """Lay out the tab and connect it."""
    served = [run for run in context.runs.values() if run.tasks]
    runs = [run.name for run in served]
    if not runs:
        gr.Markdown("No run with classes is served. Start with `--run RUN` of a classifier.")
        return
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            images, example = images_with_examples(context, served, "classify")
            several = len(runs) > 1
            first = gr.Dropdown(runs, value=runs[0], label="Model", elem_id="classify-model", visible=several)
            second = gr.Dropdown(
                [_NONE, *runs], value=_NONE, label="Compare with", elem_id="classify-second", visible=several
            )
            button = gr.Button("Classify", variant="primary", elem_id="classify-button")
            saliency = saliency_view("classify-overlay", served)
        with gr.Column(scale=3, min_width=300):
            predictions = predictions_view("classify-predictions", _EMPTY)
            title, similar = _similar_view()

    @errors_in_place
    def predict(uploads: Uploads, one: object, other: object) -> str:
        names = [one] if other == _NONE else [one, other]
        classified = classify(context, paths_of(uploads), names)
        notes = [f"{name}: {note}" for name in names for note in context.run(name).notes]
        chosen = {"tab": "classify", "model": one, **({} if other == _NONE else {"compare": other})}
        return classified_html(classified, notes) + address_html(f"?{urlencode(chosen)}", keeps_image=True)

    def update(uploads: Uploads, one: object, other: object) -> str:
        # Emptied, or another model chosen before there is an image: nothing to complain about.
        return predict(uploads, one, other) if uploads else _EMPTY

    @report_errors
    def explain(uploads: Uploads, one: object) -> tuple[str, str]:
        return _similar_html(context, uploads, one)

    def show_linked(uploads: Uploads, one: object, other: object) -> Any:
        return (predict(uploads, one, other), "") if uploads else (gr.skip(), gr.skip())

    @report_errors
    def open_link(request: gr.Request) -> tuple[str, str, Any]:
        query = request.query_params
        one, other = query.get("model", ""), query.get("compare", "") or query.get("beside", "")
        upload = linked_upload(context, request, "classify")
        return one if one in runs else runs[0], other if other in runs else _NONE, upload

    # A map of an earlier image would be wrong next to newer predictions.
    inputs, outputs = [images, first, second], [predictions, saliency.overlay]
    opened = on_page_load(open_link, [first, second, images])
    events = [
        button.click(lambda *given: (predict(*given), ""), inputs, outputs),
        gr.on([images.change, first.change, second.change], lambda *given: (update(*given), ""), inputs, outputs),
        *(event.then(show_linked, inputs, outputs) for event in (example, opened) if event is not None),
    ]
    for event in events:
        event.then(explain, [images, first], [title, similar], show_progress="hidden")
    connect_bars(context, predictions, images, saliency)


def _similar_view() -> tuple[gr.HTML, gr.HTML]:
    """Lay out a title and the most similar training images."""
    title = gr.HTML("", apply_default_css=False, js_on_load=None, elem_id="classify-similar-title")
    with gr.Column(elem_classes=["examples"]):
        similar = card_grid(label="Similar images", elem_id="classify-similar")
    return title, similar


def _similar_html(context: AppContext, uploads: Uploads, name: object) -> tuple[str, str]:
    """A title, and the training images that are the most similar to the first upload; nothing where there are none."""
    found = similar_images(context, paths_of(uploads)[0], name) if uploads else None
    if found is None:
        return "", ""
    explorer = Explorer(found.gallery)
    cards = []
    for sample_id, score in found.hits:
        value = explorer.value_of(explorer.row_of(sample_id), explorer.main) if explorer.main else sample_id
        cards.append(Card(found.gallery.name, sample_id, value, [f"similarity {score:.2f}"]))
    which = "training images" if found.of_training else "images of its gallery"
    return f"<h4>Why? The most similar {which} to the model</h4>", cards_html(cards, label="Similar images")
