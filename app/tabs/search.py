"""The tab Search: by words, by an image, or like an image of the gallery; filters, pages, details.

A session keeps what was asked last, so that pages and changed filters go on with it, whatever stands in the box by now.

Components of the tab Search, and where they stand.

What the tab Search shows: a line on what was found, cards, details of one image, and the address of a search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from app.logic.search import RANKERS, SCORES, Request, Result, ResultPage, Searching
from app.state.context import AppContext
from app.state.galleries import ServedGallery
from app.widgets.cards import Card, card_grid, cards_html, image_url
from app.widgets.page import on_page_load, one_line, told
from app.widgets.uploads import Given, image_input, paths_of
from retrieval.schema import CONFIDENCE, LABEL, PREDICTED
from retrieval.search.searcher import Query
from vitrail.errors import UserError
from vitrail.types import LABEL_TASK

_LARGE = 640
"""Longest side in pixels of the image in the details."""

_FILTER = "only."
"""Prefix of a filter's name in an address, so that a task may be called ``q``."""

STYLE = """
.search-said p { margin: 2px 0; } .search-said .found, .search-said .none { font-size: 16px; font-weight: 600; }
.search-said .scores, .search-said .note, .search-details dt {
  color: color-mix(in srgb, var(--body-text-color) 72%, transparent); font-variant-numeric: tabular-nums; }
.search-said a { color: inherit; text-decoration: underline; }
.search-said .wrong { border-left: 3px solid var(--error-text-color, #b91c1c); padding-left: 10px; }
.search-said p, .search-details p, .search-details dd, .search-details h3 { overflow-wrap: anywhere; }
.search-details { display: flex; flex-wrap: wrap; gap: 18px; align-items: flex-start; }
.search-details img { width: min(100%, 360px); max-height: 420px; object-fit: contain; border-radius: 10px; margin: 0;
  background: var(--background-fill-secondary); }
.search-details div { flex: 1 1 240px; min-width: 0; } .search-details h3 { margin: 0 0 6px; font-weight: 600; }
.search-details dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 14px; margin: 8px 0 0; }
.search-details dd { margin: 0; }
""".strip()


def said_html(page: ResultPage) -> str:
    """What was found, with mean and top score, or that nothing matches; then notes and the address of this search."""
    notes = "".join(f'<p class="note">Note: {escape(note)}</p>' for note in page.notes)
    took = f"{page.fitting:,} images searched in {1000 * page.seconds:.0f} ms"
    if page.results and page.top is not None and page.mean is not None:
        first, last = page.results[0].rank, page.results[-1].rank
        found = f'<p class="found">Results {first:,} to {last:,} for {escape(asked(page.request.query))}</p>'
        if page.weakness:
            found += f'<p class="none">No clear match: these are only the nearest</p><p>{escape(page.weakness)}</p>'
        scores = (
            f'<p class="scores">Top score {page.top:.4f} · mean of these {len(page.results)}: {page.mean:.4f} '
            f"({SCORES[page.ranker]}) · ranked by {RANKERS[page.ranker]} · {took}</p>"
        )
    else:
        found = f'<p class="none">No match for {escape(asked(page.request.query))}</p>'
        scores = f'<p class="scores">{_why_none(page)} · ranked by {RANKERS[page.ranker]} · {took}</p>'
    link = address_of(page.request)
    own = f'<p class="note"><a href="{escape(link)}">Link to this search</a></p>' if link else ""
    return f'<div class="search-said" role="status">{found}{scores}{notes}{own}</div>'


def wrong_html(message: str) -> str:
    """Why a search could not be done."""
    return f'<div class="search-said" role="alert"><p class="wrong">{escape(message)}</p></div>'


def asked(query: Query) -> str:
    """The query in words."""
    if query.text is not None:
        return f"“{query.text.strip()}”"
    return "the image that was given" if query.image is not None else f"images like {query.like}"


def cards_of(page: ResultPage, chosen: str = "") -> list[Card]:
    """A card for each result.

    Args:
        page: of results.
        chosen: id of the image whose details are shown.
    """
    return [
        Card(
            gallery=page.request.gallery,
            sample_id=result.sample_id,
            title=_title(result),
            lines=[f"{result.rank:,}. score {result.score:.4f}", *_attributes(result.row)],
            selected=result.sample_id == chosen,
        )
        for result in page.results
    ]


