"""Where a model sees what it says: the choice of a method, and the overlay that a pressed bar brings."""

from __future__ import annotations

from typing import NamedTuple

import gradio as gr

from app.answers import overlay_view, pressed_bar, seen_html
from app.classification import METHODS, read_uploads, where
from app.context import AppContext
from app.messages import told
from app.picture_input import Given, paths_of


class Seeing(NamedTuple):
    """Components of one tab.

    Attributes:
        method: one of ``METHODS``.
        overlay: shows the picture.
    """

    method: gr.Radio
    overlay: gr.HTML


def seeing(elem_id: str) -> Seeing:
    """Lays them out."""
    method = gr.Radio(list(METHODS), value=next(iter(METHODS)), label="Press a bar to see where, by")
    return Seeing(method, overlay_view(elem_id))


def connect_bars(context: AppContext, answers: gr.HTML, pictures: gr.components.Component, seen: Seeing) -> None:
    """Makes a pressed bar of ``answers`` show where its class or text is seen in its picture."""

    @told
    def show(given: Given, way: str, event: gr.SelectData) -> str:
        paths = paths_of(given)
        pressed = pressed_bar(event, len(paths))
        run = context.run(pressed.run)
        [upload] = read_uploads([paths[pressed.place]], context.limits, [run])
        return seen_html(where(run, upload, pressed.task, pressed.label, way), upload.name)

    answers.select(show, [pictures, seen.method], seen.overlay)
