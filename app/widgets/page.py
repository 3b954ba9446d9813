"""What all tabs share: messages of failed requests, links read on page load, image uploads, grids of gallery images.

The route of the images serves nothing of the disk but the galleries' own.
"""

from __future__ import annotations

import functools
import hashlib
import html
import inspect
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from http import HTTPStatus
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlencode

import gradio as gr
import numpy as np
from fastapi import FastAPI, Request
from gradio.context import Context
from starlette.responses import PlainTextResponse, Response

from app.logic.explore import Explorer
from app.state.context import AppContext, SingleFlightCache
from app.state.galleries import ServedGallery
from app.state.runs import ServedRun
from vitrail.errors import UserError
from vitrail.files import write_atomically

Params = ParamSpec("Params")
Output = TypeVar("Output")

LOGGER = logging.getLogger("vitrail.app")
LONGEST = 400
"""Characters of a message; an error can quote what it was given."""

Uploads = list[tuple[str, str | None]] | None
"""Value of an image upload: files with captions."""


def report_errors(handler: Callable[Params, Output]) -> Callable[Params, Output]:
    """Show errors of a handler, a function or generator, as one line in the browser.

    A ``UserError`` is shown as it is. Any other error is logged with its traceback, and the browser only shows that
    the request failed: internal messages can name files of this machine.
    """
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def stepwise(*args: Params.args, **kwargs: Params.kwargs) -> object:
            try:
                yield from handler(*args, **kwargs)
            except Exception as error:
                raise _shown(error, handler.__name__) from error

        return stepwise  # type: ignore[return-value]

    @functools.wraps(handler)
    def at_once(*args: Params.args, **kwargs: Params.kwargs) -> Output:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            raise _shown(error, handler.__name__) from error

    return at_once


def errors_in_place(handler: Callable[Params, str]) -> Callable[Params, str]:
    """Return a ``UserError`` of a handler as HTML instead of its result, so that no older result stays next to it."""

    @functools.wraps(handler)
    def in_place(*args: Params.args, **kwargs: Params.kwargs) -> str:
        try:
            return handler(*args, **kwargs)
        except UserError as error:
            return problem_html(str(error))

    return report_errors(in_place)


def problem_html(message: str) -> str:
    """Return a message about a request that cannot be answered."""
    return f'<div class="prediction"><p class="problem" role="alert">{html.escape(one_line(message))}</p></div>'


def _shown(error: Exception, request: str) -> gr.Error:
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, UserError):
        # Gradio shows messages as HTML, and ours quote what the user typed.
        return gr.Error(html.escape(one_line(str(error))), 6, title="Not possible", print_exception=False)
    LOGGER.error("%s failed", request, exc_info=error)
    message = (
        "This request failed because of an internal error, which the server has logged. Other requests still work."
    )
    return gr.Error(message, title="Failed", print_exception=False)