def details_html(gallery: ServedGallery, sample_id: str) -> str:
    """An image of a gallery in full, with all that is said about it.

    Raises:
        UserError: if there is no such image.
    """
    row = gallery.row(sample_id)
    lines = [(task, _said(row, task)) for task in gallery.tasks]
    lines += [("split", row["split"]), ("group", row["group"])]
    told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in lines if text)
    caption = f"<p>{escape(row['caption'])}</p>" if row["caption"] else ""
    image = escape(image_url(gallery.name, sample_id, _LARGE))
    description = escape(row["caption"] or sample_id)
    return (
        f'<div class="search-details"><img src="{image}" alt="{description}">'
        f"<div><h3>{escape(sample_id)}</h3>{caption}<dl>{told}</dl></div></div>"
    )


def address_of(request: Request) -> str:
    """Address that leads to the search; empty for an image from outside, which no address holds."""
    query = request.query
    if query.image is not None:
        return ""
    given: list[tuple[str, str]] = [("tab", "search"), ("gallery", request.gallery)]
    given.append(("q", query.text) if query.text is not None else ("like", str(query.like)))
    given += [(name, value) for name, value in (("ranker", request.ranker), ("words", request.words)) if value]
    given += [(name, str(number)) for name, number in (("count", request.count), ("page", request.page))]
    given += [(f"{_FILTER}{name}", value) for name, values in request.filters.items() for value in values]
    return f"?{urlencode(given)}"


def from_address(parameters: Sequence[tuple[str, str]], gallery: str, count: int) -> Request | None:
    """The search that an address asks for; None where it asks for none.

    Args:
        parameters: of the address, in order.
        gallery: where it names none.
        count: results on a page where it names none.

    Raises:
        UserError: for a number that is none, and a query that cannot be answered.
    """
    given = dict(parameters)
    if not _is_search(given) or not (given.get("q") or given.get("like")):
        return None
    filters: dict[str, list[str]] = {}
    for name, value in parameters:
        if name.startswith(_FILTER):
            filters.setdefault(name.removeprefix(_FILTER), []).append(value)
    return Request(
        gallery=given.get("gallery") or gallery,
        query=Query(like=given["like"]) if given.get("like") else Query(text=given["q"]),
        ranker=given.get("ranker", ""),
        words=given.get("words", ""),
        filters=filters,
        count=_number(given, "count", count),
        page=_number(given, "page", 1),
    )


def gallery_in(parameters: Sequence[tuple[str, str]]) -> str:
    """The gallery that an address chooses for the search, whether it asks for one or not; empty for none."""
    given = dict(parameters)
    return given.get("gallery", "") if _is_search(given) else ""


def _is_search(given: Mapping[str, str]) -> bool:
    return given.get("tab", "").lower() == "search"


def _number(given: Mapping[str, str], name: str, default: int) -> int:
    text = given.get(name) or str(default)
    # Longer ones are no page either, and Python would refuse to read them.
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise UserError(f"{name}={text[:20]}: must be a whole number in the address")
    return int(text)


def _why_none(page: ResultPage) -> str:
    if not page.fitting:
        return "no image fits the filters" if page.request.filters else "the gallery is empty"
    if page.top is not None:
        return f"there are no results from {(page.request.page - 1) * page.request.count + 1:,} on"
    return "nothing that fits the filters matches" if any(page.request.filters.values()) else "nothing matches"


def _title(result: Result) -> str:
    """The caption, else the class, else the id."""
    row = result.row
    label = row.get(f"{PREDICTED}{LABEL_TASK}") or row.get(f"{LABEL}{LABEL_TASK}")
    return row["caption"] or label or result.sample_id


def _attributes(row: Mapping[str, Any]) -> list[str]:
    """What the model says in a line, or where it says nothing, what the labels say."""
    for prefix in (PREDICTED, LABEL):
        if told := [str(value) for name, value in row.items() if name.startswith(prefix) and value]:
            return [("model: " if prefix == PREDICTED else "") + ", ".join(told)]
    return []


def _said(row: Mapping[str, Any], task: str) -> str:
    """Label and answer of a task."""
    label, answer = row.get(f"{LABEL}{task}"), row.get(f"{PREDICTED}{task}")
    if answer is None:
        return label or ""
    sure = f"{row.get(f'{CONFIDENCE}{task}') or 0:.0%} sure"
    if label == answer:
        return f"{label} (the model agrees, {sure})"
    told = f"{answer}, says the model ({sure})"
    return told if label is None else f"{label} · {told}"


