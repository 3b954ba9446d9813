"""A grid of pictures that can be chosen by mouse, finger and keyboard; every tab shows its pictures with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import gradio as gr

from app.picture_address import picture_url

THUMBNAIL = 256
"""Longest side in pixels of a picture in the grid: sharp at the width of a column on a dense screen."""

# Listeners sit on the component, not on the cards, which are made anew with every value. What cards show is
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
    """A picture of a gallery with what is said about it.

    Attributes:
        gallery: name of the gallery, as the context knows it.
        sample_id: the picture's id in it.
        title: first line below the picture, and the picture's description for who does not see it.
        lines: further lines.
        selected: whether it stands out as the chosen one.
    """

    gallery: str
    sample_id: str
    title: str
    lines: Sequence[str] = ()
    selected: bool = False


def card_grid(items: Sequence[Card] = (), columns: int = 4, *, label: str = "Pictures", elem_id: str = "") -> gr.HTML:
    """The component; a handler's output for it is ``cards_html(…)``.

    Its event ``select`` brings ``gr.SelectData``: ``value`` is the ``sample_id`` and ``index`` the place in the grid.
    Whatever it brings comes from outside: look it up in the gallery before use.

    Args:
        items: what it shows at first.
        columns: pictures in a row of a wide window; a narrow one has fewer.
        label: what the grid is, for who does not see it.
        elem_id: id of the element, for styles and tests.
    """
    return gr.HTML(
        cards_html(items, columns, label=label),
        js_on_load=_ON_LOAD,
        elem_id=elem_id or None,
        elem_classes=["card-grid"],
        apply_default_css=False,
    )


def cards_html(items: Sequence[Card], columns: int = 4, *, label: str = "Pictures", empty: str = "") -> str:
    """The grid's content. All text is escaped: titles and ids come from tables of the users' data.

    Args:
        items: the pictures, in order.
        columns: pictures in a row of a wide window.
        label: what the grid is, for who does not see it.
        empty: what is said where there are no pictures.
    """
    if not items:
        return f'<p class="cards-empty" role="status">{escape(empty)}</p>' if empty else ""
    cards = "".join(f"<li>{_card(item)}</li>" for item in items)
    return f'<ul class="cards" aria-label="{escape(label)}" style="--columns: {int(columns)}">{cards}</ul>'


def _card(item: Card) -> str:
    lines = "".join(f'<span class="card-line">{escape(line)}</span>' for line in item.lines)
    address = picture_url(item.gallery, item.sample_id, THUMBNAIL)
    return (
        f'<button type="button" class="card{" card-selected" if item.selected else ""}" '
        f'aria-pressed="{"true" if item.selected else "false"}" '
        f'data-gallery="{escape(item.gallery)}" data-id="{escape(item.sample_id)}">'
        f'<img src="{escape(address)}" alt="{escape(item.title)}" loading="lazy" decoding="async">'
        f'<span class="card-title">{escape(item.title)}</span>{lines}</button>'
    )
