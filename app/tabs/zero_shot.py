"""The tab Zero-shot: labels of the user's own, and how likely each is for an image."""

from __future__ import annotations

import json

import gradio as gr

from app.logic.none_of_these import Backgrounds
from app.logic.uploads import read_uploads
from app.logic.zero_shot import HIGHEST, LOWEST, PROMPTS, ask, parse_labels, parse_templates, reading_notes
from app.state.context import AppContext
from app.widgets.page import Uploads, image_upload, on_page_load, paths_of, report_errors
from app.widgets.predictions import connect_bars, predictions_view, saliency_view, zero_shot_html

_OWN = "My own"
_LABELS = "mug, bottle, backpack"


def build(context: AppContext) -> None:
    """Lay out the tab and connect it."""
    runs = [name for name, run in context.runs.items() if run.kind == "dual encoder"]
    if not runs:
        gr.Markdown("No dual encoder is served, and only these have a text encoder. Start with `--run RUN` of one.")
        return
    longest = context.limits.text
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            images = image_upload(context, "zero-shot-images")
            labels = gr.Textbox(
                _LABELS, lines=3, max_length=longest, elem_id="zero-shot-labels",
                label="Labels, separated by commas or lines",
            )  # fmt: skip
            model = gr.Dropdown(runs, value=runs[0], label="Model", elem_id="zero-shot-model")
            prompt = gr.Dropdown(
                [*PROMPTS, _OWN], value=next(iter(PROMPTS)), label="Prompt", elem_id="zero-shot-prompt"
            )
            templates = gr.Textbox(
                "\n".join(next(iter(PROMPTS.values()))), lines=2, max_length=longest, elem_id="zero-shot-templates",
                label="Templates, one a line; several are an ensemble",
            )  # fmt: skip
            temperature = gr.Slider(
                LOWEST, HIGHEST, value=1.0, step=0.1, label="Temperature (1: as trained; higher: less confident)"
            )
            button = gr.Button("Compare", variant="primary", elem_id="zero-shot-button")
            saliency = saliency_view("zero-shot-overlay")
        with gr.Column(scale=3, min_width=300):
            predictions = predictions_view("zero-shot-predictions")
    backgrounds = Backgrounds(context)

    @report_errors
    def predict(uploads: Uploads, label_text: str, name: object, template_text: str, heat: float) -> tuple[str, str]:
        wanted = parse_labels(label_text, context.limits)
        prompts = parse_templates(template_text, context.limits)
        run = context.run(name)
        files = read_uploads(paths_of(uploads), context.limits, [run])
        readable = [file.inputs[run.name] for file in files if file.image is not None]
        background = backgrounds.of(run)
        found = ask(run, readable, wanted.names, prompts, temperature=heat, background=background) if readable else []
        notes = [*wanted.notes, *reading_notes(run, wanted.names), *run.notes]
        return zero_shot_html(run.name, files, found, notes), ""

    @report_errors
    def open_link(request: gr.Request) -> tuple[str, str]:
        chosen, written = request.query_params.get("model", ""), request.query_params.get("labels", _LABELS)
        return chosen if chosen in runs else runs[0], written[:longest]

    _connect_templates(prompt, templates)
    # The last of several requests counts; by default, those that come while one is being answered would be dropped.
    inputs, outputs = [images, labels, model, templates, temperature], [predictions, saliency.overlay]
    gr.on([button.click, labels.submit], predict, inputs, outputs, trigger_mode="always_last")
    connect_bars(context, predictions, images, saliency)
    on_page_load(open_link, [model, labels])


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