ANY_RANKER = "automatic"
"""Choice of the ranker that suits gallery and query."""


@dataclass(frozen=True)
class Parts:
    """Components. What a search depends on besides the query stands in ``options``, filters last."""

    text: gr.Textbox
    ask: gr.Button
    images: gr.Gallery
    gallery: gr.Dropdown
    ranker: gr.Radio
    words: gr.Dropdown
    count: gr.Slider
    filters: dict[str, gr.Dropdown]
    said: gr.HTML
    grid: gr.HTML
    leafing: gr.Row
    back: gr.Button
    on: gr.Button
    details: gr.Column
    image: gr.HTML
    more_like: gr.Button
    close: gr.Button
    last: gr.State
    opened: gr.State

    @property
    def options(self) -> list[Any]:
        """What every search gets."""
        return [self.gallery, self.ranker, self.words, self.count, *self.filters.values()]

    @property
    def shown(self) -> list[Any]:
        """What a search changes."""
        found = [self.said, self.grid, self.leafing, self.back, self.on, self.details, self.image]
        return [*found, self.last, self.opened]


def lay_out(context: AppContext, words: list[tuple[str, str]]) -> Parts:
    """Makes the components where the caller stands.

    Args:
        context: what is served, with a gallery at least.
        words: what can be searched in by words in the first gallery: what people call it, and its name.
    """
    galleries, limits = context.galleries, context.limits
    first = next(iter(galleries.values()))
    names = list(dict.fromkeys(name for gallery in galleries.values() for name in gallery.choices))
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            text = gr.Textbox(
                label="Look for", placeholder=_example(first), max_length=limits.text, elem_id="search-text"
            )
            ask = gr.Button("Search", variant="primary", elem_id="search-ask")
            with gr.Accordion("By an image", open=False, elem_id="search-by-image"):
                images = image_input(context, "search-image")
            gallery = gr.Dropdown(
                list(galleries),
                value=first.name,
                label="Gallery (and the model that made it)",
                elem_id="search-gallery",
            )
            rankers = [(ANY_RANKER, ANY_RANKER), *((label, name) for name, label in RANKERS.items())]
            ranker = gr.Radio(rankers, value=ANY_RANKER, label="Ranked by", elem_id="search-ranker")
            chosen = words[0][1] if words else None
            said_in = gr.Dropdown(words, value=chosen, label="Words are", visible=len(words) > 1)
            count = gr.Slider(1, limits.results, value=limits.results, step=1, label="Results on a page")
            with gr.Accordion("Only images that are", open=False, elem_id="search-filters"):
                filters = {name: _filter(name, first.choices.get(name, [])) for name in names}
        with gr.Column(scale=3, min_width=300):
            said = gr.HTML("", css_template=STYLE, js_on_load=None, elem_id="search-said", apply_default_css=False)
            with gr.Column(visible=False, elem_id="search-details") as details:
                image = gr.HTML("", css_template=STYLE, js_on_load=None, apply_default_css=False)
                with gr.Row():
                    more_like = gr.Button("More like this", variant="primary", elem_id="search-more-like")
                    close = gr.Button("Close", elem_id="search-close")
            grid = card_grid(elem_id="search-grid", label="Results, best first")
            with gr.Row(visible=False) as leafing:
                back = gr.Button("Previous page", elem_id="search-back")
                on = gr.Button("Next page", elem_id="search-on")
    return Parts(
        text, ask, images, gallery, ranker, said_in, count, filters, said, grid, leafing, back, on, details,
        image, more_like, close, gr.State(None), gr.State(""),
    )  # fmt: skip


def _filter(name: str, choices: list[str]) -> gr.Dropdown:
    return gr.Dropdown(
        choices, value=[], multiselect=True, label=name, visible=bool(choices), elem_id=f"search-only-{name}"
    )


def _example(gallery: ServedGallery) -> str:
    """A query that finds something, made of what is said of the gallery's first image."""
    for column in ("caption", "text"):
        for said in gallery.metadata.column(column).slice(0, 1).to_pylist():
            if said:
                return f"for example: {said.replace('_', ' ')}"
    return "what to look for, in words"


Values = dict[Any, Any]
"""New values by component."""

