"""The tab Zero-shot: labels that somebody makes up, and how likely each is for an image."""

from __future__ import annotations

from typing import NamedTuple

import gradio as gr

from app.logic.classify import read_uploads
from app.logic.none_of_these import Backgrounds
from app.logic.zero_shot import HIGHEST, LOWEST, PROMPTS, ask, parse_labels, parse_templates, reading_notes
from app.state.context import AppContext
from app.widgets.answers import answers_view, connect_bars, seeing, zero_shot_html
from app.widgets.page import on_page_load, told
from app.widgets.uploads import Given, image_input, paths_of

_OWN = "My own"
_LABELS = "mug, bottle, backpack"


class _Question(NamedTuple):
    """What the tab asks for."""

    images: gr.components.Component
    labels: gr.Textbox
    run: gr.Dropdown
    templates: gr.Textbox
    temperature: gr.Slider


def build(context: AppContext) -> None:
    """Lays out the tab and connects it."""
    runs = [name for name, run in context.runs.items() if run.kind == "dual encoder"]
    if not runs:
        gr.Markdown("No dual encoder is served, and only these read labels. Start with `--run RUN` of one.")
        return
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            asked = _question(context, runs)
            button = gr.Button("Compare", variant="primary", elem_id="zero-shot-ask")
            seen = seeing("zero-shot-overlay")
        with gr.Column(scale=3, min_width=300):
            answers = answers_view("zero-shot-answers")
    _connect_answers(context, asked, button, [answers, seen.overlay])
    connect_bars(context, answers, asked.images, seen)

    @told
    def linked(request: gr.Request) -> tuple[str, str]:
        chosen, written = request.query_params.get("model", ""), request.query_params.get("labels", _LABELS)
        return chosen if chosen in runs else runs[0], written[: context.limits.text]

    on_page_load(linked, [asked.run, asked.labels])


def _question(context: AppContext, runs: list[str]) -> _Question:
    images = image_input(context, "zero-shot-images")
    labels = gr.Textbox(
        _LABELS,
        label="Labels, separated by commas or lines",
        lines=3,
        max_length=context.limits.text,
        elem_id="zero-shot-labels",
    )
    run = gr.Dropdown(runs, value=runs[0], label="Model", elem_id="zero-shot-model")
    prompt = gr.Dropdown([*PROMPTS, _OWN], value=next(iter(PROMPTS)), label="Prompt", elem_id="zero-shot-prompt")
    templates = gr.Textbox(
        "\n".join(next(iter(PROMPTS.values()))),
        label="Templates, one a line; several are an ensemble",
        lines=2,
        max_length=context.limits.text,
        elem_id="zero-shot-templates",
    )
    prompt.input(lambda name: "\n".join(PROMPTS[name]) if name in PROMPTS else gr.skip(), prompt, templates)
    templates.change(_prompt_of, templates, prompt)
    temperature = gr.Slider(
        LOWEST, HIGHEST, value=1.0, step=0.1, label="Temperature (1: as the model learned it; higher: less sure)"
    )
    return _Question(images, labels, run, templates, temperature)


def _connect_answers(context: AppContext, asked: _Question, button: gr.Button, outputs: list[gr.HTML]) -> None:
    backgrounds = Backgrounds(context)

    @told
    def answer(given: Given, written: str, chosen: object, sentences: str, heat: float) -> tuple[str, str]:
        wanted = parse_labels(written, context.limits)
        prompts = parse_templates(sentences, context.limits)
        served = context.run(chosen)
        uploads = read_uploads(paths_of(given), context.limits, [served])
        readable = [upload.inputs[served.name] for upload in uploads if upload.image is not None]
        found = ask(served, readable, wanted.names, prompts, temperature=heat, background=backgrounds.of(served))
        notes = [*wanted.notes, *reading_notes(served, wanted.names), *served.notes]
        return zero_shot_html(served.name, uploads, found, notes), ""

    # Of what is asked while an answer is on its way the last counts; by default it would be dropped.
    gr.on([button.click, asked.labels.submit], answer, list(asked), outputs, trigger_mode="always_last")


def _prompt_of(templates: str) -> str:
    """What the list of prompts calls these templates."""
    return next((name for name, lines in PROMPTS.items() if "\n".join(lines) == templates), _OWN)
