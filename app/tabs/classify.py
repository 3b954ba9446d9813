"""The tabs Classify and Zero-shot: images, models, predictions as bars, and saliency maps.

Everything that comes from files, runs and users is escaped. Images are inside the page, so that nothing has to be
kept on the server for them.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.logic.classify import METHODS, Classified, Saliency, classify, saliency_of, similar_images
from app.logic.explore import Explorer
from app.logic.uploads import Upload, read_uploads
from app.logic.zero_shot import (
    HIGHEST,
    LOWEST,
    PROMPTS,
    Others,
    ZeroShot,
    ask,
    parse_labels,
    parse_templates,
    reading_notes,
)
from app.state.context import AppContext
from app.state.runs import ServedRun
from app.widgets.page import (
    Card,
    Uploads,
    address_html,
    card_grid,
    cards_html,
    errors_in_place,
    images_with_examples,
    linked_upload,
    on_page_load,
    paths_of,
    report_errors,
)
from evaluation.tables.per_class import NO_PREDICTION
from vitrail.errors import UserError
from vitrail.predictions import TaskPrediction

THUMBNAIL = 320
"""Longest side in pixels of an image next to its predictions."""

SHOWN = 5
"""Classes of a task that are shown at once; the others can be unfolded."""

_CSS = (Path(__file__).parents[1] / "static" / "predictions.css").read_text(encoding="utf-8")

# What bars report of themselves is not trusted on the server.
_ON_LOAD = """
element.addEventListener('click', (event) => {
  const bar = event.target.closest('button.bar');
  if (bar) trigger('select', {index: Number(bar.dataset.place),
                              value: [bar.dataset.run, bar.dataset.task, bar.dataset.label]});
});
"""

# The bar that was pressed may be far away from the overlay, on a phone below it.
_SHOW = "watch('value', () => { if (props.value) element.scrollIntoView({block: 'nearest'}); });"


_UNKNOWN = (
    '<p class="verdict verdict-none" role="status">Unknown: unlike the images that this model was trained on. What '
    "follows is only what it comes closest to.</p>"
)


class Pressed(NamedTuple):
    """A pressed bar: place of its image among the uploads, name of its run, its task (empty for a text), its label."""

    place: int
    run: str
    task: str
    label: str


class _Bar(NamedTuple):
    """A bar, and what it stands for.

    Attributes:
        threshold: from which the label is predicted, where it has one.
        is_predicted: whether it is emphasised.
    """

    pressed: Pressed
    name: str
    probability: float
    note: str = ""
    threshold: float | None = None
    is_predicted: bool = False


class SaliencyView(NamedTuple):
    """The choice of a method, one of ``METHODS``, and the image with the map."""

    method: gr.Radio
    overlay: gr.HTML


def predictions_view(elem_id: str, empty: str = "") -> gr.HTML:
    """Make the component for predictions; its event ``select`` reports which bar was pressed (``pressed_bar``)."""
    return gr.HTML(empty, elem_id=elem_id, js_on_load=_ON_LOAD, css_template=_CSS, apply_default_css=False)


def saliency_view(elem_id: str, runs: Sequence[ServedRun]) -> SaliencyView:
    """Make the components for saliency maps; a method that goes with none of the runs' networks is not offered."""
    offered = [name for name, method in METHODS.items() if any(method in run.methods for run in runs)]
    method = gr.Radio(
        offered, value=next(iter(offered), None), label="Press a bar to see where the model looks",
        visible=len(offered) > 1,
    )  # fmt: skip
    return SaliencyView(
        method, gr.HTML("", elem_id=elem_id, js_on_load=_SHOW, css_template=_CSS, apply_default_css=False)
    )


def connect_bars(
    context: AppContext, predictions: gr.HTML, images: gr.components.Component, view: SaliencyView
) -> None:
    """Make a pressed bar show where the model attends to for its class or text."""

    @errors_in_place
    def show(uploads: Uploads, method: str, event: gr.SelectData) -> str:
        paths = paths_of(uploads)
        pressed = pressed_bar(event, len(paths))
        run = context.run(pressed.run)
        [upload] = read_uploads([paths[pressed.place]], context.limits, [run])
        return saliency_html(saliency_of(run, upload, pressed.task, pressed.label, method), upload.name)

    predictions.select(show, [images, view.method], view.overlay)