# Whoever opens an image far down in the results is led to its details, and back.
_TO_DETAILS = """() => setTimeout(() => {
  document.getElementById('search-details')?.scrollIntoView({block: 'nearest'});
  document.getElementById('search-more-like')?.focus({preventScroll: true});
}, 50)"""
_TO_CARD = """() => {
  const shown = document.querySelector('#search-details h3')?.textContent;
  for (const card of document.querySelectorAll('#search-grid button.card')) if (card.dataset.id === shown) card.focus();
}"""
_TO_TOP = "() => document.getElementById('search-said')?.scrollIntoView({block: 'nearest'})"
# In a narrow window results stand below the options.
_TO_RESULTS = (
    """() => { if (innerWidth < 700) document.getElementById('search-said')?.scrollIntoView({block: 'start'}); }"""
)


def build(context: AppContext) -> None:
    """Puts the tab's components where the caller stands."""
    if not context.galleries:
        gr.Markdown("No gallery is served. Start with `--gallery FOLDER`, or `--run RUN`, whose images are indexed.")
        return
    _Tab(context).listen()


class _Tab:
    """Components and handlers."""

    def __init__(self, context: AppContext) -> None:
        self._context = context
        self._searching = Searching(context)
        self._first = next(iter(context.galleries))
        self._parts = lay_out(context, self._words(context.gallery(self._first)))

    def listen(self) -> None:
        """Lets components answer to what people do."""
        parts = self._parts
        shown = parts.shown
        # Of what is asked while an answer is on its way the last counts; by default it would be dropped.
        last: dict[str, Any] = {"trigger_mode": "always_last"}
        words = [parts.text, *parts.options]
        asked = gr.on([parts.text.submit, parts.ask.click], told(self.by_text), words, shown, **last)
        asked.then(js=_TO_RESULTS)
        parts.images.change(told(self.by_image), [parts.images, parts.last, *parts.options], shown)
        chosen_from = (parts.words, *parts.filters.values())
        changed = [parts.ranker.input, *(part.input for part in chosen_from)]
        gr.on([*changed, parts.count.release], told(self.again), [parts.last, *parts.options], shown, **last)
        choices = [*shown, parts.ranker, parts.words, *parts.filters.values()]
        parts.gallery.input(told(self.other_gallery), [parts.last, *parts.options], choices, **last)
        for button, by in ((parts.back, -1), (parts.on, 1)):
            button.click(told(self._turning(by)), [parts.last], shown).then(js=_TO_TOP)
        chosen = [parts.details, parts.image, parts.opened]
        parts.grid.select(told(self.opened), [parts.last], chosen).success(js=_TO_DETAILS)
        closed = {parts.details: gr.Column(visible=False), parts.opened: ""}
        parts.close.click(lambda: closed, None, chosen, js=_TO_CARD)
        like = parts.more_like.click(told(self.by_opened), [parts.opened, *parts.options], [*shown, parts.text])
        like.then(js=_TO_TOP)
        on_page_load(told(self.linked), [*choices, parts.gallery, parts.text, parts.count])

    def by_text(self, text: object, *options: object) -> Values:
        """Looks for words."""
        return self._answer(lambda: self._request(Query(text=_text(text)), options))

    def by_image(self, given: Given, last: Request | None, *options: object) -> Values:
        """Looks for images like the one that was given last; taking it away changes nothing else."""
        if not given:
            return {self._parts.last: last}
        return self._answer(lambda: self._request(Query(image=paths_of(given)[-1]), options))

    def by_opened(self, opened: str, *options: object) -> Values:
        """Looks for images like the one whose details are shown."""
        return self._answer(lambda: self._request(Query(like=opened), options)) | {self._parts.text: ""}

    def again(self, last: Request | None, *options: object) -> Values:
        """The same search with other options, from its first page on."""
        if last is None:
            return {self._parts.last: None}
        return self._answer(lambda: self._request(last.query, options))

    def other_gallery(self, last: Request | None, name: object, *options: object) -> Values:
        """The same search in another gallery, which has choices of its own."""
        gallery = self._context.gallery(name)
        count = _whole(options[2], "results")
        shown = {self._parts.last: None}
        if last is not None:
            shown = self._answer(lambda: Request(gallery.name, last.query, count=count))
        return self._choices(gallery) | shown

    def opened(self, last: Request | None, event: gr.SelectData) -> Values:
        """Details of an image that was found."""
        gallery = self._context.gallery(last.gallery if last is not None else self._first)
        parts, sample_id = self._parts, str(event.value)
        return {
            parts.image: details_html(gallery, sample_id),
            parts.details: gr.Column(visible=True),
            parts.opened: sample_id,
        }

    def linked(self, request: gr.Request) -> Values:
        """What the address asks for; what it asks wrongly is said."""
        parts = self._parts
        parameters = request.query_params
        pairs = parameters.multi_items() if hasattr(parameters, "multi_items") else list(parameters.items())
        try:
            asked = from_address(pairs, self._first, self._context.limits.results)
            name = asked.gallery if asked is not None else gallery_in(pairs)
            if not name:
                return {parts.last: None}
            gallery = self._context.gallery(name)
        except UserError as error:
            return {parts.last: None, parts.said: wrong_html(one_line(str(error)))}
        if asked is None:
            return self._choices(gallery) | {parts.gallery: name, parts.last: None}
        choices = self._choices(gallery, asked.ranker, asked.words, asked.filters)
        text = asked.query.text or ""
        own = {parts.gallery: asked.gallery, parts.text: text, parts.count: asked.count}
        return choices | own | self._answer(lambda: asked)

    def _turning(self, by: int) -> Callable[[Request | None], Values]:
        def turned(last: Request | None) -> Values:
            if last is None:
                raise UserError("there is no search to leaf through; search first")
            return self._answer(lambda: replace(last, page=last.page + by))

        return turned

    def _request(self, query: Query, options: tuple[object, ...]) -> Request:
        """A search as the components ask for it; whatever they say is checked here or where it is used."""
        gallery, ranker, words, count, *chosen = options
        filters = {name: _values(values) for name, values in zip(self._parts.filters, chosen, strict=True)}
        return Request(
            gallery=self._context.gallery(gallery).name,
            query=query,
            ranker="" if ranker in (None, ANY_RANKER) else str(ranker),
            words=str(words or ""),
            filters={name: values for name, values in filters.items() if values},
            count=_whole(count, "results"),
        )

    def _answer(self, asked: Callable[[], Request]) -> Values:
        """What a search changes; a mistake of the user is said where the results would stand."""
        parts = self._parts
        closed = {parts.details: gr.Column(visible=False), parts.opened: "", parts.image: ""}
        request = None
        try:
            request = asked()
            page = self._searching.search(request)
        except UserError as error:
            # What was asked stays: another ranker or gallery may be able to answer it.
            hidden = {parts.leafing: gr.Row(visible=False), parts.grid: "", parts.last: request}
            return closed | hidden | {parts.said: wrong_html(one_line(str(error)))}
        first = page.request.page == 1
        return closed | {
            parts.said: said_html(page),
            parts.grid: cards_html(cards_of(page), label="Results, best first"),
            parts.leafing: gr.Row(visible=page.more or not first),
            parts.back: gr.Button(interactive=not first),
            parts.on: gr.Button(interactive=page.more),
            parts.last: page.request,
        }

    def _words(self, gallery: ServedGallery) -> list[tuple[str, str]]:
        return [(label, value) for value, label in self._searching.word_choices(gallery.name).items()]

    def _choices(
        self,
        gallery: ServedGallery,
        ranker: str = "",
        words_from: str = "",
        filters: Mapping[str, Sequence[str]] | None = None,
    ) -> Values:
        """What can be chosen in a gallery, with what a search has chosen of it."""
        parts = self._parts
        words = self._words(gallery)
        known = [value for _, value in words]
        chosen = words_from if words_from in known else next(iter(known), None)
        values: Values = {
            parts.ranker: gr.Radio(value=ranker or ANY_RANKER),
            parts.words: gr.Dropdown(choices=words, value=chosen, visible=len(words) > 1),
        }
        for name, part in parts.filters.items():
            choices = gallery.choices.get(name, [])
            picked = [value for value in (filters or {}).get(name, ()) if value in choices]
            values[part] = gr.Dropdown(choices=choices, value=picked, multiselect=True, visible=bool(choices))
        return values


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise UserError("the query is no text; say what to look for in words")
    return value


def _values(value: object) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UserError("filters: choose values from their lists")
    return value


def _whole(value: object, name: str) -> int:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value != int(value):
        raise UserError(f"{name}: must be a whole number")
    return int(value)