def one_line(message: str) -> str:
    """Return the message without line breaks, cut where it is longer than a line or two."""
    line = " ".join(message.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


def address_html(address: str, *, keeps_image: bool = False) -> str:
    """Return a link to what is shown, which ``static/address.js`` makes the page's address.

    Args:
        address: relative, ``?tab=…``.
        keeps_image: whether an image of a gallery that the page's address names stays in it.
    """
    link = html.escape(address + ("&keeps-image=1" if keeps_image else ""))
    return f'<a class="address" href="{link}" hidden></a>'


def on_page_load(handler: Callable[[gr.Request], object], outputs: Sequence[gr.components.Component]) -> Any:
    """Let a handler set components when the page is opened; its request's ``query_params`` are untrusted.

    Returns:
        the event, which others may follow.
    """
    if Context.root_block is None:
        raise RuntimeError("call it while a page is laid out (inside `with gr.Blocks()`)")
    return Context.root_block.load(handler, None, list(outputs), show_progress="hidden")


def image_upload(context: AppContext, elem_id: str) -> gr.Gallery:
    """Make a component for images. Handlers get file names only: ``app.logic.uploads`` checks a file and decodes it."""
    return gr.Gallery(
        label=f"Images: drop, choose, paste or take up to {context.limits.images}",
        type="filepath",
        # Pasting only works with this name for all images; which of them are read is up to ``app.logic.uploads``.
        file_types=["image"],
        sources=["upload", "webcam", "clipboard"],
        interactive=True,
        columns=4,
        height=240,
        object_fit="contain",
        buttons=[],
        elem_id=elem_id,
        elem_classes=["uploads"],
    )


def paths_of(uploads: Uploads) -> list[Path]:
    """Return the files of an image upload, in order."""
    return [Path(path) for path, _ in uploads or []]


ROUTE = "images"
"""Path of the route, relative to the page; gallery and image are in the query: both names may have slashes and dots."""

THUMBNAIL = 256
"""Longest side in pixels of an image in the grid: sharp at the width of a column on a dense screen."""

# Listeners are on the component, not on the cards, which are replaced with every value. What cards show is
# never part of this code.
_ON_LOAD = """
const cards = () => Array.from(element.querySelectorAll('button.card'));
element.addEventListener('click', (event) => {
  const card = event.target.closest('button.card');
  if (card) trigger('select', {index: cards().indexOf(card), value: card.dataset.id, gallery: card.dataset.gallery});
});
element.addEventListener('keydown', (event) => {
  const all = cards(), here = all.indexOf(event.target.closest('button.card'));
  if (here < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const top = all[0].offsetTop, inRow = all.filter((card) => card.offsetTop === top).length;
  const there = {ArrowRight: here + 1, ArrowLeft: here - 1, ArrowDown: here + inRow, ArrowUp: here - inRow,
                 Home: 0, End: all.length - 1}[event.key];
  if (there === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  if (all[there]) all[there].focus();
});
let focused = null;
element.addEventListener('focusin', (event) => { focused = event.target.closest('button.card')?.dataset.id ?? null; });
document.addEventListener('focusin', (event) => { if (!element.contains(event.target)) focused = null; });
watch('value', () => {
  const again = focused === null ? null : cards().find((card) => card.dataset.id === focused);
  if (again) again.focus({preventScroll: true});
});
"""


@dataclass(frozen=True)
class Card:
    """An image of a gallery, with a title, which is its alternative text too, and further lines."""

    gallery: str
    sample_id: str
    title: str
    lines: Sequence[str] = ()


def card_grid(items: Sequence[Card] = (), columns: int = 4, *, label: str = "Images", elem_id: str = "") -> gr.HTML:
    """Make the component; a handler's output for it is ``cards_html(…)``.

    Its event ``select`` has ``gr.SelectData``: ``value`` is the ``sample_id`` and ``index`` the place in the grid. Both
    are untrusted: look them up in the gallery before use.
    """
    return gr.HTML(
        cards_html(items, columns, label=label),
        js_on_load=_ON_LOAD,
        elem_id=elem_id or None,
        elem_classes=["card-grid"],
        apply_default_css=False,
    )


def cards_html(items: Sequence[Card], columns: int = 4, *, label: str = "Images", empty: str = "") -> str:
    """Return the grid's content. All text is escaped: titles and ids come from tables of the users' data.

    Args:
        items: the images, in order.
        columns: images in a row of a wide window; a narrow one has fewer.
        label: what the grid is, for screen readers.
        empty: text for a grid without images.
    """
    if not items:
        return f'<p class="cards-empty" role="status">{escape(empty)}</p>' if empty else ""
    cards = "".join(f"<li>{_card(item)}</li>" for item in items)
    return f'<ul class="cards" aria-label="{escape(label)}" style="--columns: {int(columns)}">{cards}</ul>'


def _card(item: Card) -> str:
    lines = "".join(f'<span class="card-line">{escape(line)}</span>' for line in item.lines)
    address = image_url(item.gallery, item.sample_id, THUMBNAIL)
    return (
        f'<button type="button" class="card" data-gallery="{escape(item.gallery)}" data-id="{escape(item.sample_id)}">'
        f'<img src="{escape(address)}" alt="{escape(item.title)}" loading="lazy" decoding="async">'
        f'<span class="card-title">{escape(item.title)}</span>{lines}</button>'
    )


def image_url(gallery: str, sample_id: str, side: int) -> str:
    """Return the address of an image whose longest side is at most ``side`` pixels, relative to the page."""
    return f"{ROUTE}?{urlencode({'gallery': gallery, 'id': sample_id, 'side': side})}"


SIDES = (64, 128, 256, 512, 1024, 1600)
"""Longest sides that are made; a request gets the next larger one, so that few versions of an image are kept."""

_AT_ONCE = 4
_KEPT = 256
"""Scaled images that are kept; those of a page have some kilobytes each."""


def add_images(app: FastAPI, context: AppContext) -> None:
    """Add the route of ``image_url``."""
    kept: SingleFlightCache[bytes] = SingleFlightCache(_KEPT)
    # A page asks for twenty at once; decoding more than a few together would only need more memory.
    decoding = threading.BoundedSemaphore(_AT_ONCE)

    def jpeg(name: str, sample_id: str, side: int) -> bytes:
        gallery = context.gallery(name)  # ids are looked up, never made part of a path
        with decoding:
            return gallery.jpeg(sample_id, side)

    def image(request: Request, gallery: str, id: str, side: int = 256) -> Response:  # noqa: A002 -- part of the address
        side = next((size for size in SIDES if size >= side), SIDES[-1])
        try:
            content = kept.get((gallery, id, side), lambda: jpeg(gallery, id, side))
        except UserError:
            # The reason can name a file, which is not for the browser.
            return PlainTextResponse("there is no such image", HTTPStatus.NOT_FOUND)
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = {"etag": tag, "cache-control": "private, max-age=600"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        return Response(content, media_type="image/jpeg", headers=headers)

    app.get(f"/{ROUTE}", include_in_schema=False)(image)


COUNT = 8
"""Examples of a tab."""


def example_gallery(context: AppContext, runs: Sequence[ServedRun]) -> ServedGallery | None:
    """Return the gallery whose images are examples for some runs: the first that one of them made, else any."""
    weights = {run.weights for run in runs}
    galleries = [gallery for gallery in context.galleries.values() if len(gallery)]
    return next((one for one in galleries if one.identity.weights in weights), next(iter(galleries), None))


def example_ids(gallery: ServedGallery, count: int = COUNT) -> list[str]:
    """Return images of a gallery that a model has not been trained on, where there are such, of several classes."""
    explorer = Explorer(gallery)
    split = next((one for one in ("test", "val") if one in explorer.splits), "")
    rows = explorer.find(explorer.filter(split))
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 20 * count)).astype(np.int64))]
    by_value: dict[str, list[int]] = {}
    for row in rows.tolist():
        by_value.setdefault(explorer.value_of(row, explorer.main) if explorer.main else "", []).append(row)
    # The first of each class, then the second of each.
    turns = max(map(len, by_value.values()), default=0)
    ordered = [rows[turn] for turn in range(turns) for rows in by_value.values() if turn < len(rows)]
    return [explorer.ids[row] for row in ordered[:count]]