def pressed_bar(event: gr.SelectData, images: int) -> Pressed:
    """Return what was pressed, as the browser reports it.

    Args:
        event: untrusted.
        images: number of uploads.

    Raises:
        UserError: there can be no such bar.
    """
    place, value = event.index, event.value
    is_place = isinstance(place, int) and not isinstance(place, bool) and 0 <= place < images
    if not is_place or not isinstance(value, list) or [type(part) for part in value] != [str] * 3:
        raise UserError("the image that was pressed is not there any more; ask again")
    return Pressed(place, *value)


def classified_html(classified: Sequence[Classified], notes: Sequence[str] = ()) -> str:
    """Show what one or two runs predict for images, and notes on the runs, one line each.

    A single model is not named again above each of its predictions.
    """
    names = {name for one in classified for name in one.predictions}
    articles = []
    for place, one in enumerate(classified):
        models = "".join(
            f"<section>{f'<h3>{escape(name)}</h3>' if len(names) > 1 else ''}"
            + (_UNKNOWN if prediction.unknown else "")
            + "".join(_task(place, name, task, found) for task, found in prediction.tasks.items())
            + "</section>"
            for name, prediction in one.predictions.items()
        )
        articles.append(_article(one.upload, models))
    return notes_html(notes) + "".join(articles)


def zero_shot_html(run: str, uploads: Sequence[Upload], found: Sequence[ZeroShot], notes: Sequence[str]) -> str:
    """Show what a dual encoder predicts for the readable of some uploads, and notes, one line each."""
    articles, rest = [], iter(found)
    for place, upload in enumerate(uploads):
        models = "" if upload.image is None else _labels(place, run, next(rest))
        articles.append(_article(upload, models))
    return notes_html(notes) + "".join(articles)


def saliency_html(saliency: Saliency, name: str) -> str:
    """Show a model's input, and the same with the map over it; ``name`` is that of the image."""
    panels = (("the model's input", saliency.image), ("where it attends to", saliency.overlay))
    figures = "".join(
        f'<figure><img src="{data_address(pixels, THUMBNAIL)}" alt="{escape(f"{name}, {title}")}">'
        f"<figcaption>{title}</figcaption></figure>"
        for title, pixels in panels
    )
    caption = f"<p>{escape(saliency.caption)}</p>"
    return f'<div class="prediction" role="status"><div class="overlays">{figures}</div>{caption}</div>'


def notes_html(notes: Sequence[str]) -> str:
    """Show notes, each once."""
    lines = "".join(f"<li>{escape(note)}</li>" for note in dict.fromkeys(notes))
    return f'<div role="status"><ul class="notes">{lines}</ul></div>' if lines else ""


