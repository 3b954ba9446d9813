"""The tab Zero-shot: labels of the user's own, and how likely each is for an image."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from app.logic.none_of_these import Others
from app.logic.uploads import read_uploads
from app.logic.zero_shot import HIGHEST, LOWEST, PROMPTS, ask, parse_labels, parse_templates, reading_notes
from app.state.context import AppContext
from app.widgets.examples import images_with_examples, linked_upload
from app.widgets.page import (
    Uploads,
    address_html,
    errors_in_place,
    on_page_load,
    paths_of,
    report_errors,
)
from app.widgets.predictions import connect_bars, predictions_view, saliency_view, zero_shot_html

_OWN = "My own"
_LABELS = "mug, bottle, backpack"
_EMPTY = (
    '<p class="cards-empty">Add an image of your own, or press an example: how well each label fits appears here.</p>'
)


def build(context: AppContext) -> None:
    """Lay out the tab and connect it."""
    served = [run for run in context.runs.values() if run.kind == "dual encoder"]
    runs = [run.name for run in served]
    if not runs:
        gr.Markdown("No dual encoder is served, and only these have a text encoder. Start with `--run RUN` of one.")
        return
    longest = context.limits.text
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            images, example = images_with_examples(context, served, "zero-shot")
            labels = gr.Textbox(
                _LABELS, lines=3, max_length=longest, elem_id="zero-shot-labels",
                label="Labels, separated by commas or lines",
            )  # fmt: skip
            model = gr.Dropdown(runs, value=runs[0], label="Model", elem_id="zero-shot-model", visible=len(runs) > 1)
            button = gr.Button("Compare", variant="primary", elem_id="zero-shot-button")
            prompt, templates, temperature = _prompt_options(longest)
            saliency = saliency_view("zero-shot-overlay", served)
        with gr.Column(scale=3, min_width=300):
            predictions = predictions_view("zero-shot-predictions", _EMPTY)
    others = Others()

    @errors_in_place
    def predict(uploads: Uploads, label_text: str, name: object, template_text: str, heat: float) -> str:
        wanted = parse_labels(label_text, context.limits)
        prompts = parse_templates(template_text, context.limits)
        run = context.run(name)
        files = read_uploads(paths_of(uploads), context.limits, [run])
        readable = [file.inputs[run.name] for file in files if file.image is not None]
        found = ask(run, readable, wanted.names, prompts, temperature=heat, others=others) if readable else []
        notes = [*wanted.notes, *reading_notes(run, wanted.names), *run.notes]
        shown = {"tab": "zero-shot", "model": run.name, "labels": label_text}
        return zero_shot_html(run.name, files, found, notes) + address_html(f"?{urlencode(shown)}", keeps_image=True)

    def update(uploads: Uploads, label_text: str, name: object, template_text: str, heat: float) -> str:
        return predict(uploads, label_text, name, template_text, heat) if uploads else _EMPTY

    def show_linked(uploads: Uploads, label_text: str, name: object, template_text: str, heat: float) -> Any:
        return (predict(uploads, label_text, name, template_text, heat), "") if uploads else (gr.skip(), gr.skip())

    @report_errors
    def open_link(request: gr.Request) -> tuple[str, str, Any]:
        chosen, written = request.query_params.get("model", ""), request.query_params.get("labels", _LABELS)
        upload = linked_upload(context, request, "zero-shot")
        return chosen if chosen in runs else runs[0], written[:longest], upload

    _connect_templates(prompt, templates)
    # The last of several requests counts; by default, those that come while one is being answered would be dropped.
    inputs = [images, labels, model, templates, temperature]
    # A map of an earlier image or label would be wrong next to newer predictions.
    outputs: list[Any] = [predictions, saliency.overlay]
    last: dict[str, Any] = {"trigger_mode": "always_last"}
    opened = on_page_load(open_link, [model, labels, images])
    gr.on([button.click, labels.submit], lambda *given: (predict(*given), ""), inputs, outputs, **last)
    images.change(lambda *given: (update(*given), ""), inputs, outputs, **last)
    for event in (example, opened):
        if event is not None:
            event.then(show_linked, inputs, outputs)
    connect_bars(context, predictions, images, saliency)


def _prompt_options(longest: int) -> tuple[gr.Dropdown, gr.Textbox, gr.Slider]:
    """Lay out what most people leave as it is."""
    with gr.Accordion("Prompt and temperature", open=False, elem_id="zero-shot-options"):
        prompt = gr.Dropdown([*PROMPTS, _OWN], value=next(iter(PROMPTS)), label="Prompt", elem_id="zero-shot-prompt")
        templates = gr.Textbox(
            "\n".join(next(iter(PROMPTS.values()))), lines=2, max_length=longest,
            elem_id="zero-shot-templates", label="Templates, one a line; several are an ensemble",
        )  # fmt: skip
        temperature = gr.Slider(
            LOWEST, HIGHEST, value=1.0, step=0.1, label="Temperature (1: as trained; higher: less confident)"
        )
    return prompt, templates, temperature


def _connect_templates(prompt: gr.Dropdown, templates: gr.Textbox) -> None:
    """Let a chosen prompt fill in its templates, and templates that are typed name their prompt."""
    # On the page alone: an answer of the server to the choice could arrive after what is typed next.
    texts = json.dumps({name: "\n".join(lines) for name, lines in PROMPTS.items()})
    prompt.input(None, [prompt, templates], templates, js=f"(name, text) => ({texts})[name] ?? text")
    templates.change(
        None,
        templates,
        prompt,
        js=f"(text) => (Object.entries({texts}).find(([, lines]) => lines === text) ?? [{json.dumps(_OWN)}])[0]",
    )
