"""Images of the galleries: the route that serves them, scaled, and a grid in which they can be chosen.

The grid works by mouse, finger and keyboard. The route serves nothing of the disk but the galleries' own images.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from http import HTTPStatus
from urllib.parse import urlencode

import gradio as gr
from fastapi import FastAPI, Request
from starlette.responses import PlainTextResponse, Response

from app.state.context import AppContext
from app.state.limits import SingleFlightCache
from vitrail.errors import UserError

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
