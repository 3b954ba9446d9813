"""How many pictures each class has, as bars that can be chosen to see the pictures."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import gradio as gr

from app.exploring import NOT_KNOWN
from evaluation.dataset.figures import SPLIT_COLOURS

if TYPE_CHECKING:
    import pandas as pd

_OTHER = "#7d8590"

_ON_LOAD = """
element.addEventListener('click', (event) => {
  const bar = event.target.closest('button.bar');
  if (bar) trigger('select', {index: Number(bar.dataset.place), value: bar.dataset.value});
});
"""

_STYLE = """
.bars { list-style: none; margin: 0; padding: 0; max-height: 70vh; overflow-y: auto; }
.bars li { margin: 0; }
.bar { display: grid; grid-template-columns: minmax(6rem, 32%) 1fr 3.6rem; gap: .6rem; align-items: center;
  width: 100%; padding: .25rem .35rem; border: 0; border-radius: 6px; background: none; color: inherit; font: inherit;
  text-align: left; cursor: pointer; }
.bar:hover, .bar:focus-visible { background: var(--background-fill-secondary); }
.bar:focus-visible { outline: 2px solid var(--color-accent); outline-offset: -2px; }
.bar-name { overflow-wrap: anywhere; }
.bar-track { display: flex; height: .9rem; }
.bar-track span { display: block; height: 100%; }
.bar-count { text-align: right; font-variant-numeric: tabular-nums; }
.bars-key { display: flex; flex-wrap: wrap; gap: .3rem 1rem; list-style: none; margin: 0 0 .6rem; padding: 0; }
.bars-key span { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border-radius: 2px; }
.bars-note { color: var(--body-text-color-subdued); margin: .5rem 0 0; }
"""


def class_bars() -> gr.HTML:
    """The component; its event ``select`` brings ``gr.SelectData`` whose ``value`` is the class, from outside."""
    return gr.HTML(
        js_on_load=_ON_LOAD,
        css_template=_STYLE,
        elem_id="explore-classes",
        elem_classes=["class-bars"],
        apply_default_css=False,
    )


def bars_html(counts: pd.DataFrame, task: str) -> str:
    """The bars, longest first.

    Args:
        counts: int64, a row for each class and a column for each split.
        task: that the classes are of.
    """
    totals = counts.sum(axis=1).sort_values(ascending=False, kind="stable")
    seen, absent = totals[totals > 0], int((totals == 0).sum())
    if seen.empty:
        return '<p class="bars-note" role="status">No picture is left by the filters.</p>'
    key = "".join(
        f'<li><span style="background: {_colour(split)}"></span>{escape(str(split))}</li>' for split in counts.columns
    )
    bars = "".join(
        f"<li>{_bar(place, str(name), counts.loc[name], int(seen.iloc[0]))}</li>"
        for place, name in enumerate(seen.index)
    )
    known = seen.drop(NOT_KNOWN, errors="ignore")
    if known.empty:
        said = f"No value of {task} is known of these pictures."
    else:
        # Not "all": a class that no picture of the gallery has is not among the values.
        of = f" of {len(counts.drop(NOT_KNOWN, errors='ignore')):,}" if absent else ""
        share = known.iloc[0] / seen.sum()
        said = (
            f"{len(known):,}{of} values of {task} occur; the most frequent, {known.index[0]}, is {share:.1%} of these "
            "pictures. Choose one to see its pictures."
        )
    return f'<ul class="bars-key">{key}</ul><ul class="bars">{bars}</ul><p class="bars-note">{escape(said)}</p>'


def _bar(place: int, name: str, counts: pd.Series[int], longest: int) -> str:
    parts = "".join(
        f'<span style="width: {100 * count / longest:.2f}%; background: {_colour(split)}"></span>'
        for split, count in counts.items()
        if count
    )
    by_split = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    return (
        f'<button type="button" class="bar" data-place="{place}" data-value="{escape(name)}" '
        f'title="{escape(f"{name}: {by_split}")}"><span class="bar-name">{escape(name)}</span>'
        f'<span class="bar-track">{parts}</span><span class="bar-count">{counts.sum():,}</span></button>'
    )


def _colour(split: object) -> str:
    return SPLIT_COLOURS.get(str(split), _OTHER)
