"""The tab Classify: images, one model or two side by side, and saliency maps."""

from __future__ import annotations

import gradio as gr

from app.logic.classify import classify
from app.state.context import AppContext
from app.widgets.page import Uploads, image_upload, on_page_load, paths_of, report_errors
from app.widgets.predictions import classified_html, connect_bars, predictions_view, saliency_view

_NONE = "none"
"""Choice of no second model."""


def build(context: AppContext) -> None:
    """Lay out the tab and connect it."""
    runs = [name for name, run in context.runs.items() if run.tasks]
    if not runs:
        gr.Markdown("No run with classes is served. Start with `--run RUN` of a classifier.")
        return
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            images = image_upload(context, "classify-images")
            first = gr.Dropdown(runs, value=runs[0], label="Model", elem_id="classify-model")
            second = gr.Dropdown([_NONE, *runs], value=_NONE, label="Compare with", elem_id="classify-second")
            button = gr.Button("Classify", variant="primary", elem_id="classify-button")
            saliency = saliency_view("classify-overlay")
        with gr.Column(scale=3, min_width=300):
            predictions = predictions_view("classify-predictions")

    @report_errors
    def predict(uploads: Uploads, one: object, other: object) -> tuple[str, str]:
        names = [one] if other == _NONE else [one, other]
        classified = classify(context, paths_of(uploads), names)
        notes = [f"{name}: {note}" for name in names for note in context.run(name).notes]
        return classified_html(classified, notes), ""

    @report_errors
    def update(uploads: Uploads, one: object, other: object) -> tuple[str, str]:
        # Emptied, or another model chosen before there is an image: nothing to complain about.
        return predict(uploads, one, other) if uploads else ("", "")

    @report_errors
    def open_link(request: gr.Request) -> tuple[str, str]:
        one, other = request.query_params.get("model", ""), request.query_params.get("beside", "")
        return one if one in runs else runs[0], other if other in runs else _NONE

    inputs, outputs = [images, first, second], [predictions, saliency.overlay]
    button.click(predict, inputs, outputs)
    gr.on([images.change, first.change, second.change], update, inputs, outputs)
    connect_bars(context, predictions, images, saliency)
    on_page_load(open_link, [first, second])
