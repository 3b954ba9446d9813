"""How predictions for images look: bars of probabilities; a pressed bar shows where the model attends to its class.

Everything that comes from files, runs and users is escaped. Images are inside the page, so that nothing has to be
kept on the server for them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.logic.classify import METHODS, Classified, Saliency, saliency_of
from app.logic.uploads import Upload, read_uploads
from app.logic.zero_shot import ZeroShot
from app.state.context import AppContext
from app.state.runs import ServedRun
from app.widgets.page import Uploads, errors_in_place, paths_of
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
    return f'<ul class="notes" role="status">{lines}</ul>' if lines else ""


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