def data_address(pixels: NDArray[np.uint8] | Image.Image, side: int) -> str:
    """Return an address that contains the image.

    Args:
        pixels: uint8 ``(H, W, 3)``, or an RGB image.
        side: what its longest side is scaled to, in pixels; a small image grows by whole factors.
    """
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    factor = side / max(image.size)
    if factor < 1 or factor >= 2:
        factor = factor if factor < 1 else int(factor)
        width, height = (max(1, round(length * factor)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _article(upload: Upload, models: str) -> str:
    name = escape(upload.name)
    if upload.image is None:
        return f'<article class="prediction"><p class="problem" role="alert">{escape(upload.problem)}</p></article>'
    image = f'<img src="{data_address(upload.image, THUMBNAIL)}" alt="{name}"><figcaption>{name}</figcaption>'
    return (
        f'<article class="prediction"><figure class="prediction-image">{image}</figure>'
        f'<div class="prediction-models">{models}</div></article>'
    )


def _task(place: int, run: str, task: str, found: TaskPrediction) -> str:
    if found.kind == "regression":
        return _number(place, run, task, found)
    if found.kind == "multi_label":
        return _several(place, run, task, found)
    is_ordinal = found.kind == "ordinal"
    # Classes of a scale in their order, so that the predicted one has to stand out.
    shares = list(zip(found.classes, found.probabilities.tolist(), strict=True)) if is_ordinal else found.top_k(None)
    bars = [
        _Bar(Pressed(place, run, task, name), name, share, is_predicted=is_ordinal and name == found.label)
        for name, share in shares
    ]
    suffix = "" if found.calibrated else ", not calibrated"
    title = f"{escape(task)}: <strong>{escape(_readable(found.label or NO_PREDICTION))}</strong>{suffix}"
    return f"<h4>{title}</h4>{_bars(bars, len(bars) if is_ordinal else SHOWN)}"


def _several(place: int, run: str, task: str, found: TaskPrediction) -> str:
    """Show all labels of an image, and each label's probability with its threshold as a mark."""
    thresholds = dict(zip(found.classes, found.thresholds, strict=True))
    named = ", ".join(_readable(name) for name, _ in found.labels) or "(no label)"
    reached = {name for name, _ in found.labels}
    bars = [
        _Bar(
            Pressed(place, run, task, name),
            name,
            share,
            f"from {100 * thresholds[name]:.1f} %",
            thresholds[name],
            name in reached,
        )
        for name, share in found.top_k(None)
    ]
    # What is predicted is never folded away.
    suffix = "" if found.calibrated else ", not calibrated"
    return f"<h4>{escape(task)}: <strong>{escape(named)}</strong>{suffix}</h4>{_bars(bars, max(SHOWN, _last(bars)))}"


def _last(bars: Sequence[_Bar]) -> int:
    return max((place for place, bar in enumerate(bars, start=1) if bar.is_predicted), default=0)


def _number(place: int, run: str, task: str, found: TaskPrediction) -> str:
    """Show a predicted number with its standard deviation, and buttons for what raises and what lowers it."""
    from evaluation.saliency import DIRECTIONS

    assert found.value is not None
    buttons = "".join(
        f'<li><button type="button" class="bar" {_attributes(Pressed(place, run, task, name))} style="--share: 0%" '
        f'aria-label="what makes {escape(task)} {name}; show where"><span>what makes it {name}</span></button></li>'
        for name in DIRECTIONS
    )
    text = f"{escape(task)}: <strong>{found.value:.6g}</strong>"
    if found.deviation is None:
        return f"<h4>{text}</h4><ol>{buttons}</ol>"
    low, high = found.value - found.deviation, found.value + found.deviation
    note = f"{low:.4g} to {high:.4g} within one standard deviation"
    return f"<h4>{text} ± {found.deviation:.2g}</h4><p>{escape(note)}</p><ol>{buttons}</ol>"


def _labels(place: int, run: str, found: ZeroShot) -> str:
    first_prompt = {label: prompts[0] for label, prompts in zip(found.labels, found.prompts, strict=True)}
    bars = [
        _Bar(Pressed(place, run, "", first_prompt[label]), label, share, f"similarity {similarity:.3f}")
        for label, share, similarity in found.ranked()
    ]
    verdict = f'<p class="verdict">{escape(found.verdict.text)}</p>' if found.verdict.none_of_these else ""
    return f"<section>{verdict}{_bars(bars)}</section>"


def _bars(bars: Sequence[_Bar], at_once: int = SHOWN) -> str:
    def listed(some: Iterable[_Bar]) -> str:
        return f"<ol>{''.join(map(_bar, some))}</ol>"

    if len(bars) <= at_once:
        return listed(bars)
    more = f"<details><summary>{len(bars) - at_once} more</summary>{listed(bars[at_once:])}</details>"
    return listed(bars[:at_once]) + more


def _bar(bar: _Bar) -> str:
    name, share = escape(_readable(bar.name)), f"{100 * bar.probability:.1f} %"
    note = f"<small>{escape(bar.note)}</small> " if bar.note else ""
    css = "bar predicted" if bar.is_predicted else "bar"
    style = f"--share: {100 * bar.probability:.2f}%"
    mark = "" if bar.threshold is None else f'<i class="threshold" style="left: {100 * bar.threshold:.2f}%"></i>'
    return (
        f'<li><button type="button" class="{css}" {_attributes(bar.pressed)} style="{style}" '
        f'aria-label="{name}, {share}; show where">{mark}<span>{name}</span><span class="share">{note}{share}</span>'
        "</button></li>"
    )


def _attributes(pressed: Pressed) -> str:
    return " ".join(f'data-{key}="{escape(str(value))}"' for key, value in pressed._asdict().items())


def _readable(name: str) -> str:
    return name.replace("_", " ")


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


_OWN = "My own"
_LABELS = "mug, bottle, backpack"
_NO_IMAGE = (
    '<p class="cards-empty">Add an image of your own, or press an example: how well each label fits appears here.</p>'
)


def build_zero_shot(context: AppContext) -> None:
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
            predictions = predictions_view("zero-shot-predictions", _NO_IMAGE)
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
        return predict(uploads, label_text, name, template_text, heat) if uploads else _NO_IMAGE

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
