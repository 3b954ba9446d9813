"""The tab Classify: images, one model or two side by side, and where they see what they say."""

from __future__ import annotations

import gradio as gr

from app.logic.classify import classify, sorting_runs
from app.state.context import AppContext
from app.widgets.answers import answers_view, classified_html, connect_bars, seeing
from app.widgets.page import on_page_load, told
from app.widgets.uploads import Given, image_input, paths_of

_NOBODY = "none"
"""Choice of no second model."""


def build(context: AppContext) -> None:
    """Lays out the tab and connects it."""
    runs = sorting_runs(context)
    if not runs:
        gr.Markdown("No run that knows classes is served. Start with `--run RUN` of a classifier.")
        return
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            images = image_input(context, "classify-images")
            first = gr.Dropdown(runs, value=runs[0], label="Model", elem_id="classify-model")
            second = gr.Dropdown([_NOBODY, *runs], value=_NOBODY, label="Beside it", elem_id="classify-beside")
            ask = gr.Button("Classify", variant="primary", elem_id="classify-ask")
            seen = seeing("classify-overlay")
        with gr.Column(scale=3, min_width=300):
            answers = answers_view("classify-answers")

    @told
    def answer(given: Given, one: object, other: object) -> tuple[str, str]:
        names = [one] if other == _NOBODY else [one, other]
        classified = classify(context, paths_of(given), names)
        notes = [f"{name}: {note}" for name in names for note in context.run(name).notes]
        return classified_html(classified, notes), ""

    @told
    def again(given: Given, one: object, other: object) -> tuple[str, str]:
        # Emptied, or another model chosen before there is an image: nothing to complain about.
        return answer(given, one, other) if given else ("", "")

    @told
    def linked(request: gr.Request) -> tuple[str, str]:
        asked = request.query_params
        one, other = asked.get("model", ""), asked.get("beside", "")
        return one if one in runs else runs[0], other if other in runs else _NOBODY

    asked = [images, first, second]
    ask.click(answer, asked, [answers, seen.overlay])
    gr.on([images.change, first.change, second.change], again, asked, [answers, seen.overlay])
    connect_bars(context, answers, images, seen)
    on_page_load(linked, [first, second])
