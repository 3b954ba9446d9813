"""How answers about images look: bars of probabilities that can be pressed to see where the model sees the class.

Everything that comes from files, runs and users is escaped. Images are inside the page, so that nothing has to be
kept on the server for them.

Where a model sees what it says: the choice of a method, and the overlay that a pressed bar brings.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.logic.classify import METHODS, Classified, Seen, Upload, read_uploads, where
from app.logic.zero_shot import ZeroShot
from app.state.context import AppContext
from app.widgets.page import told
from app.widgets.uploads import Given, paths_of
from evaluation.tables.per_class import NO_PREDICTION
from vitrail.errors import UserError
from vitrail.predictions import TaskPrediction

THUMBNAIL = 320
"""Longest side in pixels of an image beside its answers."""

SHOWN = 5
"""Classes of a task that are shown at once; the others can be unfolded."""

_CSS = (Path(__file__).parents[1] / "static" / "answers.css").read_text(encoding="utf-8")

# Bars are found by what they say of themselves; none of it is trusted on the server.
_ON_LOAD = """
element.addEventListener('click', (event) => {
  const bar = event.target.closest('button.bar');
  if (bar) trigger('select', {index: Number(bar.dataset.place),
                              value: [bar.dataset.run, bar.dataset.task, bar.dataset.label]});
});
"""


# The bar that was pressed may be far away from the overlay, on a phone below it.
_SHOW = "watch('value', () => { if (props.value) element.scrollIntoView({block: 'nearest'}); });"


class Pressed(NamedTuple):
    """What a pressed bar stands for.

    Attributes:
        place: of the image among those that were given.
        run: name of the run.
        task: whose class it is; empty for a text.
        label: the class or text.
    """

    place: int
    run: str
    task: str
    label: str


@dataclass(frozen=True)
class _Bar:
    pressed: Pressed
    name: str
    probability: float
    beside: str = ""


def answers_view(elem_id: str) -> gr.HTML:
    """The component for answers; its event ``select`` says which bar was pressed (``pressed_bar``)."""
    return gr.HTML(
        "", elem_id=elem_id, js_on_load=_ON_LOAD, css_template=_CSS, elem_classes=["answers"], apply_default_css=False
    )


def overlay_view(elem_id: str) -> gr.HTML:
    """The component for an overlay."""
    return gr.HTML("", elem_id=elem_id, js_on_load=_SHOW, css_template=_CSS, apply_default_css=False)


def pressed_bar(event: gr.SelectData, images: int) -> Pressed:
    """What was pressed, as the browser says.

    Args:
        event: as it came.
        images: number of those that were given.

    Raises:
        UserError: if it cannot be.
    """
    place, value = event.index, event.value
    is_place = isinstance(place, int) and not isinstance(place, bool) and 0 <= place < images
    if not is_place or not isinstance(value, list) or [type(part) for part in value] != [str] * 3:
        raise UserError("the image that was pressed is not there any more; ask again")
    return Pressed(place, *value)


def classified_html(classified: Sequence[Classified], notes: Sequence[str] = ()) -> str:
    """What one or two runs say of images.

    Args:
        classified: in the order of the images.
        notes: what is to be known of the runs, one line each.
    """
    articles = []
    for place, one in enumerate(classified):
        models = "".join(
            f"<section><h3>{escape(name)}</h3>"
            + "".join(_task(place, name, task, answer) for task, answer in said.tasks.items())
            + "</section>"
            for name, said in one.answers.items()
        )
        articles.append(_article(one.upload, models))
    return notes_html(notes) + "".join(articles)


def zero_shot_html(run: str, uploads: Sequence[Upload], answers: Sequence[ZeroShot], notes: Sequence[str]) -> str:
    """What a dual encoder says of images and labels.

    Args:
        run: its name.
        uploads: the images.
        answers: of those that can be read, in their order.
        notes: what was changed in the labels, and what is to be known of the run, one line each.
    """
    articles, rest = [], iter(answers)
    for place, upload in enumerate(uploads):
        models = "" if upload.image is None else _labels(place, run, next(rest))
        articles.append(_article(upload, models))
    return notes_html(notes) + "".join(articles)


def seen_html(seen: Seen, name: str) -> str:
    """An image as the model sees it, and the same with the map over it.

    Args:
        seen: what is shown.
        name: of the image.
    """
    panels = (("as the model sees it", seen.image), ("where it sees it", seen.overlay))
    figures = "".join(
        f'<figure><img src="{data_address(pixels, THUMBNAIL)}" alt="{escape(f"{name}, {title}")}">'
        f"<figcaption>{title}</figcaption></figure>"
        for title, pixels in panels
    )
    return f'<div class="answer" role="status"><div class="overlays">{figures}</div><p>{escape(seen.says)}</p></div>'


def notes_html(notes: Sequence[str]) -> str:
    """Lines that are to be known, each once."""
    lines = "".join(f"<li>{escape(note)}</li>" for note in dict.fromkeys(notes))
    return f'<ul class="notes" role="status">{lines}</ul>' if lines else ""


def data_address(pixels: NDArray[np.uint8] | Image.Image, side: int) -> str:
    """An image as an address that holds it.

    Args:
        pixels: uint8 ``(H, W, 3)``, or an RGB image.
        side: what its longest side is scaled to, in pixels; a small image grows by whole factors.
    """
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    factor = side / max(image.size)
    if factor < 1 or factor >= 2:
        factor = factor if factor < 1 else int(factor)
        size = tuple(max(1, round(length * factor)) for length in image.size)
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _article(upload: Upload, models: str) -> str:
    name = escape(upload.name)
    if upload.image is None:
        return f'<article class="answer"><p class="problem" role="alert">{escape(upload.problem)}</p></article>'
    address = data_address(upload.image, THUMBNAIL)
    image = f'<figure class="answer-image"><img src="{address}" alt="{name}"><figcaption>{name}</figcaption></figure>'
    return f'<article class="answer">{image}<div class="answer-models">{models}</div></article>'


def _task(place: int, run: str, task: str, answer: TaskPrediction) -> str:
    bars = [_Bar(Pressed(place, run, task, name), name, share) for name, share in answer.top_k(None)]
    how = "" if answer.calibrated else ", not calibrated"
    title = f"{escape(task)}: <strong>{escape(_spoken(answer.label or NO_PREDICTION))}</strong>{how}"
    return f"<h4>{title}</h4>{_bars(bars)}"


def _labels(place: int, run: str, answer: ZeroShot) -> str:
    first_prompt = dict(zip(answer.labels, (prompts[0] for prompts in answer.prompts), strict=True))
    bars = [
        _Bar(Pressed(place, run, "", first_prompt[label]), label, share, f"similarity {similarity:.3f}")
        for label, share, similarity in answer.ranked()
    ]
    verdict = answer.verdict
    marked = "verdict verdict-none" if verdict.none_of_these else "verdict"
    return f'<section><h3>{escape(run)}</h3>{_bars(bars)}<p class="{marked}">{escape(verdict.says)}</p></section>'


def _bars(bars: Sequence[_Bar]) -> str:
    first, others = bars[:SHOWN], bars[SHOWN:]
    listed = f"<ol>{''.join(map(_bar, first))}</ol>"
    if not others:
        return listed
    return f"{listed}<details><summary>{len(others)} more</summary><ol>{''.join(map(_bar, others))}</ol></details>"


def _bar(bar: _Bar) -> str:
    name, share = escape(_spoken(bar.name)), f"{100 * bar.probability:.1f} %"
    data: dict[str, Any] = {**bar.pressed._asdict()}
    attributes = " ".join(f'data-{key}="{escape(str(value))}"' for key, value in data.items())
    beside = f"<small>{escape(bar.beside)}</small> " if bar.beside else ""
    return (
        f'<li><button type="button" class="bar" {attributes} style="--share: {100 * bar.probability:.2f}%" '
        f'aria-label="{name}, {share}; show where"><span>{name}</span><span class="share">{beside}{share}</span>'
        "</button></li>"
    )


def _spoken(name: str) -> str:
    return name.replace("_", " ")


class Seeing(NamedTuple):
    """Components of one tab.

    Attributes:
        method: one of ``METHODS``.
        overlay: shows the image.
    """

    method: gr.Radio
    overlay: gr.HTML


def seeing(elem_id: str) -> Seeing:
    """Lays them out."""
    method = gr.Radio(list(METHODS), value=next(iter(METHODS)), label="Press a bar to see where, by")
    return Seeing(method, overlay_view(elem_id))


def connect_bars(context: AppContext, answers: gr.HTML, images: gr.components.Component, seen: Seeing) -> None:
    """Makes a pressed bar of ``answers`` show where its class or text is seen in its image."""

    @told
    def show(given: Given, way: str, event: gr.SelectData) -> str:
        paths = paths_of(given)
        pressed = pressed_bar(event, len(paths))
        run = context.run(pressed.run)
        [upload] = read_uploads([paths[pressed.place]], context.limits, [run])
        return seen_html(where(run, upload, pressed.task, pressed.label, way), upload.name)

    answers.select(show, [images, seen.method], seen.overlay)