def images_with_examples(context: AppContext, runs: Sequence[ServedRun], tab: str) -> tuple[gr.Gallery, Any]:
    """Lay out an upload and examples; the one that is pressed becomes the tab's image.

    Returns:
        the upload, and the event that sets the image, which others may follow (the upload reports only what users
        change); None where there are no examples.
    """
    images = image_upload(context, f"{tab}-images")
    gallery = example_gallery(context, runs)
    if gallery is None:
        return images, None
    explorer = Explorer(gallery)
    cards = [
        Card(
            gallery.name,
            sample_id,
            explorer.value_of(explorer.row_of(sample_id), explorer.main) if explorer.main else "",
        )
        for sample_id in example_ids(gallery)
    ]
    with gr.Column(elem_classes=["examples"]):
        gr.Markdown("Try an example:", elem_classes=["examples-title"])
        grid = card_grid(cards, COUNT, label="Example images", elem_id=f"{tab}-examples")

    @report_errors
    def use(event: gr.SelectData) -> list[str]:
        return [upload_of(gallery, str(event.value))]

    return images, grid.select(use, None, images)


def upload_of(gallery: ServedGallery, sample_id: str) -> str:
    """Return an image of a gallery as a file among the uploads; raise ``UserError`` where there is no such image."""
    found = gallery.image(sample_id)
    content = found if isinstance(found, bytes) else found.read_bytes()
    suffix = ".jpg" if isinstance(found, bytes) else found.suffix
    name = re.sub(r"[^\w.-]+", "_", Path(sample_id).stem)[-60:] or "image"
    folder = Path(os.environ["GRADIO_TEMP_DIR"]) / "examples" / hashlib.sha256(content).hexdigest()[:16]
    path = folder / f"{name}{suffix}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as file:
            file.write_bytes(content)
    return str(path)


def linked_upload(context: AppContext, request: gr.Request, tab: str) -> Any:
    """Return the image that a link to a tab names (``?tab=classify&gallery=G&image=ID``), for its upload."""
    query = request.query_params
    if str(query.get("tab", "")).lower() != tab or not query.get("image"):
        return gr.skip()
    try:
        return [upload_of(context.gallery(query.get("gallery", "")), query["image"])]
    except UserError:
        return gr.skip()  # an old link: the tab is shown as it is


def links_html(gallery: str, sample_id: str, context: AppContext) -> str:
    """Return links by which an image is classified and compared with labels, as far as models for that are served."""
    tabs = [("classify", "Classify it")] if any(run.tasks for run in context.runs.values()) else []
    if any(run.kind == "dual encoder" for run in context.runs.values()):
        tabs.append(("zero-shot", "Compare it with labels"))
    links = [
        f'<a href="?{urlencode({"tab": tab, "gallery": gallery, "image": sample_id})}">{title}</a>'.replace(
            "&", "&amp;"
        )
        for tab, title in tabs
    ]
    return f'<p class="image-links">{" · ".join(links)}</p>' if links else ""
